"""Merge-of-Thought distillation (arXiv 2509.08814): merge PEFT adapters right, fold them exactly, run the loop."""

import logging
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mot_lora.adapters import load_adapter
    from mot_lora.compare import compare
    from mot_lora.comparison import ArmRun, Comparison, summarize
    from mot_lora.config import Config
    from mot_lora.consensus import consensus
    from mot_lora.display import live
    from mot_lora.errors import UserError
    from mot_lora.export import export, export_adapter
    from mot_lora.fold import fold_checkpoint
    from mot_lora.harness import HarnessRecord, evaluate_run
    from mot_lora.inspection import inspect_adapters
    from mot_lora.live import adapter_from_peft, add_merged_adapter
    from mot_lora.lowrank import Adapter, Dense, Factors
    from mot_lora.merge import METHODS, dare_linear, dare_ties, della, linear, sce, ties
    from mot_lora.merged import Merged
    from mot_lora.pack import save_adapter
    from mot_lora.reader import load_config
    from mot_lora.records import (
        EvaluationRecord,
        ExportRecord,
        InspectRecord,
        RunRecord,
        SaveRecord,
        TrainRecord,
        VerifyRecord,
    )
    from mot_lora.rounds import run, stages
    from mot_lora.sources import merge_adapters
    from mot_lora.tables import table
    from mot_lora.verify import verify_checkpoint

# On a CPU bitsandbytes suggests, while it is imported, a package that would fetch kernels from a hub at run time.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)

_ROOMS = {
    "adapters": ("load_adapter",),
    "compare": ("compare",),
    "comparison": ("ArmRun", "Comparison", "summarize"),
    "config": ("Config",),
    "consensus": ("consensus",),
    "display": ("live",),
    "reader": ("load_config",),
    "errors": ("UserError",),
    "export": ("export", "export_adapter"),
    "fold": ("fold_checkpoint",),
    "harness": ("HarnessRecord", "evaluate_run"),
    "inspection": ("inspect_adapters",),
    "live": ("adapter_from_peft", "add_merged_adapter"),
    "lowrank": ("Adapter", "Dense", "Factors"),
    "merge": ("METHODS", "dare_linear", "dare_ties", "della", "linear", "sce", "ties"),
    "merged": ("Merged",),
    "pack": ("save_adapter",),
    "records": (
        "EvaluationRecord",
        "ExportRecord",
        "InspectRecord",
        "RunRecord",
        "SaveRecord",
        "TrainRecord",
        "VerifyRecord",
    ),
    "rounds": ("run", "stages"),
    "sources": ("merge_adapters",),
    "tables": ("table",),
    "verify": ("verify_checkpoint",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "METHODS",
    "Adapter",
    "ArmRun",
    "Comparison",
    "Config",
    "Dense",
    "EvaluationRecord",
    "ExportRecord",
    "Factors",
    "HarnessRecord",
    "InspectRecord",
    "Merged",
    "RunRecord",
    "SaveRecord",
    "TrainRecord",
    "UserError",
    "VerifyRecord",
    "adapter_from_peft",
    "add_merged_adapter",
    "compare",
    "consensus",
    "dare_linear",
    "dare_ties",
    "della",
    "evaluate_run",
    "export",
    "export_adapter",
    "fold_checkpoint",
    "inspect_adapters",
    "linear",
    "live",
    "load_adapter",
    "load_config",
    "merge_adapters",
    "run",
    "save_adapter",
    "sce",
    "stages",
    "summarize",
    "table",
    "ties",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Load a room when a name of it is first asked for, so that `import mot_lora` is fast."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module `mot_lora` has no attribute `{name}`")
    value = getattr(import_module(f"mot_lora.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps a public function that has the name of a room, `export`, from being hidden when that room is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _ROOM_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
