"""One layer's weights in memory, in whatever format it has: NF4, int8, or plain."""

from typing import Any, cast

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn


def read_weight(layer: nn.Module) -> Tensor:
    """The weights that a linear layer computes with, dequantized, [out, in] in fp32."""
    weight = cast("Any", layer.weight)
    if isinstance(layer, Linear4bit):
        return bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    if isinstance(layer, Linear8bitLt):
        state = cast("Any", layer.state)
        codes, scales = (weight.CB, weight.SCB) if weight.CB is not None else (state.CB, state.SCB)
        return bnb.int8_vectorwise_dequant(codes, scales).float()
    return weight.detach().float()


def write_weight(layer: nn.Module, value: Tensor) -> None:
    """Round fp32 weights [out, in] once, to the format that the layer has, in place."""
    old = cast("Any", layer.weight)
    if isinstance(layer, Linear4bit):
        new = cast("Any", Params4bit)(
            value.float().contiguous(),
            requires_grad=False,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=layer,
        ).to(old.device)
        new.quant_state.dtype = old.quant_state.dtype
        layer.weight = new
    elif isinstance(layer, Linear8bitLt):
        layer.weight = cast("Any", Int8Params)(value.half(), requires_grad=False, has_fp16_weights=False).to(old.device)
        layer.state.CB = layer.state.SCB = None  # the layer takes them from the new weight at its next forward
    else:
        with torch.no_grad():
            old.copy_(value)
