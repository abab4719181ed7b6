"""Small real students, real PEFT adapters and real configs, made once a session."""

import copy
import gc
import hashlib
import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

# the cores are few and the matrices small; more threads also change the order of sums
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import yaml
from false_gpu import (  # noqa: F401
    pytest_itemcollected,
    pytest_pyfunc_call,
    pytest_runtest_setup,
    pytest_unconfigure,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mot_lora.cli.app import main
from mot_lora.config import Config
from mot_lora.interruption import ENDING
from mot_lora.merging.lowrank import Adapter, Factors
from mot_lora.merging.merged import Merged, combine
from mot_lora.reader import demo_path, parse_config

torch.set_num_threads(1)

if sys.platform == "win32":  # about signals, limits, forks and terminals of Unix, which they import
    collect_ignore = [
        "adapters/test_save.py",
        "analysis/test_experiment.py",
        "checkpoints/test_fold.py",
        "checkpoints/test_tensorfile.py",
        "cli/test_cli.py",
        "cli/test_windows.py",
        "cuda",
        "reports/test_display.py",
        "runs/test_distillation.py",
        "runs/test_export.py",
        "runs/test_interruptions.py",
        "test_durable.py",
        "test_fuzz.py",
        "training/test_savepoint.py",
        "wild/test_judge_process.py",
    ]

TIMEOUTS = {"slow": 3600, "gpu": 1800, "false_gpu": 900}  # seconds of the tests with these marks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        limits = [seconds for mark, seconds in TIMEOUTS.items() if item.get_closest_marker(mark)]
        if limits:  # before what the module is marked with
            item.add_marker(pytest.mark.timeout(max(limits)), append=False)


@pytest.fixture
def signals_as_usual() -> Iterator[None]:
    """The signals' usual handlers, here and in what is started: a background job and nohup ignore some of them."""
    usual = {signal.SIGINT: signal.default_int_handler, **dict.fromkeys(ENDING, signal.SIG_DFL)}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def checkpoint_activations(model: Any) -> None:
    """Activation checkpointing on, by the name that this version of transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def pytest_collection_finish() -> None:
    """Leave all that is imported out of garbage collection, which every run of a test asks for several times."""
    gc.collect()
    gc.freeze()


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


# --- tiny bases of every layout, and what PEFT makes of them --------------------------------------------

VOCABULARY = 40
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "tied": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=8, tie_word_embeddings=True)),
    "untied": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=8, tie_word_embeddings=False)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE, tie_word_embeddings=True)),  # q, k, v have biases
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
    ),
    "moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_SHAPE,
            head_dim=8,
            moe_intermediate_size=12,
            num_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
        )
    ),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models in fp32, saved by transformers, by the names in BASES."""
    folder = tmp_path_factory.mktemp("bases")
    for name, make in BASES.items():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.3 if p.ndim > 1 else p + torch.randn_like(p) * 0.1)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in BASES}


@cache
def _loaded(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def fresh(path: Path) -> PreTrainedModel:
    """A model in fp32 that is the caller's own; one that is not going to be written again."""
    return copy.deepcopy(_loaded(path))


def logits_of(model: torch.nn.Module) -> Tensor:
    """The logits of every token of the tiny bases' vocabulary, without dropout."""
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(5)).view(2, -1)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def apart(got: Tensor, want: Tensor, without: Tensor | float = 0.0) -> float:
    """The largest error, by the size of what is to be seen: |got - want| / |want - without|."""
    return float((got - want).abs().max() / (want - without).abs().max())


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint or an adapter, without the package."""
    return {k: v for shard in sorted(folder.glob("*.safetensors")) for k, v in load_file(shard).items()}


def true_updates(folder: Path) -> dict[str, Tensor]:
    """alpha/r * B @ A of a plain LoRA folder in fp64, by module, without the package."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): config["lora_alpha"]
        / config["r"]
        * (tensors[key.replace("lora_A", "lora_B")].double() @ a.double())
        for key, a in tensors.items()
        if key.endswith("lora_A.weight")
    }


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def small_update(path: Path, size: float, seed: int) -> Merged:
    """A rank-4 update of every linear layer with |D|/|W| = size in each."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Factors] = {}
    for name, weight in stored(path).items():
        if "_proj" in name:
            a = torch.randn(4, weight.shape[1], generator=generator)
            b = torch.randn(weight.shape[0], 4, generator=generator)
            norm = (b @ a).norm()
            factors[name.removesuffix(".weight")] = Factors(a, b * (size * weight.float().norm() / norm))
    return combine([Adapter(f"update{seed}", factors)])


def peft_adapter(base: Path, out: Path, seed: int, **settings: Any) -> Tensor:
    """Save a PEFT adapter of a tiny base, everything that it trains moved at random, and return its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied weights, and what it saves
        model = get_peft_model(
            fresh(base), LoraConfig(**{"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", **settings})
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += torch.randn(p.shape, generator=generator) * 0.2  # in place: tied factors share their memory
        model.save_pretrained(str(out))
    return logits_of(model)


def peft_model(base: Path | PreTrainedModel, **folders: Path) -> PeftModel:
    """A base with adapters as PEFT loads them, by name; the first is active."""
    model = fresh(base) if isinstance(base, Path) else base
    (first, folder), *others = folders.items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
        for name, other in others:
            live.load_adapter(str(other), name)
    return live.eval()


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = stored(folder)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")


def dense(adapter: Adapter) -> dict[str, Tensor]:
    """The updates of a plain LoRA by module, multiplied in fp64 here."""
    return {m: f.scaling * (f.b.double() @ f.a.double()) for m, f in adapter.updates.items() if isinstance(f, Factors)}


def share_lost(full: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> float:
    """|D - D'| / |D| over all modules together."""
    assert full.keys() == small.keys()
    lost = sum(float((full[m].double() - small[m].double()).square().sum()) for m in full)
    return math.sqrt(lost / sum(float(d.double().square().sum()) for d in full.values()))


def files_of(folder: Path) -> Mapping[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def allocated(profile: Any, mark: str = "") -> tuple[int, int]:
    """The bytes that were held when the event `mark` began, and the most, as torch's allocator reported them."""
    now = marked = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == mark:
            marked = now
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return marked, most


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


# --- the command line ------------------------------------------------------------------------------------


@pytest.fixture
def config_file(make_config: Callable[..., Config], tmp_path: Path) -> Path:
    config = make_config(rounds=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"output"})))
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line: its exit status, and what it printed to both streams."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["mot-lora", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            status: Any = 0
        except SystemExit as e:
            status = e.code
        out = capfd.readouterr()
        return status, out.out, out.err

    return run


def refused(result: tuple[int, str, str]) -> str:
    """The one line of a user's mistake."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err), err
    return err.removeprefix("error: ").rstrip()
