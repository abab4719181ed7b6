"""What is written is what PEFT loads, exactly or at a rank with its cost; and nothing is left half-written."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeAdapter, apart, dense, files_of, fresh, logits_of, peft_adapter, peft_model, share_lost, stored
from limits import small_files
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mot_lora import Adapter, Factors, UserError, load_adapter, merge_adapters, save_adapter
from mot_lora.adapters.save import pack
from mot_lora.merging.lowrank import Dense

KINDS: dict[str, dict[str, Any]] = {
    "alpha = r": {"r": 4, "lora_alpha": 4},
    "alpha != r": {"r": 4, "lora_alpha": 11},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"v_proj": 5, r"layers\.0\.self_attn\.q_proj": 3},
    },
    "few modules": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
}


def load_base(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def load_peft(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load_base(base), str(adapter)).eval()


def logits(model: torch.nn.Module) -> Tensor:
    tokens = torch.arange(4, 28).view(2, 12)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def logits_with(base: Path, deltas: dict[str, Tensor]) -> Tensor:
    """Logits of the base with dense updates added to its weights."""
    model = load_base(base)
    plain = logits(model)
    with torch.no_grad():
        for module, delta in deltas.items():
            model.get_submodule(module).weight += delta
    changed = logits(model)
    assert (changed - plain).abs().max() > 0.01  # else the comparison would not see a lost update
    return changed


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_saved(qwen3: Path, make_adapter: MakeAdapter, tmp_path: Path, kind: str) -> None:
    adapter = load_adapter(make_adapter(qwen3, "one", scale=0.1, **KINDS[kind]))
    record = save_adapter(adapter, tmp_path / "copy")
    assert record.lost == 0
    assert record.method is None
    assert record.ranks == {m: u.rank for m, u in adapter.updates.items()}
    expected = logits_with(qwen3, {m: d.float() for m, d in dense(adapter).items()})
    torch.testing.assert_close(logits(load_peft(qwen3, tmp_path / "copy")), expected, rtol=1e-4, atol=1e-4)
    again = load_adapter(tmp_path / "copy")
    assert share_lost(dense(adapter), dense(again)) < 1e-7
    assert again.base == adapter.base
    assert sorted(f.name for f in (tmp_path / "copy").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture
def unlike(student: Path, make_adapter: MakeAdapter) -> list[Adapter]:
    """Adapters of different ranks, scalings and modules."""
    return [
        load_adapter(make_adapter(student, "a", seed=1, scale=0.1, r=3, lora_alpha=7)),
        load_adapter(
            make_adapter(student, "b", seed=2, scale=0.1, r=5, use_rslora=True, target_modules=["q_proj", "up_proj"])
        ),
        load_adapter(
            make_adapter(
                student, "c", seed=3, scale=0.1, target_modules=["q_proj", "o_proj"], rank_pattern={"q_proj": 1}
            )
        ),
    ]


def test_a_linear_merge_is_saved_exactly(student: Path, unlike: list[Adapter], tmp_path: Path) -> None:
    merged = merge_adapters(unlike, weights=(2, 1, 3), scale=1.5)
    assert save_adapter(merged, tmp_path / "merged").lost == 0
    live = load_peft(student, tmp_path / "merged")
    expected = {
        m: 1.5 * sum(w * dense(a)[m] for w, a in zip((2, 1, 3), unlike, strict=True) if m in a.updates) / 6
        for m in unlike[0].updates
    }
    torch.testing.assert_close(
        logits(live), logits_with(student, {m: d.float() for m, d in expected.items()}), rtol=1e-4, atol=1e-4
    )
    saved = load_adapter(tmp_path / "merged")
    assert {f.rank for f in saved.updates.values()} == {9}
    assert share_lost(expected, dense(saved)) < 1e-6


@pytest.mark.parametrize("rank", [1, 4, 100])
def test_a_smaller_rank_tells_what_it_lost(student: Path, unlike: list[Adapter], tmp_path: Path, rank: int) -> None:
    merged = merge_adapters(unlike)
    record = save_adapter(merged, tmp_path / "small", rank=rank)
    saved = load_adapter(tmp_path / "small")
    full = {m: merged.delta(m, torch.float64) for m in merged.shapes}
    assert set(record.ranks.values()) == {min(rank, r) for r in (3, 7, 8, 9)}
    assert {f.rank for f in saved.updates.values()} == {record.rank} == {min(rank, 9)}
    assert record.lost == pytest.approx(share_lost(full, dense(saved)), abs=1e-6)
    assert (record.lost > 1e-4) == (rank < 9)
    best = {m: float((torch.linalg.svdvals(d)[rank:] ** 2).sum()) for m, d in full.items()}
    sizes = {m: float(d.square().sum()) for m, d in full.items()}
    assert record.lost == pytest.approx(math.sqrt(sum(best.values()) / sum(sizes.values())), abs=1e-6)
    for module, lost in record.modules.items():
        assert lost == pytest.approx(math.sqrt(best[module] / sizes[module]), abs=1e-6)
    expected = logits_with(student, {m: d.float() for m, d in dense(saved).items()})
    torch.testing.assert_close(logits(load_peft(student, tmp_path / "small")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "della", "sce"])
def test_a_sparse_merge_is_saved_at_a_rank(qwen3: Path, make_adapter: MakeAdapter, tmp_path: Path, method: str) -> None:
    adapters = [load_adapter(make_adapter(qwen3, n, seed=i, scale=0.1, r=3 + i)) for i, n in enumerate("ab")]
    merged = merge_adapters(adapters, method, density=0.3)
    record = save_adapter(merged, tmp_path / "sparse", rank=8)
    saved = load_adapter(tmp_path / "sparse")
    full = {m: d.double() for m, d in merged}
    assert record.method == method
    assert {f.rank for f in saved.updates.values()} == {8}
    assert record.lost == pytest.approx(share_lost(full, dense(saved)), abs=1e-6)
    assert 0.05 < record.lost < 1
    best = sum(float((torch.linalg.svdvals(d)[8:] ** 2).sum()) for d in full.values())
    assert record.lost == pytest.approx(math.sqrt(best / sum(float(d.square().sum()) for d in full.values())), abs=1e-6)
    expected = logits_with(qwen3, {m: d.float() for m, d in dense(saved).items()})
    torch.testing.assert_close(logits(load_peft(qwen3, tmp_path / "sparse")), expected, rtol=1e-4, atol=1e-4)


def test_a_sparse_merge_at_full_rank_loses_nothing(unlike: list[Adapter], tmp_path: Path) -> None:
    merged = merge_adapters(unlike, "ties", density=0.3)
    assert save_adapter(merged, tmp_path / "all", rank=128).lost == pytest.approx(0, abs=1e-6)
    assert share_lost(dict(merged), dense(load_adapter(tmp_path / "all"))) < 1e-6


@pytest.mark.parametrize("space", ["core", "knots"])
def test_a_merge_in_a_common_space_has_factors(
    unlike: list[Adapter], student: Path, tmp_path: Path, space: str
) -> None:
    merged = merge_adapters(unlike, "ties", density=0.5, space=space)
    assert save_adapter(merged, tmp_path / "aligned").lost == 0
    assert share_lost(dict(merged), dense(load_adapter(tmp_path / "aligned"))) < 1e-5
    load_peft(student, tmp_path / "aligned")


@pytest.mark.parametrize("kind", ["alpha != r", "rslora", "patterns"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_three_thirds_of_an_adapter_are_that_adapter(
    qwen3: Path, make_adapter: MakeAdapter, tmp_path: Path, kind: str, method: str
) -> None:
    path = make_adapter(qwen3, "one", scale=0.1, **KINDS[kind])
    copies = [load_adapter(path, name) for name in ("a", "b", "c")]
    merged = merge_adapters(copies, method, [1 / 3] * 3, None if method == "linear" else 1.0)
    save_adapter(merged, tmp_path / "merged", rank=None if method == "linear" else 8)
    expected = logits(load_peft(qwen3, path))
    torch.testing.assert_close(logits(load_peft(qwen3, tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)


def small_adapter(rank: int = 2, name: str = "small") -> Adapter:
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"model.layers.{i}.q_proj": Factors(
            torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
        )
        for i in range(2)
    }
    return Adapter(name, factors, "some/base")


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "della", "sce"])
def test_a_sparse_merge_without_a_rank_is_refused(tmp_path: Path, method: str) -> None:
    merged = merge_adapters([small_adapter(2, "a"), small_adapter(3, "b")], method, density=0.5)
    with pytest.raises(UserError, match=rf"{method} merge of model\.layers\.0\.q_proj is not low-rank.*rank.*e\.g\. 5"):
        save_adapter(merged, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_has_no_factors_needs_a_rank(bases: dict[str, Path], tmp_path: Path) -> None:
    peft_adapter(bases["tied"], tmp_path / "dora", 0, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UserError, match=r"DoRA.*give a rank"):
        save_adapter(load_adapter(tmp_path / "dora"), tmp_path / "x")
    with pytest.raises(UserError, match="rank must be at least 1"):
        save_adapter(load_adapter(tmp_path / "dora"), tmp_path / "x", rank=0)
    assert not (tmp_path / "x").exists()


def test_ranks_of_modules_with_like_names_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mot_lora.adapters.save.PADDING", 0)
    names = ["model.layers.1.q", "model.layers.11.q", "layers.1.q", "q", "model.layersX1.q"]
    ranks = dict(zip(names, (1, 2, 3, 4, 40), strict=True))
    generator = torch.Generator().manual_seed(0)
    factors = {
        n: Factors(torch.randn(r, 8, generator=generator), torch.randn(8, r, generator=generator), 0.5 * i + 1)
        for i, (n, r) in enumerate(ranks.items())
    }
    assert not save_adapter(Adapter("a", factors), tmp_path / "a").uniform
    again = load_adapter(tmp_path / "a")
    assert {n: f.rank for n, f in again.updates.items()} == ranks
    assert share_lost(dense(Adapter("a", factors)), dense(again)) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_gives_fp32_out(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = small_adapter()
    halves = {m: Factors(u.a.to(dtype), u.b.to(dtype), 1.7) for m, u in adapter.updates.items()}
    save_adapter(Adapter("a", halves), tmp_path / "a")
    assert {t.dtype for t in stored(tmp_path / "a").values()} == {torch.float32}
    assert share_lost(dense(Adapter("a", halves)), dense(load_adapter(tmp_path / "a"))) < 1e-7


def test_a_zero_update_is_saved(tmp_path: Path) -> None:
    zero = Adapter("zero", {"m.q": Factors(torch.zeros(2, 4), torch.zeros(3, 2))})
    assert save_adapter(zero, tmp_path / "a", rank=1).lost == 0
    assert not any(t.isnan().any() for t in stored(tmp_path / "a").values())


def test_the_written_config_is_one_that_peft_knows(tmp_path: Path) -> None:
    save_adapter(merge_adapters([small_adapter(2, "a"), small_adapter(3, "b")]), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(config) <= set(LoraConfig.__dataclass_fields__)
    assert config["base_model_name_or_path"] == "some/base"
    assert config["r"] == config["lora_alpha"] == 5
    assert LoraConfig.from_pretrained(str(tmp_path / "a")).target_modules == {
        "model.layers.0.q_proj",
        "model.layers.1.q_proj",
    }


def test_pack_is_what_is_saved(tmp_path: Path) -> None:
    merged = merge_adapters([small_adapter(2, "a"), small_adapter(3, "b")])
    packed, seen = pack(merged), []
    record = save_adapter(merged, tmp_path / "a", progress=lambda *said: seen.append(said))
    assert packed.record == record
    written = stored(tmp_path / "a")
    assert written.keys() == packed.tensors.keys()
    assert all(torch.equal(t, packed.tensors[k]) for k, t in written.items())
    assert seen == [("pack", 1, 2), ("pack", 2, 2)]


def test_biases_and_none_are_held_alike(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT has a bias on every layer of an adapter or on none: the others get a bias of 0."""
    peft_adapter(bases["qwen2"], tmp_path / "a", 0, target_modules=["q_proj"], lora_bias=True)
    peft_adapter(bases["qwen2"], tmp_path / "b", 1, target_modules=["q_proj", "o_proj"])
    save_adapter(merge_adapters([tmp_path / "a", tmp_path / "b"]), tmp_path / "m")
    tensors = stored(tmp_path / "m")
    biases = {k: t for k, t in tensors.items() if k.endswith("lora_B.bias")}
    assert len(biases) == 4
    assert all(bool(t.any()) is ("q_proj" in k) for k, t in biases.items())
    assert logits_of(peft_model(bases["qwen2"], m=tmp_path / "m")).isfinite().all()


# --- whole or not at all ---------------------------------------------------------------------------------


def test_a_folder_that_is_there_is_replaced(tmp_path: Path) -> None:
    save_adapter(small_adapter(2), tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    save_adapter(small_adapter(3), tmp_path / "a")
    assert {u.rank for u in load_adapter(tmp_path / "a").updates.values()} == {3}
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match="cannot be written") as e:
            save_adapter(small_adapter(), path)
        assert str(path) in str(e.value)
    assert (tmp_path / "file").read_text() == ""


def test_an_update_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    save_adapter(small_adapter(), tmp_path / "a")
    before = files_of(tmp_path / "a")

    def fails(dtype: torch.dtype) -> Tensor:
        raise UserError(f"no update in {dtype}")

    broken = Adapter(
        "b", {"m.0.q": Factors(torch.ones(1, 2), torch.ones(3, 1)), "m.1.q": Dense(torch.Size([3, 2]), fails)}
    )
    with pytest.raises(UserError, match="no update in"):
        save_adapter(broken, tmp_path / "a", rank=1)
    assert files_of(tmp_path / "a") == before


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    large = Factors(torch.randn(8, 4000, generator=generator), torch.randn(4000, 8, generator=generator))
    save_adapter(Adapter("large", {"m.q": large}), tmp_path / "large")
    save_adapter(small_adapter(), tmp_path / "out")
    before = files_of(tmp_path / "out")

    for name in ("out", "new"):
        with pytest.raises(UserError) as e, small_files(60_000):
            save_adapter(load_adapter(tmp_path / "large"), tmp_path / name)
        end = "cannot be written (File too large): is there space, and a permission?"
        assert str(e.value) == f"{tmp_path / name}: {end}"
    assert files_of(tmp_path / "out") == before
    assert not files_of(tmp_path / "new")


def test_an_exact_copy_computes_the_same(bases: dict[str, Path], tmp_path: Path) -> None:
    want = peft_adapter(bases["gpt2"], tmp_path / "a", 3, target_modules=["c_attn"], r=5, lora_alpha=3)
    save_adapter(load_adapter(tmp_path / "a"), tmp_path / "b")
    save_adapter(load_adapter(tmp_path / "b"), tmp_path / "c")
    assert stored(tmp_path / "b").keys() == stored(tmp_path / "a").keys()
    assert files_of(tmp_path / "b") == files_of(tmp_path / "c")
    got = logits_of(peft_model(bases["gpt2"], x=tmp_path / "c"))
    assert apart(got, want, logits_of(fresh(bases["gpt2"]))) < 1e-5
