"""Merge-of-Thought distillation (arXiv 2509.08814): merge PEFT adapters right, fold them exactly, run the loop."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mot_lora.adapters import adapter_from_peft, load_adapter, save_adapter
    from mot_lora.base import fold_checkpoint
    from mot_lora.config import Config, load_config
    from mot_lora.errors import UserError
    from mot_lora.export import export
    from mot_lora.lowrank import Adapter, Factors
    from mot_lora.merge import METHODS, dare_linear, dare_ties, linear, ties
    from mot_lora.merged import Merged, merge_adapters
    from mot_lora.records import EvaluationRecord, RunRecord, TrainRecord
    from mot_lora.rounds import run

# On a CPU bitsandbytes suggests, while it is imported, a package that would fetch kernels from a hub at run time.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)

_ROOMS = {
    "adapters": ("adapter_from_peft", "load_adapter", "save_adapter"),
    "base": ("fold_checkpoint",),
    "config": ("Config", "load_config"),
    "errors": ("UserError",),
    "export": ("export",),
    "lowrank": ("Adapter", "Factors"),
    "merge": ("METHODS", "dare_linear", "dare_ties", "linear", "ties"),
    "merged": ("Merged", "merge_adapters"),
    "records": ("EvaluationRecord", "RunRecord", "TrainRecord"),
    "rounds": ("run",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "METHODS",
    "Adapter",
    "Config",
    "EvaluationRecord",
    "Factors",
    "Merged",
    "RunRecord",
    "TrainRecord",
    "UserError",
    "adapter_from_peft",
    "dare_linear",
    "dare_ties",
    "export",
    "fold_checkpoint",
    "linear",
    "load_adapter",
    "load_config",
    "merge_adapters",
    "run",
    "save_adapter",
    "ties",
]


def __getattr__(name: str) -> Any:
    """Load a room when a name of it is first asked for, so that `import mot_lora` is fast."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module `mot_lora` has no attribute `{name}`")
    value = getattr(import_module(f"mot_lora.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value
