"""Kernels without data: the memory of attention, quantized products and Liger's operations, computed from shapes."""

import importlib.util
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv

# --- attention -----------------------------------------------------------------------------------

Attention = Literal["cuda", "repeated", "cpu"]
"""The kernel of attention, always one without a score matrix: `cuda` is FlashAttention-2, `repeated` the
memory-efficient one before Ampere, with keys and values repeated for each head, `cpu` the CPU's."""


def register_attention(kind: Attention) -> str:
    """Register attention of this kind, without data, with transformers; return its name."""
    name = f"planned_{kind}"
    AttentionInterface.register(name, partial(_attention, kind=kind))
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    return name


def _attention(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *__: Any, kind: Attention, **___: Any) -> Any:
    if q.shape[2] > 1 and kind == "repeated":
        k, v = (repeat_kv(x, q.shape[1] // x.shape[1]) for x in (k, v))
    return cast("Tensor", _Attention.apply(q, k, v, kind)).transpose(1, 2).contiguous(), None


@torch.library.custom_op("mot_lora::attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError  # only shapes are computed


@_attend.register_fake
def _(q: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("mot_lora::attention_backward", mutates_args=())
def _attend_backward(q: Tensor, k: Tensor, v: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    raise NotImplementedError


@_attend_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    scratch: list[Tensor] = []
    if kind != "cpu":  # q's gradient accumulates in fp32, in blocks; those of shared keys and values are per head
        batch, heads, tokens, width = q.shape
        block, wide = (128, _up(width, 32 if width <= 128 else 64)) if kind == "cuda" else (64, width)
        scratch = [q.new_empty(batch, heads, _up(tokens, block), wide + 1, dtype=torch.float32)]
        scratch += [torch.empty_like(q), torch.empty_like(q)] if heads != k.shape[1] else []
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), scratch


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


@register_flop_formula(torch.ops.mot_lora.attention)
def _forward_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    batch, heads, tokens, width = q
    seen = tokens if tokens == k[2] else 2 * k[2]  # half of both products is masked, except when decoding
    return 2 * batch * heads * tokens * seen * width


@register_flop_formula(torch.ops.mot_lora.attention_backward)
def _backward_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    return 5 * _forward_flops(q, k) // 2


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
        output, sums = _attend(q, k, v)
        ctx.save_for_backward(q, k, v, output, sums)
        ctx.kind = kind
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        q, k, v, *_rest = ctx.saved_tensors
        return *_attend_backward(q, k, v, ctx.kind)[:3], None


# --- bitsandbytes --------------------------------------------------------------------------------


def _product_4bit(x: Tensor, codes: Tensor, shape: Any, absmax: Tensor, block: int, kind: str, *rest: Any) -> Tensor:
    """A Linear4bit with many tokens: it dequantizes its weight to x's dtype, then takes one product."""
    ops: Any = torch.ops.bitsandbytes
    bias, quantized, code, offset = rest
    scales = ops.dequantize_blockwise(quantized, absmax, code, 256, torch.float32) + offset
    weight = ops.dequantize_4bit(codes, scales, block, kind, shape, x.dtype)
    flat = torch.mm(x.flatten(0, -2), weight.t())  # as `linear`, whose operations are not counted here
    return (flat if bias is None else flat.add_(bias)).unflatten(0, x.shape[:-1])


def _quantize_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """How a Linear8bitLt quantizes its input, without outliers."""
    outliers = x.abs() >= threshold  # held until the rows exist
    rows = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)
    del outliers
    return *rows, x.new_empty(0) if threshold else None


def _product_8bit(
    x: Tensor, rows: Tensor, codes: Tensor, _rows: Tensor, _columns: Tensor, _outliers: Any = None, bias: Any = None
) -> tuple[Tensor, Tensor]:
    """Sums of int8 products, scaled in fp16, then converted to x's dtype."""
    sums = _multiply(rows, codes)
    scaled = torch.empty_like(sums, dtype=torch.float16)
    if bias is not None:
        scaled.add_(bias)
    return scaled.to(x.dtype), x.new_empty(0)


@torch.library.custom_op("mot_lora::int8_product", mutates_args=())
def _multiply(rows: Tensor, codes: Tensor) -> Tensor:
    raise NotImplementedError


@_multiply.register_fake
def _(rows: Tensor, codes: Tensor) -> Tensor:
    return rows.new_empty(len(rows), len(codes), dtype=torch.int32)


@register_flop_formula(torch.ops.mot_lora.int8_product)
def _product_flops(rows: Any, codes: Any, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * rows[1] * codes[0]


# bitsandbytes' operations, as its CUDA library computes them
PRODUCTS: Mapping[str, Callable[..., Any]] = {
    "bitsandbytes::gemm_4bit": _product_4bit,
    "bitsandbytes::int8_vectorwise_quant": _quantize_rows,
    "bitsandbytes::int8_mixed_scaled_mm": _product_8bit,
}


# --- Liger ---------------------------------------------------------------------------------------

# students whose norms, rotary embeddings and gated MLPs Liger computes as below; others are planned without it
LIGER = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@contextmanager
def fused_without_data(base: Any) -> Generator[None]:
    """Within the block a planned model takes the memory that it would with Liger's kernels (liger-kernel 0.8.5)."""
    if base.config.model_type not in LIGER:
        yield
        return
    modeling: Any = sys.modules[type(base).__module__]
    norms = [m for m in base.modules() if type(m).__name__.endswith("RMSNorm")]
    mlps = [m for m in base.modules() if hasattr(m, "gate_proj") and hasattr(m, "up_proj")]
    rotate = modeling.apply_rotary_pos_emb
    for norm in norms:
        norm.forward = partial(_Norm.apply, norm.weight)
    for mlp in mlps:
        mlp.forward = partial(_gated, mlp)
    modeling.apply_rotary_pos_emb = lambda q, k, cos, sin, **_: _Rotate.apply(q, k, cos, sin)
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = rotate
        for module in (*norms, *mlps):
            del module.forward


def _gated(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(_Gate.apply(mlp.gate_proj(x), mlp.up_proj(x)))


class _Norm(torch.autograd.Function):
    """Saves its input and one number a row; the gradient overwrites the upstream one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        _x, _weight, _sums = ctx.saved_tensors
        return None, upstream[0].contiguous()


class _Rotate(torch.autograd.Function):
    """Overwrites its inputs, forward and backward, and saves only the angles."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return tuple(_by_token(x) for x in (q, k))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        _cos, _sin = ctx.saved_tensors
        return *(_by_token(x) for x in upstream), None, None


def _by_token(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class _Gate(torch.autograd.Function):
    """silu(a) b: saves both, and overwrites them with their gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.empty_like(a)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        upstream[0].contiguous()
        return tuple(x.view_as(x) for x in ctx.saved_tensors)


# --- undoing patches -----------------------------------------------------------------------------


@contextmanager
def as_released(modeling: ModuleType) -> Generator[None]:
    """Within the block a module of transformers has its original classes and functions, without patches.

    Liger and others replace them for the whole process with versions that need a GPU.
    """
    spec = importlib.util.find_spec(modeling.__name__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    own = {name: value for name, value in vars(fresh).items() if _made_in(value) == modeling.__name__}
    changed = {name: value for name, value in vars(modeling).items() if name in own and _is_other(value, own[name])}
    vars(modeling).update({name: own[name] for name in changed})
    try:
        yield
    finally:
        vars(modeling).update(changed)


def _made_in(value: object) -> str | None:
    return getattr(value, "__module__", None)


def _is_other(value: object, own: object) -> bool:
    return any(getattr(value, key, None) != getattr(own, key, None) for key in ("__module__", "__qualname__"))
