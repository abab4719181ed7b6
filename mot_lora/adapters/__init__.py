"""Adapters: PEFT's adapters read as updates of a base, merged, looked at, and written so that PEFT loads them.

It takes folders, Hub names and live models. It trains nothing, and what it cannot take exactly it refuses by name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
