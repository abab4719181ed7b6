"""Liger's kernels: in one model and for a while; what they compute is seen on a GPU alone."""

import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers.models.qwen3.modeling_qwen3 as modeling
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from mot_lora.config import LoraConfig
from mot_lora.training.adapter import add_adapter
from mot_lora.training.liger import fused
from mot_lora.training.loss import batch_loss


def adapted(path: Path, device: str = "cpu") -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    return add_adapter(model, LoraConfig(r=4, alpha=8))


def states(model: PeftModel) -> list[dict[str, Any]]:
    return [dict(m.__dict__) for m in model.modules()]


def test_all_is_as_before_when_the_block_ends(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # liger-kernel cannot be imported without Triton: this replaces the same names in the same places as it does
    asked: dict[str, Any] = {}

    def apply(model: Any, **kernels: bool) -> None:
        asked.update(kernels)
        modeling.apply_rotary_pos_emb = lambda q, k, *_: (q, k)
        modeling.Qwen3RMSNorm = torch.nn.Identity
        for layer in model.model.layers:
            layer.mlp.__dict__["forward"] = lambda x: x
            layer.input_layernorm.variance_epsilon = 1e-3
            layer.input_layernorm.in_place = True

    package = ModuleType("liger_kernel.transformers.monkey_patch")
    package.__dict__["_apply_liger_kernel_to_instance"] = apply
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", package)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    model = adapted(qwen3)
    before, names = states(model), dict(vars(modeling))
    ids = torch.tensor([[5, 6, 7]])
    want = model(input_ids=ids).logits
    with suppress(KeyboardInterrupt), fused(model):
        assert not torch.equal(model(input_ids=ids).logits, want)
        model.eval()
        raise KeyboardInterrupt
    assert asked == {
        "rope": True,
        "swiglu": True,
        "rms_norm": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    assert dict(vars(modeling)) == names
    for now, was in zip(states(model), before, strict=True):
        assert now.keys() == was.keys()
        assert now.get("variance_epsilon") == was.get("variance_epsilon")
    assert not model.training  # what others changed meanwhile stays
    assert torch.equal(model(input_ids=ids).logits, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gradients_are_those_of_transformers_to_rounding(qwen3: Path) -> None:
    pytest.importorskip("liger_kernel")
    model = adapted(qwen3, "cuda")
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0)).cuda()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        batch_loss(model.get_base_model(), {"input_ids": ids, "labels": ids}, 16)[0].backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    with fused(model):
        got = gradients()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=float(want[name].abs().max()) * 1e-5)
