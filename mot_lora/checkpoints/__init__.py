"""Checkpoints: full models on disk, and merged updates written into a copy of one.

It knows which files are the model and how their tensors hold its parameters. A base is opened read-only: nothing here
writes into one, and a new checkpoint is complete or does not exist.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
