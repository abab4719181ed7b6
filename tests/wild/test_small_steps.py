"""Few steps: none of them is spent at a learning rate of 0.

PrimeIntellect-ai/prime-rl#968, axolotl-ai-cloud/axolotl#2897.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_branch import new_model, settings
from transformers import PreTrainedTokenizerBase
from wild import jsonl, recipe, rows
from wild import student as make_student

from mot_lora import load_config
from mot_lora.data.encoding import encode
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Example, Trace
from mot_lora.errors import DivergedError
from mot_lora.runs.distillation import run
from mot_lora.training.branch import train
from mot_lora.training.trainer import rate_share

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine


@pytest.fixture(scope="module")
def tokenizer(qwen3: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(qwen3)


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    return [encode(tokenizer, Trace(({"role": "user", "content": f"{i}?"},), f"{i}")) for i in range(4)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 100])
@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 0.99])
def test_every_step_trains_and_one_at_the_full_rate(schedule: str, steps: int, share: float) -> None:
    warmup = math.ceil(share * steps)  # as transformers counts them
    rates = [rate_share(i, steps, warmup, schedule) for i in range(steps)]
    assert min(rates) > 0
    assert max(rates) == 1
    assert rates[:warmup] == [(i + 1) / warmup for i in range(warmup)]
    assert rates[max(warmup - 1, 0) :] == sorted(rates[max(warmup - 1, 0) :], reverse=True)


@pytest.mark.parametrize(
    ("steps", "want"),
    [(1, [1]), (2, [1, 0.5]), (5, [1, 0.905, 0.655, 0.345, 0.095])],
)
def test_the_default_warm_up_of_few_steps(steps: int, want: list[float]) -> None:
    assert [rate_share(i, steps, 1, "cosine") for i in range(steps)] == pytest.approx(want, abs=1e-3)


def test_a_run_of_one_step_with_the_defaults_changes_the_student(tmp_path: Path) -> None:
    make_student(tmp_path / "base")
    data = jsonl(tmp_path / "t.jsonl", rows())
    record = run(load_config(recipe(tmp_path, tmp_path / "base", data, branch={"steps": 1, "learning_rate": 1e-2})))
    adapter = load_file(tmp_path / "run/round-001/t/adapter_model.safetensors")
    # AdamW's first step moves every entry that has a gradient by the whole learning rate
    assert max(float(t.abs().max()) for k, t in adapter.items() if "lora_B" in k) == pytest.approx(1e-2, rel=1e-2)
    assert record.rounds[0].fold.relative_norm > 0


def test_a_part_of_an_epoch_is_a_step_that_trains(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    model = new_model(qwen3)
    record = train(model, tokenizer, examples, settings(epochs=0.1, warmup=0.1), seed=0)
    assert record.steps == 1
    assert any(p.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_a_branch_that_no_step_changed_says_so(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    with pytest.raises(DivergedError, match=r"no step changed the adapter: raise its learning_rate, now 1e-60$"):
        train(new_model(qwen3), tokenizer, examples, settings(steps=1, learning_rate=1e-60), seed=0)


def test_steps_that_all_overflow_in_fp16_are_told(
    qwen3: Path, tokenizer: PreTrainedTokenizerBase, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaler leaves out a step whose gradients overflow, silently; the first ones often do."""

    def overflow(*_: Any) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.fill_(math.inf)

    model = new_model(qwen3, "none").to(torch.float16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    monkeypatch.setattr("mot_lora.training.trainer.BranchTrainer._clip_grad_norm", overflow)
    with pytest.raises(DivergedError, match=r"no step changed the adapter.*fp16.*give it more steps"):
        train(model, tokenizer, examples, settings(steps=1), seed=0)
