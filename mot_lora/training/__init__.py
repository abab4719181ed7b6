"""Training: the student in memory, and one branch: an adapter trained on one teacher's traces.

It handles one branch at a time and knows neither rounds nor run folders. W_0 is never written to; folds go into memory.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
