"""Runs: the loop of Merge-of-Thought distillation, its folder on disk, and a round's student as a checkpoint.

A run is a ledger of small adapters: everything else is computed from them. It never writes its own page; the packages
above do.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
