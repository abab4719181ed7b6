"""Liger's fused kernels (https://github.com/linkedin/Liger-Kernel) in one model's layers, for a while."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from peft import PeftModel
from transformers.utils.import_utils import is_liger_kernel_available

from mot_lora.errors import UserError

# the loss has its own chunks, and never calls the model's forward, in which Liger's would be
KERNELS = {"rope": True, "swiglu": True, "rms_norm": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def uses_liger(asked: str, is_gpu: bool) -> bool:
    """Whether training takes Liger's kernels: `branch.liger` on, off, or auto, which is on a GPU where they are there.

    Errors: UserError where they are asked for, and are not installed or there is no GPU.

    >>> uses_liger("auto", is_gpu=False)
    False
    """
    there = is_liger_kernel_available() and find_spec("triton") is not None
    if asked == "on" and not is_gpu:
        raise UserError("branch.liger: its kernels need a CUDA GPU, and the device is `cpu`; set it to auto or off")
    if asked == "on" and not there:
        raise UserError("branch.liger needs the package liger-kernel: pip install liger-kernel, or set it to auto")
    return asked == "on" or (asked == "auto" and is_gpu and there)


@contextmanager
def fused(model: PeftModel) -> Generator[None]:
    """Within it a model's norms, rotary embeddings and gated MLPs are Liger's, where Liger knows the model.

    Liger replaces names in transformers' modules even where it is given one model, and every other model of that kind
    would call them too, a planned one among them: all is as it was before when the block ends.
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
            for place, said in zip(places, before, strict=True):
                changed += [(place, n, said.get(n, place)) for n, v in place.items() if said.get(n, place) is not v]
        yield
    finally:
        for place, name, value in changed:
            if value is place:  # it was not there
                del place[name]
            else:
                place[name] = value
