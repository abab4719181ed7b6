"""Liger's fused kernels (https://github.com/linkedin/Liger-Kernel) in one model's layers, while it trains."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from peft import PeftModel
from transformers.utils.import_utils import is_liger_kernel_available

from mot_lora.errors import UserError

# without Liger's losses: the chunked loss never calls the model's forward, which they would replace
KERNELS = {"rope": True, "swiglu": True, "rms_norm": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def uses_liger(setting: str, is_gpu: bool) -> bool:
    """Whether training uses Liger's kernels: `branch.liger` on, off, or auto: on with a GPU and the package installed.

    Errors: UserError for `on` without a GPU or without the package.

    >>> uses_liger("auto", is_gpu=False)
    False
    """
    installed = is_liger_kernel_available() and find_spec("triton") is not None
    if setting == "on" and not is_gpu:
        raise UserError("branch.liger: its kernels need a CUDA GPU, and the device is `cpu`; set it to auto or off")
    if setting == "on" and not installed:
        raise UserError("branch.liger needs the package liger-kernel: pip install liger-kernel, or set it to auto")
    return setting == "on" or (setting == "auto" and is_gpu and installed)


@contextmanager
def fused(model: PeftModel) -> Generator[None]:
    """Within the block a model's norms, rotary embeddings and gated MLPs are Liger's, if Liger supports the model.

    Even for a single model Liger replaces functions in transformers' modules, which would affect every other model of
    that kind, such as the planner's; the end of the block restores them.
    """
    apply = import_module("liger_kernel.transformers.monkey_patch")._apply_liger_kernel_to_instance
    base: Any = model.get_base_model()
    sources = sorted({type(m).__module__ for m in base.modules()})
    places: list[dict[str, Any]] = [m.__dict__ for m in base.modules()]
    places += [vars(sys.modules[name]) for name in sources if name.startswith("transformers.")]
    before = [dict(place) for place in places]
    changed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        try:
            apply(model=base, **KERNELS)
        finally:
            for place, old in zip(places, before, strict=True):
                changed += [(place, n, old.get(n, place)) for n, v in place.items() if old.get(n, place) is not v]
        yield
    finally:
        for place, name, value in changed:
            if value is place:  # the name did not exist before
                del place[name]
            else:
                place[name] = value
