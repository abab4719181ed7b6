"""How a branch computes on a false GPU: in 16 bits, with an int8 base that keeps nothing, and with logits in fp32."""

from pathlib import Path
from typing import Any, cast

import falsecuda
import torch
from false_gpu import false_gpu
from torch import Tensor

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import BranchConfig, LoraConfig
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Example
from mot_lora.training.adapter import add_adapter, reset_adapter
from mot_lora.training.attention import REPEATED
from mot_lora.training.branch import fast_layers, set_checkpoints, train
from mot_lora.training.loss import batch_loss, logits, token_log_probs
from mot_lora.training.student import dtype_of, load_model

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
T4 = {"name": "Tesla T4", "gib": 16, "capability": "7.5"}


def new_model(path: Path, quantization: str, device: torch.device) -> Any:
    model = add_adapter(load_model(Checkpoint.open(path), quantization, device), LoraConfig(r=4, alpha=8))
    reset_adapter(model, 0)
    return model


def traces(count: int, length: int) -> list[Example]:
    drawn = torch.randint(4, 60, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example.after(tuple(row), 3) for row in drawn]


def trained(path: Path, quantization: str, device: torch.device) -> dict[str, Tensor]:
    """The update of each layer, B @ A, after four steps that move each entry of the factors by about the rate."""
    model = new_model(path, quantization, device)
    settings = BranchConfig(
        steps=4, batch_size=2, gradient_accumulation=2, learning_rate=1e-2, schedule="constant", warmup=0
    )
    train(model, load_tokenizer(path), traces(16, 24), settings, seed=0)
    state = {n: p.detach().float().cpu() for n, p in model.named_parameters() if "lora_" in n}
    return {n: state[n.replace("lora_A", "lora_B")] @ a for n, a in state.items() if "lora_A" in n}


def train_as_on_a_cpu(path: Path, quantization: str) -> None:
    want = trained(path, quantization, CPU)
    for name, update in trained(path, quantization, GPU).items():
        # Adam's first steps are signs: rounding tips those of entries without a gradient, not the rest. A step that a
        # scaler has left out would be missing from all of them.
        assert torch.cosine_similarity(update.flatten(), want[name].flatten(), 0) > 0.97
        assert 0.9 < float(update.norm() / want[name].norm()) < 1.1


@false_gpu(**T4)
def test_fp16_with_a_scaler_trains_what_fp32_does(qwen3: Path) -> None:
    for quantization in ("nf4", "int8", "none"):
        model = load_model(Checkpoint.open(qwen3), quantization, GPU)
        assert dtype_of(GPU) == model.dtype == torch.float16
        assert model.config._attn_implementation == REPEATED
        train_as_on_a_cpu(qwen3, quantization)


@false_gpu()
def test_bf16_trains_what_fp32_does(qwen3: Path) -> None:
    model = load_model(Checkpoint.open(qwen3), "nf4", GPU)
    assert dtype_of(GPU) == model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"
    train_as_on_a_cpu(qwen3, "nf4")


@false_gpu()
def test_an_int8_base_keeps_what_an_nf4_one_does(qwen3: Path) -> None:
    kept: dict[str, int] = {}
    for quantization in ("nf4", "int8"):
        model = new_model(qwen3, quantization, GPU)
        base = model.get_base_model()
        settings = BranchConfig()
        set_checkpoints(base, settings)
        base.train()
        ids = torch.randint(4, 60, (1, 512), generator=torch.Generator().manual_seed(0)).to(GPU)
        with fast_layers(model, settings):
            before = falsecuda.held()
            loss, _ = batch_loss(base, {"input_ids": ids, "labels": ids}, 64)
            kept[quantization] = falsecuda.held() - before
            loss.backward()
        del loss, model, base
    assert kept["int8"] == kept["nf4"]


@false_gpu()
def test_logits_are_not_rounded_to_16_bits(qwen3: Path) -> None:
    model = load_model(Checkpoint.open(qwen3), "none", GPU)
    head = cast("torch.nn.Linear", model.get_output_embeddings())
    hidden = torch.randn(32, head.in_features, generator=torch.Generator().manual_seed(0)).to(GPU, torch.bfloat16) * 8
    exact = hidden.double() @ head.weight.double().t()
    found = logits(head, hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert float((head(hidden).double() - exact).detach().abs().max()) > 1e-3
    ids = torch.randint(4, 60, (2, 16), generator=torch.Generator().manual_seed(1)).to(GPU)
    said = token_log_probs(model, {"input_ids": ids, "labels": ids}, chunk=5)
    assert said.shape == (30,)
    assert (said < 0).all()
