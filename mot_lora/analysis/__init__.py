"""Analysis of finished runs: is merging worth it, what do teachers agree on, how does the student do on benchmarks.

It reads runs from their folders and starts them through the loop. Its results are records, never pages.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
