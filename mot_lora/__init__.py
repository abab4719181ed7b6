"""Merge-of-Thought distillation (arXiv 2509.08814): merge PEFT adapters right, fold them exactly, run the loop.

The packages, one below the other: cli, reports, analysis, runs, planning, training and adapters, data and checkpoints,
merging. Each imports only from below it, and from the modules beside this file. The names handed on here, in
`__init__.pyi`, are loaded when they are first asked for.
"""

import logging

import lazy_loader

# On a CPU bitsandbytes suggests, while it is imported, a package that would fetch kernels from a hub at run time.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
