"""What the plan says beside what whole runs take on a false GPU, with each part of the work as what takes most."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import falsecuda
import pytest
import torch
from false_gpu import false_gpu
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from mot_lora.config import Config
from mot_lora.planning.cards import CONTEXT
from mot_lora.planning.fit import PlanRecord
from mot_lora.planning.need import PROMPT, Part
from mot_lora.reader import demo_path
from mot_lora.runs.distillation import run
from mot_lora.training.offload import SLAB

T4 = {"name": "Tesla T4", "gib": 16, "capability": "7.5"}
CASES: Mapping[str, dict[str, Any]] = {
    "layers": {"words": 200},
    "layers of a small student": {
        "shape": {"hidden_size": 192, "intermediate_size": 512, "head_dim": 32},
        "words": 100,
    },
    "layers, all kept": {"words": 200, "branch": {"activation_checkpointing": False}},
    "layers, offloaded": {"shape": {"num_hidden_layers": 8}, "words": 900, "branch": {"offload": "on"}},
    "layers of a batch in tokens": {"words": 100, "branch": {"batch_tokens": 240}},
    "loss": {"words": 200, "branch": {"loss_chunk": 2048}},
    "losses": {"words": 200, "eval": {"batch_size": 2}},
    "folding": {"shape": {"intermediate_size": 4096}, "words": 20, "branch": {"batch_size": 1}},
    "answering": {"shape": {"num_key_value_heads": 8, "num_hidden_layers": 8}, "words": 40, "asked": 8},
    "answering, drawn": {
        "shape": {"num_key_value_heads": 8},
        "words": 40,
        "asked": 4,
        "eval": {"samples": 2, "temperature": 1.0, "top_p": 0.9},
    },
}
Compare = Callable[..., None]


def within(parts: tuple[Part, ...], phase: str) -> int:
    return sum(p.bytes for p in parts if p.place == "card" and p.phase == phase)


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    """Plans and runs a case: compare(name, **settings of the config)."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path("student"))

    def student(name: str, **shape: int) -> str:
        sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True}
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**{**sizes, **heads, **ends, **shape})).bfloat16().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    def write(name: str, rows: list[dict[str, str]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(tmp_path / name)

    def digits(count: int, by: int = 7) -> str:
        return " ".join(str(by * i % 10) for i in range(count))

    def compared(name: str, **given: Any) -> None:
        case = CASES[name]
        rows = [{"question": f"{i}?", "reasoning": digits(case["words"]), "answer": str(i)} for i in range(12)]
        branch = {"steps": 2, "batch_size": 2, "gradient_accumulation": 2, "loss_chunk": 32, **case.get("branch", {})}
        measured = {"batch_size": 1, "holdout": 0.3, "max_new_tokens": 12, "overlap": 0, **case.get("eval", {})}
        if asked := case.get("asked"):
            question = digits(PROMPT - 10, by=3)
            measured |= {
                "data": write(
                    "questions.jsonl", [{"question": f"{i} {question}", "answer": "1"} for i in range(asked)]
                ),
                "batch_size": asked,
            }
        config = Config.model_validate(
            {
                "student": student(name, **case.get("shape", {})),
                "teachers": [{"name": t, "data": write(f"{t}.jsonl", rows)} for t in "ab"],
                "rounds": 1,
                "branch": branch,
                "lora": {"r": 8},
                "eval": measured,
                "device": "cuda",
                "output": str(tmp_path / f"{name} {given}"),
                **given,
            }
        )
        plans: list[PlanRecord] = []
        torch.cuda.reset_peak_memory_stats()
        run(config, planned=plans.append)
        (plan,) = plans
        phase = name.partition(",")[0].partition(" ")[0]
        others = {"loss": ["layers"], "layers": ["loss"], "losses": ["answering"], "answering": ["losses"]}
        assert within(plan.parts, phase) > max((within(plan.parts, p) for p in others.get(phase, ())), default=0)
        assert (plan.peak - CONTEXT) / falsecuda.peak() == pytest.approx(1, abs=0.03), (name, given, plan.parts)
        if plan.offload:
            (moved,) = [p.bytes for p in plan.parts if "offloaded" in p.name]
            assert moved == SLAB <= falsecuda.pinned_peak() < 1.2 * SLAB
        assert falsecuda.reports() == ""

    return compared


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [n if n in ("layers of a small student", "losses") else pytest.param(n, marks=SLOW) for n in CASES]
)
@false_gpu()
def test_of_an_nf4_student(compare: Compare, name: str) -> None:
    compare(name)


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("folding", "int8"),
        *(pytest.param(n, "int8", marks=SLOW) for n in ("layers", "layers, offloaded", "losses", "answering")),
        *(
            pytest.param(n, "none", marks=SLOW)
            for n in ("layers", "layers, offloaded", "losses", "folding", "answering")
        ),
    ],
)
@false_gpu()
def test_of_int8_and_16_bit_students(compare: Compare, name: str, quantization: str) -> None:
    compare(name, quantization=quantization)


@pytest.mark.slow  # products in fp16 take a CPU long
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("name", ["layers", "answering"])
@false_gpu(**T4)
def test_of_a_card_before_ampere(compare: Compare, name: str, quantization: str) -> None:
    compare(name, quantization=quantization)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "della"])
@false_gpu()
def test_of_other_merges(compare: Compare, method: str) -> None:
    compare("folding", merge={"method": method, "density": 0.5})
