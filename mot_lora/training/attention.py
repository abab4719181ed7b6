"""Attention on GPUs before Ampere: keys and values are repeated, so that a memory-efficient kernel applies."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

REPEATED = "sdpa_repeated"


def needs_repeating(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability has no fast kernel for keys and values shared by several heads.

    torch's FlashAttention needs 8.0 (Ampere); its memory-efficient kernel needs as many heads of keys as of queries.

    >>> needs_repeating((7, 5))
    True
    """
    return capability < (8, 0)


def repeat_shared_heads(model: Any) -> None:
    """Make a model that uses torch's SDPA pass it keys and values repeated for each head of queries.

    Otherwise SDPA without a mask would compute whole score matrices, [heads, length, length].
    """
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(REPEATED, _repeated)
        AttentionMaskInterface.register(REPEATED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(REPEATED)


def _repeated(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    heads = query.shape[1] // key.shape[1]
    if attention_mask is None and heads > 1:
        # transformers repeats no heads for an object without num_key_value_groups
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True), training=module.training)
        key, value = repeat_kv(key, heads), repeat_kv(value, heads)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
