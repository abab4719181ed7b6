"""Attention on GPUs before Ampere: keys and values repeated, so that a kernel takes them that makes no scores."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

REPEATED = "sdpa_repeated"


def needs_repeating(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability has no kernel for keys and values that several heads share.

    torch's FlashAttention needs 8.0 (Ampere), its memory-efficient kernel takes as many heads of keys as of queries.

    >>> needs_repeating((7, 5))
    True
    """
    return capability < (8, 0)


def repeat_shared_heads(model: Any) -> None:
    """Have a model that computes attention by torch's SDPA hand it keys and values once for each head of queries.

    Without that whole score matrices are made where no mask is given, [heads, length, length].
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
        # to an object without num_key_value_groups nothing is shared any more
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True), training=module.training)
        key, value = repeat_kv(key, heads), repeat_kv(value, heads)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
