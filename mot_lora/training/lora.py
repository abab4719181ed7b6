"""A LoRA layer's forward and backward pass in training, with as few passes over large tensors as possible."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mot_lora.checkpoints.weights import dense


class LoraProduct(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T, with W dequantized on the fly and never kept.

    x: [..., in]; W: the layer's weight, [out, in], in NF4, int8 or 16 or 32 bits, without gradient; A: [r, in],
    B: [out, r]. All is computed in x's dtype, or autocast's if it is on; gradients of A and B are in their own dtype.
    The update is added to the product in place, forward and backward, so that only matrix products read or write
    tensors of y's or x's size. Saved for the backward pass: x, and x A^T.

    >>> LoraProduct.apply(x, a, b, layer, scaling)  # doctest: +SKIP
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: nn.Module, scaling: float) -> Tensor:
        flat = x.flatten(0, -2)
        inner = flat @ a.to(x.dtype).t()
        ctx.layer, ctx.scaling = layer, scaling
        ctx.save_for_backward(x, inner, a, b)
        weight = dense(layer, x.dtype).t()
        bias = cast("Tensor | None", layer.bias)
        y = flat @ weight if bias is None else torch.addmm(bias.to(x.dtype), flat, weight)
        del weight
        return torch.addmm(y, inner, b.to(x.dtype).t(), alpha=scaling, out=y).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        x, inner, a, b = ctx.saved_tensors
        grad = upstream[0].flatten(0, -2)
        by_inner = (grad @ b.to(x.dtype)).mul_(ctx.scaling)
        by_a = (by_inner.t() @ x.flatten(0, -2)).to(a.dtype)
        by_b = (grad.t() @ inner).to(b.dtype).mul_(ctx.scaling)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = grad @ dense(ctx.layer, x.dtype)
            by_x = torch.addmm(by_x, by_inner, a.to(x.dtype), out=by_x).view(x.shape)
        return by_x, by_a, by_b, None, None


@contextmanager
def one_product(model: PeftModel) -> Generator[None]:
    """Within the block every plain LoRA layer (one adapter, no dropout, a linear layer) computes as a LoraProduct.

    PEFT's own forward reads and writes a layer's output three more times, and bitsandbytes' int8 product keeps its
    input out of reach of checkpointing and offloading.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and _is_plain(m)]
    for layer in layers:
        layer.forward = _forward.__get__(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any, x: Tensor) -> Tensor:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return cast("Any", LoraProduct).apply(x, a, b, layer.get_base_layer(), layer.scaling[name])


def _is_plain(layer: Any) -> bool:
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or layer.merged or layer.disable_adapters:
        return False
    return (
        isinstance(layer.get_base_layer(), nn.Linear)
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and names[0] not in layer.lora_variant
        and layer.lora_B[names[0]].bias is None
    )
