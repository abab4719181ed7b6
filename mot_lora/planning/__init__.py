"""Planning: whether a run fits on a card and how long it takes, before any weight is loaded.

It runs the training step on tensors without data (torch's meta device) and never allocates on a GPU.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
