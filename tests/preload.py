"""What the processes of `forks` are forked from: most imports, and nothing of them looked through for garbage."""

import gc
import importlib

for name in (
    "conftest",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "mot_lora.cli.app",
    "mot_lora.data.select",
    "mot_lora.reports.display",
    "mot_lora.reports.publish",
    "mot_lora.runs.distillation",
    "transformers.trainer",
):
    importlib.import_module(name)
gc.collect()
gc.freeze()
