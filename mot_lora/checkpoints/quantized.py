"""Whether stored weights are quantized: by the format of their numbers, and by the tensors beside them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

SETTINGS = ("quantization_config", "compression_config", "quantization")  # in a config; the last is MLX's
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)
# The last part of a tensor's name, and who writes such tensors.
WRITTEN_BY = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors, FP8, ModelOpt or BitNet",
    "weight_scale_inv": "FP8",
    "weight_scale_2": "ModelOpt",
    "weight_zero_point": "compressed-tensors",
    "weight_scales": "EETQ",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "Qidxs": "QuIP#",
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "weight_qdata": "torchao",
    "qdata": "torchao",
    "data": "Quanto",
    "centroids": "VPTQ",
    "dense_weights": "SpQR",
}


def why_quantized(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> str | None:
    """The sign that weights are stored quantized: a tensor and its format, or its maker; None where there is none.

    tensors: the format and shape of each.

    >>> why_quantized({"up_proj.weight": (torch.float8_e4m3fn, (4, 4))})
    'up_proj.weight is float8_e4m3fn'
    """
    for name in sorted(tensors):
        dtype, shape = tensors[name]
        last = re.split("[.:]", name)[-1].removeprefix("_")
        is_float8 = dtype.is_floating_point and dtype.itemsize == 1
        if is_float8 or (dtype in INTEGERS and len(shape) > 1 and last.endswith(("weight", "_proj", "_blocks"))):
            return f"{name} is {str(dtype).removeprefix('torch.')}"
        if last in WRITTEN_BY:
            return f"{name} is of {WRITTEN_BY[last]}"
    return None


def method_of(config: Mapping[str, Any]) -> str | None:
    """The quantization that a config names, which may have been undone since; None for none.

    >>> method_of({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'gptq'
    """
    for key, value in config.items():
        if key in SETTINGS and value:
            said = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
            return str(said.get("quant_method", key))
        if key.endswith("_config") and isinstance(value, dict) and (inner := method_of(cast("dict[str, Any]", value))):
            return inner
    return None


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without its quantization, also in the configs inside it."""
    return {
        key: without(cast("dict[str, Any]", value)) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in SETTINGS
    }
