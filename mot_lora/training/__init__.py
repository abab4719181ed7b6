"""Training: the student in memory, and one branch of it: an adapter trained on one teacher's traces.

It knows one branch at a time and nothing of rounds or run folders; W_0 is never written to, and folds go into memory.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
