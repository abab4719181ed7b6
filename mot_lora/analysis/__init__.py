"""Analysis: questions asked of finished runs: is merging worth it, what do teachers agree on, what do benchmarks say.

It reads runs through their folders and starts them through the loop. It answers with records, never with pages.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
