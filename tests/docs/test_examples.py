"""What the manual shows is run: its commands and its Python, on a tiny model in place of the ones it names."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeAdapter
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mot_lora.data import Trace, chain_of, is_right, read_trace
from mot_lora.runs.rundir import MAY_CHANGE, STEP

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [text for of, text in BLOCK.findall((DOCS / page).read_text("utf-8")) if of == language]


@pytest.fixture
def adapters(make_adapter: MakeAdapter, qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three adapters of a tiny model, called a, b and c where the test runs."""
    monkeypatch.chdir(tmp_path)
    return [make_adapter(qwen3, name, seed=seed, r=4) for seed, name in enumerate("abc")]


@pytest.mark.parametrize("page", ["merging-adapters.md", "../README.md"])
def test_commands_for_adapters(page: str, adapters: list[Path], qwen3: Path, call: Callable[..., Any]) -> None:
    assert [a.name for a in adapters] == ["a", "b", "c"]
    lines = [line for block in blocks(page, "") for line in block.splitlines() if " a b c" in line]
    assert len(lines) == 4
    for line in lines:
        words = [str(qwen3) if word == "Qwen/Qwen3-0.6B" else word for word in shlex.split(line, comments=True)]
        status, _, errors = call(*words[1:])
        assert status == 0, errors
    assert Path("mean/adapter_model.safetensors").is_file()
    assert Path("ties/adapter_model.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained("model").num_parameters() > 0


def test_python_for_adapters(adapters: list[Path], qwen3: Path) -> None:
    [code] = blocks("merging-adapters.md", "python")
    Path("adapters").mkdir()
    for adapter in adapters:
        adapter.rename(Path("adapters") / adapter.name)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen3), "adapters/a", adapter_name="a")
    model.load_adapter("adapters/b", adapter_name="b")
    exec(code.replace("Qwen/Qwen3-0.6B", str(qwen3)), {"model": model})
    assert model.active_adapter == "mean"
    assert Path("out/config.json").is_file()
    assert json.loads(Path("merged/adapter_config.json").read_text())["r"] == 16


def test_a_trace_as_it_is_to_be_collected() -> None:
    [line] = blocks("collecting-traces.md", "json")
    trace = read_trace(json.loads(line), "here")
    assert isinstance(trace, Trace)
    assert trace.question == "What is 6 times 7?"
    assert chain_of(trace.completion) == "6 times 7 is 42."
    assert is_right(trace.completion, trace.right_answers)


def test_what_may_change_when_a_run_resumes() -> None:
    section = (DOCS / "trusting-a-run.md").read_text("utf-8").partition("These may change:")[2].partition("## ")[0]
    keys = re.findall(r"`([\w.]+)`", section)
    assert len(keys) > 10
    for key in keys:
        full = {
            "stop": "stop.patience",
            "eval.final": "eval.final.samples",
            "learning_rate": "teachers.0.learning_rate",
        }
        name = full.get(key, key)
        assert MAY_CHANGE.fullmatch(name) or STEP.fullmatch(name), key
