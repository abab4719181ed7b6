"""What is written is one update by every reader's rule: PEFT's, vLLM's (alpha / r), llama.cpp's (alpha / own rank)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits_of, peft_adapter, peft_model, stored
from torch import Tensor
from wild import far, llama, lora

from mot_lora import load_adapter, merge_adapters, save_adapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
RULES = {
    "vLLM": lambda config, _: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, own: config["lora_alpha"] / own,
}


def by_rule(folder: Path, rule: str) -> dict[str, Tensor]:
    """An adapter's updates as a reader takes them that knows no patterns."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), stored(folder)
    pairs = {k: (tensors[k], tensors[k.replace("lora_A", "lora_B")]) for k in tensors if "lora_A" in k}
    return {
        k.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): RULES[rule](config, len(a))
        * b.double()
        @ a.double()
        for k, (a, b) in pairs.items()
    }


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of other modules, ranks, alphas."""
    folder = tmp_path_factory.mktemp("mixed")
    base = llama(folder / "base")
    made: dict[str, dict[str, Any]] = {
        "few modules": {},
        "all modules": {"r": 16, "target_modules": ALL},
        "patterns": {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 1, "down_proj": 9},
            "alpha_pattern": {"v_proj": 3},
        },
        "rslora": {"r": 6, "use_rslora": True, "target_modules": ["k_proj", "down_proj"]},
    }
    for seed, (name, settings) in enumerate(made.items()):
        lora(base, folder / name, base=folder / "base", seed=seed, **settings)
    return {name: folder / name for name in made}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("names", "rank"),
    [
        (["few modules", "all modules"], None),
        (["few modules", "all modules"], 18),
        (["patterns"], None),
        (["patterns", "rslora"], None),
        (["few modules", "all modules", "patterns", "rslora"], 3),
    ],
    ids=str,
)
def test_readers_agree(
    adapters: dict[str, Path], tmp_path: Path, names: list[str], rank: int | None, rule: str
) -> None:
    """ggml-org/llama.cpp#8332, huggingface/diffusers#14409."""
    merged = merge_adapters([adapters[n] for n in names])
    record = save_adapter(merged, tmp_path / "m", rank)
    assert record.uniform
    assert rank == 3 or len(set(record.ranks.values())) > 1
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    got = by_rule(tmp_path / "m", rule)
    assert far(got, {m: u.delta(torch.float64) for m, u in load_adapter(tmp_path / "m").updates.items()}) == 0
    if rank is None:
        assert far(got, {m: merged.delta(m, torch.float64) for m in merged.shapes}) < 1e-5


KINDS: dict[str, tuple[str, list[str], dict[str, int], dict[str, Any]]] = {  # base, target_modules, rank_pattern, more
    "embedding and head": ("untied", ["q_proj", "embed_tokens", "lm_head"], {"embed_tokens": 1}, {}),
    "experts": ("moe", ["q_proj"], {"q_proj": 5}, {"target_parameters": ["mlp.experts.down_proj"]}),
    "biases": ("qwen2", ["q_proj", "v_proj"], {"v_proj": 5}, {"lora_bias": True}),
    "Conv1D": ("gpt2", ["c_attn", "c_proj"], {"c_proj": 3}, {"fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_same_with_zeros_in_every_kind(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    name, targets, ranks, more = KINDS[kind]
    want = peft_adapter(bases[name], tmp_path / "a", 0, target_modules=targets, rank_pattern=ranks, **more)
    assert save_adapter(load_adapter(tmp_path / "a", base=bases[name]), tmp_path / "m").uniform
    assert {t.dtype for t in stored(tmp_path / "m").values()} == {torch.float32}
    torch.testing.assert_close(logits_of(peft_model(bases[name], m=tmp_path / "m")), want, rtol=1e-4, atol=1e-5)


def test_zeros_that_cost_much_are_left_out_and_that_is_told(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    monkeypatch.setattr("mot_lora.adapters.save.PADDING", 1000)
    pair = (adapters["few modules"], adapters["all modules"])
    status, said, _ = call("merge", *pair, "--out", tmp_path / "cheap")  # 20 and 16: less than twice as large
    assert (status, "llama.cpp" in said) == (0, False)
    lora(llama(), tmp_path / "dear", r=1, rank_pattern={"q_proj": 16}, target_modules=ALL)
    status, said, _ = call("merge", tmp_path / "dear", "--out", tmp_path / "m")
    assert status == 0
    assert "ranks 1 to 16" in said
    assert "llama.cpp" in said
    scaling = {k: 8 / (16 if "q_proj" in k else 1) if "lora_B" in k else 1 for k in stored(tmp_path / "dear")}
    assert far(stored(tmp_path / "m"), {k: t * scaling[k] for k, t in stored(tmp_path / "dear").items()}) < 1e-6
    status, said, _ = call("merge", tmp_path / "dear", "--rank", "2", "--out", tmp_path / "small")  # the way out
    assert (status, "llama.cpp" in said) == (0, False)
