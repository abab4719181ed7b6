"""Every kind of LoRA that PEFT makes: what is read, folded, merged and saved is what PEFT itself computes."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import apart, fresh, logits_of, peft_adapter, peft_model, stored
from torch import Tensor
from transformers import AutoModelForCausalLM

from mot_lora import (
    UserError,
    adapter_from_peft,
    add_merged_adapter,
    fold_checkpoint,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from mot_lora.merging.methods import ties

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Kind:
    """A base, PEFT's settings, and the stored tensors that such an adapter changes."""

    base: str
    changes: str
    settings: dict[str, Any]


def kind_of(base: str, changes: str, **settings: Any) -> Kind:
    return Kind(base, changes, settings)


Q, ALL, HEADS = (
    r"q_proj\.weight",
    r"[qkvo]_proj\.weight|(gate|up|down)_proj\.weight",
    r"embed_tokens\.weight|lm_head\.weight",
)
PIECES = r"experts\.\d\.(gate|up|down)_proj\.weight"
KINDS = {
    "linear": kind_of("tied", ALL, target_modules="all-linear"),
    "embedding": kind_of("tied", rf"{HEADS}|{Q}", target_modules=["embed_tokens", "q_proj"]),
    "embedding, tied": kind_of(
        "tied", rf"embed_tokens\.weight|{Q}", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True
    ),
    "embedding and head": kind_of("untied", rf"{HEADS}|{Q}", target_modules=["embed_tokens", "q_proj", "lm_head"]),
    "head of a tied base": kind_of("tied", rf"lm_head\.weight|{Q}", target_modules=["lm_head", "q_proj"]),
    "head, tied": kind_of(
        "tied", rf"embed_tokens\.weight|{Q}", target_modules=["lm_head", "q_proj"], ensure_weight_tying=True
    ),
    "Conv1D": kind_of("gpt2", r"c_attn\.weight", target_modules=["c_attn"]),
    "square Conv1D": kind_of("gpt2", r"attn\.c_proj\.weight", target_modules=["attn.c_proj"]),
    "Conv1D and head": kind_of(
        "gpt2", r"c_(attn|proj)\.weight|lm_head\.weight", target_modules=["c_attn", "c_proj", "lm_head"]
    ),
    "copies": kind_of(
        "tied",
        rf"{HEADS}|\w*norm\.weight|{Q}",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "norm"],
    ),
    "copy of the head": kind_of(
        "untied",
        rf"lm_head\.weight|\w*norm\.weight|{Q}",
        target_modules=["q_proj"],
        modules_to_save=["lm_head", "norm"],
    ),
    "copy, tied": kind_of(
        "tied",
        rf"embed_tokens\.weight|{Q}",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
    "copy with a bias": kind_of(
        "qwen2", r"o_proj\.weight|k_proj\.(weight|bias)", target_modules=["o_proj"], modules_to_save=["k_proj"]
    ),
    "copies of Conv1D": kind_of(
        "gpt2",
        r"c_attn\.weight|(c_fc|attn\.c_proj)\.(weight|bias)",
        target_modules=["c_attn"],
        modules_to_save=["c_fc", "attn.c_proj"],
    ),
    "copy of a block": kind_of(
        "qwen2", r"o_proj\.weight|mlp\.\w+_proj\.weight", target_modules=["o_proj"], modules_to_save=["mlp"]
    ),
    "tokens": kind_of("tied", rf"embed_tokens\.weight|{Q}", target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "tokens, untied": kind_of(
        "untied",
        rf"embed_tokens\.weight|{Q}",
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 5]},
    ),
    "tokens and a LoRA of the tied head": kind_of(
        "tied", rf"{HEADS}|{Q}", target_modules=["q_proj", "lm_head"], trainable_token_indices=[3, 5]
    ),
    "tokens of the head": kind_of(
        "tied", rf"lm_head\.weight|{Q}", target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5]}
    ),
    "tokens of both": kind_of(
        "untied",
        rf"{HEADS}|{Q}",
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [1, 2, 3]},
    ),
    "tokens of both, tied": kind_of(
        "tied",
        rf"{HEADS}|{Q}",
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [1, 2, 3]},
    ),
    "bias": kind_of("qwen2", r"[qk]_proj\.(weight|bias)", target_modules=["q_proj", "k_proj"], lora_bias=True),
    "bias of Conv1D": kind_of("gpt2", r"c_attn\.(weight|bias)", target_modules=["c_attn"], lora_bias=True),
    "DoRA": kind_of("tied", rf"down_proj\.weight|{Q}", target_modules=["q_proj", "down_proj"], use_dora=True),
    "DoRA of Conv1D": kind_of("gpt2", r"c_(attn|proj)\.weight", target_modules=["c_attn", "c_proj"], use_dora=True),
    "DoRA of an embedding": kind_of(
        "untied", r"(embed_tokens|o_proj)\.weight", target_modules=["embed_tokens", "o_proj"], use_dora=True
    ),
    "experts": kind_of("moe", f"{PIECES}|{Q}", target_modules=["q_proj"], target_parameters=EXPERTS),
    "experts alone": kind_of(
        "moe", r"experts\.\d\.(gate|up)_proj\.weight", target_modules=[], target_parameters=EXPERTS[:1]
    ),
    "experts and router": kind_of(
        "moe",
        rf"{PIECES}|mlp\.gate\.weight|{Q}",
        target_modules=["q_proj"],
        target_parameters=[*EXPERTS, "mlp.gate.weight"],
        rank_pattern={"mlp.experts.down_proj": 3},
    ),
    "all-linear of experts": kind_of(
        "moe", rf"[qkvo]_proj\.weight|mlp\.gate\.weight|{PIECES}", target_modules="all-linear"
    ),
    "experts by their old names": kind_of("moe", PIECES, target_modules=["gate_proj", "up_proj", "down_proj"]),
    "an embedding as a bare matrix": kind_of(
        "untied", rf"embed_tokens\.weight|{Q}", target_modules=["q_proj"], target_parameters=["embed_tokens.weight"]
    ),
    "bare matrices": kind_of(
        "tied",
        r"[oqk]_proj\.weight",
        target_modules=["o_proj"],
        target_parameters=["q_proj.weight", "k_proj.weight"],
    ),
}
WEIGHTS = [1.0, 2.0]


@dataclass
class Made:
    """One kind: its base, two adapters as PEFT saved them, and the logits that PEFT computed with each."""

    name: str
    base: Path
    folder: Path
    settings: dict[str, Any]
    wanted: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @cached_property
    def rank(self) -> int | None:
        """What keeps everything, where an update has no factors of its own."""
        return 48 if self.settings.get("use_dora") else None

    @cached_property
    def plain(self) -> Tensor:
        return logits_of(fresh(self.base))

    @cached_property
    def merged_fold(self) -> Path:
        merged = merge_adapters([self.folder / "a", self.folder / "b"], weights=WEIGHTS, base=self.base)
        return fold_checkpoint(self.base, merged, self.folder / "merged", verify=True)

    def fold(self, name: str) -> Path:
        out = self.folder / f"{name} folded"
        if not out.exists():
            fold_checkpoint(self.base, merge_adapters([load_adapter(self.folder / name, base=self.base)]), out)
        return out

    def close(self, got: Tensor, want: Tensor, bound: float = 1e-4) -> None:
        assert apart(got, want, self.plain) < bound


def make(name: str, bases: dict[str, Path], folder: Path, **changes: Any) -> Made:
    kind = KINDS[name]
    made = Made(name, bases[kind.base], folder, {**kind.settings, **changes})
    for seed, adapter in enumerate("ab"):
        made.wanted[adapter] = peft_adapter(made.base, folder / adapter, seed, **made.settings)
        assert apart(made.wanted[adapter], made.plain) > 0.02  # else a lost update would not be seen
    return made


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(request.param, bases, tmp_path_factory.mktemp("kind"))


def test_a_fold_computes_what_peft_does(kind: Made) -> None:
    for name, want in kind.wanted.items():
        out = kind.fold(name)
        model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        kind.close(logits_of(model), want)
        before, after = stored(kind.base), stored(out)
        changed = {n for n, t in after.items() if n not in before or not torch.equal(t, before[n])}
        assert changed == {n for n in after if re.search(rf"(^|[.])({KINDS[kind.name].changes})$", n)}, changed
        assert after.keys() - before.keys() <= {"lm_head.weight"}
        assert not before.keys() - after.keys()


def test_peft_computes_the_same_with_a_copy(kind: Made, tmp_path: Path) -> None:
    adapter = load_adapter(kind.folder / "a", base=kind.base)
    record = save_adapter(adapter, tmp_path / "copy", rank=kind.rank)
    assert record.lost < 1e-7
    kind.close(logits_of(peft_model(kind.base, a=tmp_path / "copy")), kind.wanted["a"], 1e-3)
    again = load_adapter(tmp_path / "copy", base=kind.base)
    assert again.updates.keys() == adapter.updates.keys()
    for module, update in adapter.updates.items():
        torch.testing.assert_close(again.updates[module].delta(), update.delta(), rtol=1e-4, atol=1e-6)


def test_a_merge_is_the_weighted_sum_of_what_each_does(kind: Made, tmp_path: Path) -> None:
    w0, merged = fresh(kind.base).state_dict(), fresh(kind.merged_fold).state_dict()
    folds = [fresh(kind.fold(name)).state_dict() for name in "ab"]
    for name, old in w0.items():
        want = old + sum(w * (f[name] - old) for w, f in zip(WEIGHTS, folds, strict=True)) / sum(WEIGHTS)
        torch.testing.assert_close(merged[name], want, rtol=1e-5, atol=1e-6)

    adapters = merge_adapters([kind.folder / "a", kind.folder / "b"], weights=WEIGHTS, base=kind.base)
    save_adapter(adapters, tmp_path / "merged", rank=kind.rank)
    want = logits_of(fresh(kind.merged_fold))
    kind.close(logits_of(peft_model(kind.base, m=tmp_path / "merged")), want, 1e-3)


def test_a_live_model_takes_the_merge_up(kind: Made) -> None:
    # of weights that are tied PEFT itself loads only the first adapter right, or none
    alone = kind.settings.get("ensure_weight_tying", False) or kind.name == "tokens and a LoRA of the tied head"
    names = ["a"] if alone else ["a", "b"]
    live = peft_model(kind.base, **{name: kind.folder / name for name in names})
    for name in names:
        read, kept = adapter_from_peft(live, name), load_adapter(kind.folder / name, base=kind.base)
        assert read.updates.keys() == kept.updates.keys()
        for module, update in kept.updates.items():
            assert read.updates[module].form == update.form
            torch.testing.assert_close(read.updates[module].delta(), update.delta(), rtol=1e-5, atol=1e-6)
    if kind.settings.get("trainable_token_indices"):
        with pytest.raises(UserError, match=r"(embed_tokens|lm_head): PEFT cannot hold a LoRA beside trained tokens"):
            add_merged_adapter(live, names, "m", rank=kind.rank)
        assert list(live.peft_config) == names
    elif kind.name == "copy of a block":
        with pytest.raises(UserError, match=r"PEFT did not accept .*mlp\.\w+_proj\.weight"):
            add_merged_adapter(live, names, "m")
        assert list(live.peft_config) == names
    else:
        add_merged_adapter(live, names, "m", weights=WEIGHTS[: len(names)], rank=kind.rank)
        kind.close(logits_of(live), kind.wanted["a"], 1e-3)
        live.set_adapter("m")
        want = kind.wanted["a"] if alone else logits_of(fresh(kind.merged_fold))
        kind.close(logits_of(live), want, 1e-3)
    for name in reversed(names):
        live.set_adapter(name)
        kind.close(logits_of(live), kind.wanted[name], 1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_patterns_and_rslora_count_in_every_kind(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    patterns = {"rank_pattern": {r".*\.0\..*": 3, "lm_head|embed_tokens": 1}, "alpha_pattern": {r".*\.1\..*": 7}}
    made = make(name, bases, tmp_path, use_rslora=True, **patterns)
    made.close(logits_of(fresh(made.fold("a"))), made.wanted["a"])
    save_adapter(load_adapter(tmp_path / "a", base=made.base), tmp_path / "copy", rank=made.rank)
    made.close(logits_of(peft_model(made.base, a=tmp_path / "copy")), made.wanted["a"], 1e-3)


def test_copies_and_tokens_arrive_to_the_bit(bases: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("copies", "tokens", "copies of Conv1D"):
        made = make(kind, bases, tmp_path / kind)
        trained, got, before = stored(made.folder / "a"), stored(made.fold("a")), stored(made.base)
        copies = {k.removeprefix("base_model.model."): t for k, t in trained.items() if ".lora_" not in k}
        for name, copy in copies.items():
            if name.endswith("token_adapter.trainable_tokens_delta"):
                weight = "model.embed_tokens.weight"
                old, copy = copy, before[weight].clone()
                copy[[3, 5]] = old
            else:
                weight = name
            assert not torch.equal(before[weight], copy)
            assert torch.equal(got[weight], copy)


# --- experts, which the disk holds one by one ----------------------------------------------------------


def expert_deltas(base: Path, folder: Path) -> dict[str, Tensor]:
    """What PEFT adds to each stored expert."""
    live = peft_model(base, a=folder)
    plain = fresh(base)
    merged = live.merge_and_unload()
    deltas: dict[str, Tensor] = {}
    for i, layer in enumerate(merged.model.layers):
        old = plain.model.layers[i].mlp.experts
        both, down = layer.mlp.experts.gate_up_proj - old.gate_up_proj, layer.mlp.experts.down_proj - old.down_proj
        for e in range(len(both)):
            gate, up = both[e].detach().chunk(2)
            for name, delta in (("gate", gate), ("up", up), ("down", down[e].detach())):
                deltas[f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight"] = delta
    return deltas


@pytest.fixture(scope="module")
def experts(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("experts", bases, tmp_path_factory.mktemp("experts"))


def test_each_stored_expert_gets_its_part(experts: Made) -> None:
    before, after = stored(experts.base), stored(experts.fold("a"))
    assert not any("gate_up" in name for name in before)
    deltas = expert_deltas(experts.base, experts.folder / "a")
    assert len(deltas) == 2 * 4 * 3
    for name, delta in deltas.items():
        assert delta.abs().max() > 0.01
        torch.testing.assert_close(after[name], before[name] + delta, rtol=1e-6, atol=1e-6)


def test_each_expert_is_merged_as_a_matrix_of_its_own(experts: Made, tmp_path: Path) -> None:
    # the trimmed share is taken of each expert, not of all of them together
    folders = [experts.folder / name for name in "ab"]
    merged = merge_adapters(folders, "ties", [2, 1], density=0.3)
    before, after = stored(experts.base), stored(fold_checkpoint(experts.base, merged, tmp_path / "out", verify=True))
    one, other = (expert_deltas(experts.base, f) for f in folders)
    for i in range(2):
        for e in range(4):
            prefix = f"model.layers.{i}.mlp.experts.{e}"
            gate, up, down = (f"{prefix}.{n}_proj.weight" for n in ("gate", "up", "down"))
            both = [torch.cat([d[gate], d[up]]) for d in (one, other)]
            wants = [*ties(both, [2, 1], density=0.3).chunk(2), ties([one[down], other[down]], [2, 1], density=0.3)]
            for name, want in zip((gate, up, down), wants, strict=True):
                off = (after[name] - before[name] - want).abs() > 1e-5
                assert off.sum() <= 2  # fp32 may trim another of two entries that are as large
    with pytest.raises(UserError, match="not low-rank"):
        save_adapter(merged, tmp_path / "saved")
    record = save_adapter(merged, tmp_path / "saved", rank=16)
    assert record.lost < 1e-6
    got = logits_of(peft_model(experts.base, m=tmp_path / "saved"))
    experts.close(got, logits_of(fresh(tmp_path / "out")), 1e-3)


# --- adapters of several kinds together ----------------------------------------------------------------

MIXES = {
    "a copy and a LoRA of one embedding": ("copies", "embedding"),
    "a copy of the head and a LoRA of it": ("copy of the head", "embedding and head"),
    "a copy and tokens": ("copies", "tokens"),
    "tokens and a LoRA": ("tokens, untied", "embedding and head"),
    "tied tokens and a LoRA": ("tokens", "embedding"),
    "tied and not": ("embedding, tied", "embedding"),
    "embedding and head of one base": ("embedding", "head of a tied base"),
    "tied from either side": ("embedding, tied", "head, tied"),
    "DoRA and plain": ("DoRA", "linear"),
    "bias and none": ("bias of Conv1D", "Conv1D and head"),
    "a bias and a copy": ("bias", "copy with a bias"),
    "all experts and some": ("experts", "experts alone"),
    "experts with a router and without": ("experts and router", "all-linear of experts"),
}


@pytest.mark.parametrize("mix", MIXES)
def test_kinds_merge_with_each_other(mix: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[KINDS[MIXES[mix][0]].base]
    for seed, (name, kind) in enumerate(zip("ab", MIXES[mix], strict=True)):
        assert bases[KINDS[kind].base] == base
        peft_adapter(base, tmp_path / name, seed, **KINDS[kind].settings)
        fold_checkpoint(base, merge_adapters([tmp_path / name], base=base), tmp_path / f"{name} folded")
    merged = merge_adapters([tmp_path / "a", tmp_path / "b"], weights=[3, 1], base=base)
    fold_checkpoint(base, merged, tmp_path / "folded", verify=True)
    w0, got = fresh(base).state_dict(), fresh(tmp_path / "folded").state_dict()
    one, other = (fresh(tmp_path / f"{name} folded").state_dict() for name in "ab")
    for name, old in w0.items():
        torch.testing.assert_close(got[name], 0.75 * one[name] + 0.25 * other[name], rtol=1e-5, atol=1e-6)
        assert name in got
        assert old.shape == got[name].shape

    record = save_adapter(merged, tmp_path / "saved", rank=48 if "DoRA" in mix else None)
    assert record.lost < 1e-6
    want = logits_of(fresh(tmp_path / "folded"))
    got_logits = logits_of(peft_model(base, m=tmp_path / "saved"))
    assert apart(got_logits, want, logits_of(fresh(base))) < 1e-3


@pytest.mark.parametrize(
    "mix", ["embedding and head of one base", "tied and not", "DoRA and plain", "bias and none"]
)  # PEFT itself refuses the others in one model
def test_kinds_merge_with_each_other_in_a_live_model(mix: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[KINDS[MIXES[mix][0]].base]
    for seed, (name, kind) in enumerate(zip("ab", MIXES[mix], strict=True)):
        peft_adapter(base, tmp_path / name, seed, **KINDS[kind].settings)
    live = peft_model(base, a=tmp_path / "a", b=tmp_path / "b")
    record = add_merged_adapter(live, ["a", "b"], "m", weights=[3, 1], rank=48 if "DoRA" in mix else None)
    assert record.lost < 1e-6
    live.set_adapter("m")
    merged = merge_adapters([tmp_path / "a", tmp_path / "b"], weights=[3, 1])
    want = logits_of(fresh(fold_checkpoint(base, merged, tmp_path / "out")))
    assert apart(logits_of(live), want, logits_of(fresh(base))) < 1e-4


SPARSE = ["Conv1D and head", "copies", "copies of Conv1D", "bias", "DoRA", "tokens", "embedding, tied", "bare matrices"]


@pytest.mark.parametrize("name", SPARSE)
def test_ties_of_a_kind_is_ties_of_what_it_changes(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    made = make(name, bases, tmp_path)
    merged = merge_adapters([tmp_path / "a", tmp_path / "b"], "ties", WEIGHTS, density=0.6, base=made.base)
    got = fresh(fold_checkpoint(made.base, merged, tmp_path / "out", verify=True)).state_dict()
    folds = [fresh(made.fold(adapter)).state_dict() for adapter in "ab"]
    for tensor, old in fresh(made.base).state_dict().items():
        want = old + ties([f[tensor] - old for f in folds], WEIGHTS, density=0.6)
        off = ~torch.isclose(got[tensor], want, rtol=1e-4, atol=1e-5)
        assert off.sum() <= 2 + old.numel() // 100  # differences of sums in fp32 may trim another entry at the edge
        assert torch.equal(got[tensor], old) or not torch.equal(want, old)
