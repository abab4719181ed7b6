"""Runs: the loop of Merge-of-Thought distillation, the run folder, and the export of a round's student.

A run is a ledger of small adapters; everything else is computed from them. This package never writes a run's page:
the packages above do.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
