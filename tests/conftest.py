"""Small real students, real PEFT adapters and real configs, made once a session."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# the cores are few and the matrices small; more threads also change the order of sums
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mot_lora.config import Config, demo_path, parse_config

torch.set_num_threads(1)


def _save(model: torch.nn.Module, path: Path, **kwargs: Any) -> Path:
    model.to(torch.bfloat16).save_pretrained(path, **kwargs)
    AutoTokenizer.from_pretrained(demo_path("student")).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 in bf16 with tied embeddings, in several shards."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path("student"))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(Qwen3ForCausalLM(config), tmp_path_factory.mktemp("models") / "qwen3", max_shard_size="120KB")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in bf16 with its own output head, in one file."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path("student"))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(LlamaForCausalLM(config), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(params=["qwen3", "llama"])
def student(request: pytest.FixtureRequest) -> Path:
    """Each of the tiny students in turn."""
    return request.getfixturevalue(request.param)


MakeAdapter = Callable[..., Path]


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """Make a real PEFT adapter folder with random A and B: make_adapter(base, name, seed=0, **LoraConfig)."""

    def make(base: Path, name: str, *, seed: int = 0, scale: float = 0.02, **settings: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
        peft_model = get_peft_model(model, LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in peft_model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        peft_model.save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return make


@pytest.fixture
def make_config(tmp_path: Path, qwen3: Path) -> Callable[..., Config]:
    """A small run of two teachers on the tiny Qwen3; keyword arguments replace its settings."""

    def write(name: str, rows: list[dict[str, str]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(path)

    def make(**settings: Any) -> Config:
        teachers = [
            {
                "name": t,
                "data": write(
                    f"{t}.jsonl",
                    [
                        {"question": f"{i} + 1 = ?", "reasoning": f"{t} says {i} + 1 = {i + 1}.", "answer": str(i + 1)}
                        for i in range(24)
                    ],
                ),
            }
            for t in ("a", "b")
        ]
        questions = [{"question": f"{i} + 2 = ?", "answer": str(i + 2)} for i in range(4)]
        tree: dict[str, Any] = {
            "student": str(qwen3),
            "teachers": teachers,
            "rounds": 2,
            "branch": {
                "steps": 2,
                "batch_size": 2,
                "gradient_accumulation": 2,
                "learning_rate": 1e-2,
                "max_length": 128,
            },
            "lora": {"r": 4, "alpha": 8},
            "eval": {"data": write("questions.jsonl", questions), "max_new_tokens": 4, "holdout": 0.2},
            "device": "cpu",
            "output": str(tmp_path / "run"),
        }
        return parse_config({**tree, **settings}, "test")

    return make
