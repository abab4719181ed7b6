"""Merging: pure functions of tensors, from two adapters' updates to one (linear, TIES, DARE and others).

Everything acts on the true update of a module, scaling * B @ A, one module at a time, in fp32. Nothing here reads a
file, knows a model's class or touches global random state.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
