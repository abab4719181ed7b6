"""Adapters: PEFT's adapters read as updates of a base, merged, looked at, and written so that PEFT loads them.

Adapters are folders, Hub names or live models. Nothing is trained here, and what cannot be merged exactly is refused.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
