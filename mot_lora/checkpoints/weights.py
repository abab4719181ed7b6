"""One layer's weights in memory, in whatever format it has: NF4, int8, or plain."""

from typing import Any, cast

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.autograd._functions import MatmulLtState
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import BitsAndBytesConfig


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What transformers takes for nf4 (with double quantization), int8 or none; nf4 layers compute in `dtype`."""
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "int8" else None


def dense(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weights, dequantized, [out, in] in `dtype`; what is in it already is not copied."""
    weight = cast("Any", layer.weight)
    if isinstance(layer, Linear4bit):
        return bnb.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    if isinstance(layer, Linear8bitLt):
        codes, scales = _int8(layer)
        # multiplied in fp32, and rounded once: nothing of 4 bytes an entry is made on a GPU
        return torch.mul(codes, scales.float().div(127)[:, None], out=torch.empty_like(codes, dtype=dtype))
    return weight.detach().to(dtype)


def read_weight(layer: nn.Module) -> Tensor:
    """The weights that a linear layer computes with, dequantized, [out, in] in fp32."""
    return dense(layer, torch.float32)


def write_weight(layer: nn.Module, value: Tensor) -> None:
    """Round fp32 weights [out, in] once, to the format that the layer has, in place.

    In place, since new buffers would fragment the heap, the more the larger the model.
    """
    weight = cast("Any", layer.weight)
    value = value.to(weight.device)
    if isinstance(layer, Linear4bit):
        codes, state = cast("Any", bnb).quantize_4bit(
            value.float().contiguous(),
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
        )
        weight.data.copy_(codes)
        for old, new in zip(_statistics(weight.quant_state), _statistics(state), strict=True):
            old.copy_(new)
    elif isinstance(layer, Linear8bitLt):
        codes, scales, _ = bnb.int8_vectorwise_quant(value.half())
        for old, new in zip(_int8(layer), (codes, scales), strict=True):
            old.copy_(new)
    else:
        with torch.no_grad():
            weight.copy_(value)


def _int8(layer: Linear8bitLt) -> tuple[Tensor, Tensor]:
    """Codes and scales, which the layer takes from its weight at its first forward."""
    weight, state = cast("Any", layer.weight), cast("Any", layer.state)
    return (weight.CB, weight.SCB) if weight.CB is not None else (state.CB, state.SCB)


def _statistics(state: Any) -> list[Tensor]:
    """What an NF4 weight's codes are scaled by."""
    return [state.absmax, *((state.offset, state.state2.absmax) if state.nested else ())]


def release_weight(layer: nn.Module) -> None:
    """Free what a layer's quantized weight is read with, beside the codes, which are its parameter."""
    weight = cast("Any", getattr(layer, "weight", None))
    if isinstance(layer, Linear4bit) and weight.quant_state is not None:
        state = weight.quant_state
        state.absmax = state.offset = state.code = state.state2 = None
    elif isinstance(layer, Linear8bitLt):
        weight.CB = weight.SCB = None
        layer.state = MatmulLtState()
