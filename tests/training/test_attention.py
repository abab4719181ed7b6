"""Attention with repeated keys and values: the same as with shared ones, in training and for answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mot_lora.training.attention import REPEATED, needs_repeating, repeat_shared_heads


@pytest.mark.parametrize(("capability", "needs"), [((7, 0), True), ((7, 5), True), ((8, 0), False), ((12, 0), False)])
def test_gpus_before_ampere_share_no_heads(capability: tuple[int, int], needs: bool) -> None:
    assert needs_repeating(capability) == needs


def test_repeated_heads_give_the_same_logits_gradients_and_answers(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    real = torch.nn.functional.scaled_dot_product_attention
    shared: list[bool] = []

    def spy(q: Any, k: Any, v: Any, **settings: Any) -> Any:
        shared.append(q.shape[1] != k.shape[1])
        return real(q, k, v, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    found: list[list[torch.Tensor]] = []
    for _ in range(2):
        model.zero_grad()
        shared.clear()
        logits = model(input_ids=ids, use_cache=False).logits
        logits.sum().backward()
        used = any(shared)
        answer = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters()), answer])
        assert used == (len(found) == 1)
        repeat_shared_heads(model)
        assert model.config._attn_implementation == REPEATED
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_model_with_attention_of_its_own_is_left_alone(qwen3: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(qwen3, attn_implementation="eager")
    repeat_shared_heads(model)
    assert model.config._attn_implementation == "eager"
