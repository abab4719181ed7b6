"""A fold on disk against W_0 + D in fp64: rounded once, whole or not there, and checked by reading it back."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    MakeAdapter,
    apart,
    change_tensors,
    files_of,
    fresh,
    hashes,
    logits_of,
    peft_adapter,
    small_update,
    stored,
    true_updates,
)
from limits import small_files
from safetensors.torch import load_file, save_file
from test_updates import KINDS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mot_lora import (
    Adapter,
    Dense,
    Factors,
    UserError,
    fold_checkpoint,
    load_adapter,
    merge_adapters,
    verify_checkpoint,
)
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.fold import fold_placement
from mot_lora.checkpoints.placement import Placement
from mot_lora.merging.agreement import layer_of

INDEX = "model.safetensors.index.json"


def half_steps(got: Tensor, exact: Tensor, delta: Tensor) -> float:
    """The largest |got - exact| in halves of the distance to the next larger number of got's format.

    What is not written in fp32 is summed in it, so that delta itself is off by its rounding: that counts where W and D
    nearly cancel.
    """
    as_whole = {2: torch.int16, 4: torch.int32}[got.dtype.itemsize]
    near = exact.to(got.dtype).abs().contiguous()
    step = (near.view(as_whole) + 1).view(got.dtype).double() - near.double()
    slack = 0.0 if got.dtype == torch.float32 else float(delta.abs().max()) * 2**-20
    return float(((got.double() - exact).abs() / (step / 2 + slack)).max())


def nothing_left(folder: Path, out: str = "out") -> bool:
    return not [f for f in folder.iterdir() if f.name.lstrip(".").startswith(out)]


# --- one rounding of the exact sum -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_fold_checkpoint_rounds_the_exact_sum_once(
    student: Path, make_adapter: MakeAdapter, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    folder = make_adapter(student, "a", scale=0.05)
    out = fold_checkpoint(student, merge_adapters([load_adapter(folder)]), tmp_path / "out", dtype)
    base, got, updates = stored(student), stored(out), true_updates(folder)
    assert set(got) == set(base)
    to = dtype or torch.bfloat16
    for name, tensor in got.items():
        assert tensor.dtype == to
        update = updates.get(name.removesuffix(".weight"))
        want = (base[name].double() + (0 if update is None else update)).to(to)
        if update is None:
            assert torch.equal(tensor, base[name].to(to))
        else:
            assert (tensor != want).float().mean() < 1e-3  # ties of fp64 sums taken in another order
            torch.testing.assert_close(tensor, want, rtol=2**-7 if to == torch.bfloat16 else 2**-22, atol=1e-9)
            assert not torch.equal(tensor, base[name].to(to))

    shards = sorted(f.name for f in student.glob("*.safetensors"))
    assert sorted(f.name for f in out.glob("*.safetensors")) == shards
    index = out / "model.safetensors.index.json"
    assert index.exists() is (len(shards) > 1)
    if index.exists():
        said = json.loads(index.read_text())
        for shard in shards:
            assert {k for k, v in said["weight_map"].items() if v == shard} == set(load_file(out / shard))
        assert said["metadata"]["total_size"] == sum(t.nbytes for t in got.values())

    assert json.loads((out / "config.json").read_text())["dtype"] == str(to).removeprefix("torch.")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == to
    for name, tensor in model.state_dict().items():
        if name in got:
            assert torch.equal(tensor, got[name])
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(student).chat_template
    ids = tokenizer("1 + 1 = ?", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_a_lone_numbered_shard_can_be_loaded_again(llama: Path, tmp_path: Path) -> None:
    # as on the Hub: model-00001-of-00001.safetensors is found only through its index
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    name = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / name)
    weight_map = dict.fromkeys(stored(base), name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    AutoModelForCausalLM.from_pretrained(base)
    out = fold_checkpoint(base, small_update(base, 0.1, 0), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    want = stored(out)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.get_submodule("model.layers.0.mlp.up_proj").weight.to(want.dtype), want)


def test_integers_and_extra_tensors_are_copied_as_they_are(llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    tensors = stored(base) | {"steps": torch.tensor([2**40 + 1])}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    got = stored(fold_checkpoint(base, small_update(base, 0.1, 0), tmp_path / "out", torch.float32))
    assert got["steps"].dtype == torch.int64
    assert torch.equal(got["steps"], tensors["steps"])
    assert torch.equal(got["model.norm.weight"], tensors["model.norm.weight"].float())


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weights": [1, 3], "scale": 1.3},
    "ties": {"density": 0.4, "weights": [2, 1]},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5, "scale": 0.5},
    "della": {"density": 0.5},
    "sce": {"density": 0.5},
}


@pytest.mark.parametrize("model", ["tied", "qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_rounded_once(
    request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path: Path, method: str, model: str
) -> None:
    base = bases[model] if model in bases else request.getfixturevalue(model)
    adapters = [small_update(base, 0.3, seed).adapters[0] for seed in range(2)]
    merged = merge_adapters(adapters, method, **METHODS[method])
    before = stored(base)
    linear = [small_update(base, 0.3, seed) for seed in range(2)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = fold_checkpoint(base, merged, tmp_path / str(dtype), dtype, verify=True)
        record = verify_checkpoint(base, merged, out, dtype)
        got = stored(out)
        assert record.tensors.keys() == {f"{m}.weight" for m in merged.shapes}
        assert record.untouched == len(got) - len(record.tensors)
        assert 0.5 < record.error <= 1.01
        for name, said in record.tensors.items():
            module = name.removesuffix(".weight")
            if method == "linear":
                parts = [1.3 * w / 4 * u.delta(module, torch.float64) for w, u in zip((1, 3), linear, strict=True)]
                delta = sum(parts, torch.zeros(()))
            else:
                delta = merged.delta(module, torch.float64)
            exact = before[name].double() + delta
            assert half_steps(got[name], exact, delta) <= 1.01
            assert said.update_norm == pytest.approx(float(delta.norm()), rel=1e-5)
            change = got[name].double() - before[name].double()
            assert said.survived == pytest.approx(float((change * delta).sum() / delta.square().sum()), rel=1e-5)
            assert said.survived == pytest.approx(1, abs=0.02)
        for name in got.keys() - record.tensors.keys():
            assert torch.equal(got[name], before[name].to(dtype))


def test_where_update_and_weight_cancel_a_fold_is_right_and_verified(qwen3: Path, tmp_path: Path) -> None:
    # W is -D as near as bf16 comes: what is left is far smaller than the rounding of either in fp32
    update = small_update(qwen3, 0.5, 0)
    base = Path(shutil.copytree(qwen3, tmp_path / "base"))
    for shard in base.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.removesuffix(".weight") in update.shapes:
                tensors[name] = -update.delta(name.removesuffix(".weight")).bfloat16()
        save_file(tensors, shard, metadata={"format": "pt"})
    fold_checkpoint(base, update, tmp_path / "out", verify=True)
    got = stored(tmp_path / "out")
    for name, old in stored(base).items():
        if (module := name.removesuffix(".weight")) in update.shapes:
            delta = update.delta(module, torch.float64)
            error = (got[name].double() - (old.double() + delta)).abs()
            assert error.max() < 2**-8 * 2**-8 * delta.abs().max()  # half a step of a difference of half a step


def test_the_base_is_never_written_to(qwen3: Path, tmp_path: Path) -> None:
    before = hashes(qwen3)
    for f in qwen3.iterdir():
        f.chmod(0o444)
    fold_checkpoint(qwen3, small_update(qwen3, 0.1, 0), tmp_path / "out", verify=True)
    assert hashes(qwen3) == before


@pytest.mark.parametrize("given", [str, Path, Checkpoint.open])
def test_the_base_may_be_given_in_any_way(bases: dict[str, Path], tmp_path: Path, given: Any) -> None:
    update = small_update(bases["tied"], 0.1, 0)
    out = fold_checkpoint(given(bases["tied"]), update, str(tmp_path / "deep" / "out"))
    assert out == tmp_path / "deep" / "out"
    assert verify_checkpoint(given(bases["tied"]), update, str(out)).error <= 1.01


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_the_config_says_what_was_written(bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype | None) -> None:
    base = Path(shutil.copytree(bases["tied"], tmp_path / "base"))
    said = json.loads((base / "config.json").read_text())
    said.pop("dtype", None)
    (base / "config.json").write_text(json.dumps({**said, "torch_dtype": "float32"}))  # as older versions wrote it
    out = fold_checkpoint(base, small_update(base, 0.1, 0), tmp_path / "out", dtype)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == (dtype or torch.float32)
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype or torch.float32).removeprefix("torch.")
    assert {k: v for k, v in config.items() if "dtype" not in k} == {k: v for k, v in said.items() if "dtype" not in k}


def test_what_travels_with_the_weights_is_copied(qwen3: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(qwen3, tmp_path / "base"))
    (base / "generation_config.json").write_text('{"temperature": 0.5}')
    (base / "merges.txt").write_text("a b")
    (base / "tokenizer.model").write_bytes(b"\x00\x01")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "README.md").write_text("the base's own")
    (base / "optimizer.bin").write_bytes(b"no part of the model")
    placement = Placement.of(base, small_update(base, 0.1, 0))
    kept = fold_placement(placement, out := tmp_path / "out", lambda kept: {"README.md": f"ours: {kept.text}"})
    for name in ("generation_config.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert (out / "README.md").read_text() == f"ours: {kept.text}"
    assert not (out / "optimizer.bin").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "moe", "tied"])
def test_what_survives_is_measured_as_it_is_written(
    bases: dict[str, Path], qwen3: Path, tmp_path: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several shards, transposed weights, experts in pieces, embeddings; a block smaller than a tensor."""
    monkeypatch.setattr("mot_lora.checkpoints.fold.BLOCK", 500)
    base = bases.get(kind, qwen3)
    if dtype != torch.float32 and kind != "qwen3":
        base = fold_checkpoint(base, [], tmp_path / "base", dtype)  # W_0 lies on the grid
    targets = {"moe": ["q_proj"], "tied": ["embed_tokens", "up_proj"]}.get(kind, "all-linear")
    experts = {"target_parameters": ["mlp.experts.gate_up_proj"]} if kind == "moe" else {}
    small = 120 if kind == "qwen3" else 30  # D is a thousandth of W
    peft_adapter(base, tmp_path / "adapter", 3, r=1, target_modules=targets, **experts)
    change_tensors(tmp_path / "adapter", lambda t: t.update({k: v / small for k, v in t.items() if "lora_" in k}))
    merged = merge_adapters([load_adapter(tmp_path / "adapter", base=base)])
    placement = Placement.of(base, merged, dtype)
    kept = fold_placement(placement, out := tmp_path / "out")
    assert files_of(fold_checkpoint(base, merged, tmp_path / "again", dtype)) == files_of(out)

    before, got, sums = stored(base), stored(out), {}
    for module in merged.shapes:
        for name, piece in placement.pieces(module, torch.float64).items():
            source = placement.untied.get(name, name)
            if name in got:
                change = got[name].double() - before[source].double()
                sums.setdefault(layer_of(module), []).append((float((change * piece).sum()), float((piece**2).sum())))
    kept_in = {layer: sum(k for k, _ in s) / sum(d for _, d in s) for layer, s in sums.items()}
    assert len(kept_in) == 2 + (kind == "tied")
    all_sums = [pair for s in sums.values() for pair in s]
    assert kept.survived == pytest.approx(sum(k for k, _ in all_sums) / sum(d for _, d in all_sums), rel=1e-5)
    assert kept.worst == (min(kept_in, key=kept_in.__getitem__), pytest.approx(min(kept_in.values()), rel=1e-5))
    assert kept.faded == (dtype == torch.bfloat16)
    # of an update of a thousandth of W, fp32 rounds an entry by up to 2**-24 / 1e-3, at random
    assert kept.survived == pytest.approx(1, abs=1e-5) or dtype != torch.float32


def test_an_update_of_nothing_survives_in_no_share(qwen3: Path, tmp_path: Path) -> None:
    kept = fold_placement(Placement.of(qwen3, small_update(qwen3, 0.0, 0)), tmp_path / "out")
    assert (kept.survived, kept.worst, kept.faded, kept.text) == (None, None, False, "the update is 0")


def test_progress_counts_every_tensor(bases: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    update = small_update(bases["tied"], 0.1, 0)
    fold_checkpoint(bases["tied"], update, tmp_path / "out", verify=True, progress=lambda *said: seen.append(said))
    n = len(stored(bases["tied"]))
    assert seen == [(stage, i, n) for stage in ("write", "verify") for i in range(1, n + 1)]


# --- the ledger ------------------------------------------------------------------------------------------


def test_a_ledger_is_summed_before_it_is_rounded(qwen3: Path, tmp_path: Path) -> None:
    updates = [small_update(qwen3, 0.001, seed) for seed in range(6)]
    one = "model.layers.1.mlp.up_proj"
    alone = merge_adapters([Adapter("one", {one: updates[0].adapters[0].updates[one]})])
    ledger = [*updates, alone]
    out = fold_checkpoint(qwen3, ledger, tmp_path / "out", verify=True)
    before, got = stored(qwen3), stored(out)
    for module in updates[0].shapes:
        delta = sum((u.delta(module, torch.float64) for u in ledger if module in u.shapes), torch.zeros(()))
        assert half_steps(got[f"{module}.weight"], before[f"{module}.weight"].double() + delta, delta) <= 1.01
    assert verify_checkpoint(qwen3, ledger, out).error <= 1.01
    # folded one after the other, each is rounded: the sum is further off
    chained = qwen3
    for i, update in enumerate(ledger):
        chained = fold_checkpoint(chained, update, tmp_path / f"chained-{i}")
    with pytest.raises(UserError, match="units of rounding"):
        verify_checkpoint(qwen3, ledger, chained)


def test_an_empty_ledger_is_a_copy(bases: dict[str, Path], tmp_path: Path) -> None:
    out = fold_checkpoint(bases["gpt2"], [], tmp_path / "out", verify=True)
    before, got = stored(bases["gpt2"]), stored(out)
    assert before.keys() == got.keys()
    assert all(torch.equal(got[n], t) for n, t in before.items())
    assert verify_checkpoint(bases["gpt2"], [], out).untouched == len(before)


def test_updates_of_several_layouts_add_up(bases: dict[str, Path], tmp_path: Path) -> None:
    """In one ledger: experts, their router, attention; and of Conv1D, its bias and an embedding."""
    for model, names in (
        ("moe", ("experts", "experts and router", "all-linear of experts")),
        ("gpt2", ("Conv1D", "bias of Conv1D", "Conv1D and head", "DoRA of Conv1D")),
        ("tied", ("embedding", "head of a tied base", "tokens", "copies")),
    ):
        base = bases[model]
        w0 = fresh(base).state_dict()
        want = {n: t.double() for n, t in w0.items()}
        ledger = []
        for seed, name in enumerate(names):
            folder = tmp_path / model / name
            peft_adapter(base, folder, seed, **KINDS[name].settings)
            ledger.append(merge_adapters([load_adapter(folder, base=base)]))
            alone = fold_checkpoint(base, ledger[-1], tmp_path / model / f"{name} folded")
            for n, t in fresh(alone).state_dict().items():
                want[n] += t.double() - w0[n].double()
        out = fold_checkpoint(base, ledger, tmp_path / model / "out", verify=True)
        for n, t in fresh(out).state_dict().items():
            torch.testing.assert_close(t.double(), want[n], rtol=1e-5, atol=2e-6)


# --- shards ----------------------------------------------------------------------------------------------


def test_experts_that_lie_in_several_shards(bases: dict[str, Path], tmp_path: Path) -> None:
    model = fresh(bases["moe"])
    model.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    shards = {f.name: set(load_file(f)) for f in (tmp_path / "base").glob("*.safetensors")}
    of_one = [s for s, names in shards.items() if any("layers.0.mlp.experts" in n for n in names)]
    assert len(of_one) > 2
    peft_adapter(bases["moe"], tmp_path / "adapter", 0, **KINDS["experts"].settings)
    merged = merge_adapters([load_adapter(tmp_path / "adapter", base=bases["moe"])])
    out = fold_checkpoint(tmp_path / "base", merged, tmp_path / "out", verify=True)
    whole = fold_checkpoint(bases["moe"], merged, tmp_path / "whole")
    assert {f.name: set(load_file(f)) for f in out.glob("*.safetensors")} == shards
    got, want = stored(out), stored(whole)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], t) for n, t in want.items())
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == sum(t.nbytes for t in got.values())
    assert torch.equal(logits_of(fresh(out)), logits_of(fresh(whole)))


def test_a_new_head_is_in_the_index(qwen3: Path, tmp_path: Path) -> None:
    head = Factors(torch.ones(1, 64), torch.ones(stored(qwen3)["model.embed_tokens.weight"].shape[0], 1) * 0.01)
    out = fold_checkpoint(qwen3, merge_adapters([Adapter("a", {"lm_head": head})]), tmp_path / "out", verify=True)
    index = json.loads((out / INDEX).read_text())
    where = {n: f.name for f in out.glob("*.safetensors") for n in load_file(f)}
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(out).values())
    assert where.keys() - stored(qwen3).keys() == {"lm_head.weight"}
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


# --- tied weights ----------------------------------------------------------------------------------------

TIED = "tie_word_embeddings"


def embedding_and_head(embed: Tensor | None, head: Tensor | None) -> Any:
    """A merge that updates the embedding, the head or both, of the tied base."""
    column = torch.linspace(-1, 1, 16)[None]
    updates = {}
    if embed is not None:
        updates["model.embed_tokens"] = Factors(column, embed, form="embedding")
    if head is not None:
        updates["lm_head"] = Factors(column, head)
    return merge_adapters([Adapter("a", updates)])


@pytest.mark.parametrize("both_stored", [False, True])
@pytest.mark.parametrize(
    ("embed", "head", "tied"),
    [(1.0, None, False), (None, 1.0, False), (1.0, 2.0, False), (1.0, 1.0, True)],
    ids=["embedding", "head", "both, unlike", "both, alike"],
)
def test_a_tie_goes_when_its_ends_differ_and_stays_when_not(
    bases: dict[str, Path], tmp_path: Path, embed: float | None, head: float | None, tied: bool, both_stored: bool
) -> None:
    base = Path(shutil.copytree(bases["tied"], tmp_path / "base"))
    if both_stored:  # as some checkpoints have it
        tensors = stored(base)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    rows = torch.linspace(1, 2, 40)[:, None]
    merged = embedding_and_head(*(None if x is None else rows * x for x in (embed, head)))
    out = fold_checkpoint(base, merged, tmp_path / "out", torch.bfloat16, verify=True)
    assert json.loads((out / "config.json").read_text())[TIED] is tied
    assert ("lm_head.weight" in stored(out)) is (both_stored or not tied)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    old, column = stored(bases["tied"])["model.embed_tokens.weight"].double(), torch.linspace(-1, 1, 16).double()[None]
    for got, size in ((model.model.embed_tokens.weight, embed or 0), (model.lm_head.weight, head or 0)):
        assert torch.equal(got.detach(), (old + size * rows.double() * column).bfloat16().float())
    assert verify_checkpoint(base, merged, out, torch.bfloat16).error <= 1.01


def test_a_ledger_keeps_a_tie_only_if_all_of_it_does(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = torch.linspace(1, 2, 40)[:, None]
    alike, head = embedding_and_head(rows, rows), embedding_and_head(None, rows)
    for name, ledger, tied in (("alike", [alike, alike], True), ("apart", [alike, head], False)):
        out = fold_checkpoint(bases["tied"], ledger, tmp_path / name, verify=True)
        assert json.loads((out / "config.json").read_text())[TIED] is tied
        model = fresh(out)
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) is tied


def test_linear_layers_alone_leave_the_tie(bases: dict[str, Path], tmp_path: Path) -> None:
    out = fold_checkpoint(bases["tied"], small_update(bases["tied"], 0.1, 0), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())[TIED] is True
    assert "lm_head.weight" not in stored(out)


# --- verify ----------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj.weight"


def flip(tensor: Tensor, at: int, bit: int) -> None:
    """Turn one bit of one entry over."""
    as_whole = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    entries = tensor.view(as_whole).view(-1)
    one = torch.ones((), dtype=as_whole)
    entries[at] ^= one << bit


def precise(tensor: Tensor, exact: Tensor) -> int:
    """The entry that is nearest to what was to be rounded."""
    return int((tensor.double() - exact).abs().flatten().argmin())


@pytest.fixture
def folded(bases: dict[str, Path], tmp_path: Path) -> tuple[Path, Any, Path]:
    base = bases["untied"]
    update = small_update(base, 0.1, 0)
    return base, update, fold_checkpoint(base, update, tmp_path / "out", torch.bfloat16)


def broken(folded: tuple[Path, Any, Path], change: Callable[[dict[str, Tensor]], object]) -> str:
    base, update, out = folded
    assert verify_checkpoint(base, update, out, torch.bfloat16).error <= 1.01
    tensors = stored(out)
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as e:
        verify_checkpoint(base, update, out, torch.bfloat16)
    assert str(out) in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("bit", [0, 6, 9, 15])  # the last of the mantissa, its first, one of the exponent, the sign
def test_a_bit_of_an_updated_tensor_is_found(folded: tuple[Path, Any, Path], bit: int) -> None:
    base, update, _ = folded
    exact = stored(base)[Q].double() + update.delta(Q.removesuffix(".weight"), torch.float64)
    message = broken(folded, lambda t: flip(t[Q], precise(t[Q], exact), bit))
    assert Q in message
    assert "units of rounding" in message


@pytest.mark.parametrize("bit", [0, 15])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_bit_of_any_other_tensor_is_found(folded: tuple[Path, Any, Path], name: str, bit: int) -> None:
    message = broken(folded, lambda t: flip(t[name], 7, bit))
    assert f"{name} is not the base's" in message


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [Q, "model.norm.weight"])
def test_what_is_not_a_number_is_found(folded: tuple[Path, Any, Path], name: str, number: float) -> None:
    assert name in broken(folded, lambda t: t[name].view(-1)[3].fill_(number))


def test_tensors_that_are_missing_or_too_many_are_found(folded: tuple[Path, Any, Path]) -> None:
    assert Q in broken(folded, lambda t: t.pop(Q))
    base, update, out = folded
    again = fold_checkpoint(base, update, out.with_name("again"), torch.bfloat16)
    assert "extra" in broken((base, update, again), lambda t: t.update(extra=torch.ones(2)))


def test_tensors_that_changed_places_are_found(folded: tuple[Path, Any, Path]) -> None:
    other = Q.replace("layers.1", "layers.0")

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors[Q], tensors[other] = tensors[other], tensors[Q]

    assert "q_proj.weight" in broken(folded, swap)


@pytest.mark.parametrize("name", [Q, "model.norm.weight"])
def test_another_dtype_or_shape_is_found(folded: tuple[Path, Any, Path], name: str) -> None:
    assert name in broken(folded, lambda t: t.update({name: t[name].half()}))
    base, update, out = folded
    again = fold_checkpoint(base, update, out.with_name("again"), torch.bfloat16)
    assert name in broken((base, update, again), lambda t: t.update({name: t[name].reshape(-1, 2)}))


def test_another_merge_or_base_is_found(folded: tuple[Path, Any, Path], bases: dict[str, Path]) -> None:
    base, update, out = folded
    for other in (small_update(base, 0.1, 1), small_update(base, 0.11, 0), [], [update, small_update(base, 0.01, 1)]):
        with pytest.raises(UserError, match=r"_proj\.weight"):
            verify_checkpoint(base, other, out, torch.bfloat16)
    with pytest.raises(UserError, match="missing, or should not be there"):
        verify_checkpoint(bases["tied"], update, out, torch.bfloat16)
    with pytest.raises(UserError, match="no"):
        verify_checkpoint(base, update, out.with_name("nothing"), torch.bfloat16)


def test_a_tie_that_is_not_undone_in_the_config_is_found(bases: dict[str, Path], tmp_path: Path) -> None:
    merged = embedding_and_head(None, torch.ones(40, 1))
    out = fold_checkpoint(bases["tied"], merged, tmp_path / "out", verify=True)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, TIED: True}))
    with pytest.raises(UserError, match=TIED):
        verify_checkpoint(bases["tied"], merged, out)


def test_a_number_too_large_for_the_format_is_found(bases: dict[str, Path], tmp_path: Path) -> None:
    big = Factors(torch.ones(1, 16) * 300, torch.ones(16, 1) * 300)
    merged = merge_adapters([Adapter("a", {"model.layers.0.self_attn.q_proj": big})])
    fold_checkpoint(bases["tied"], merged, tmp_path / "wide", torch.bfloat16, verify=True)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        fold_checkpoint(bases["tied"], merged, tmp_path / "out", torch.float16, verify=True)
    assert nothing_left(tmp_path)


def unlike_each_time(deltas: Tensor, weights: list[float]) -> Tensor:
    return deltas[0] * torch.rand(()) * weights[0]


def test_a_fold_that_does_not_verify_leaves_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    merged = merge_adapters(small_update(bases["tied"], 0.5, 0).adapters, unlike_each_time)
    with pytest.raises(UserError, match="units of rounding"):
        fold_checkpoint(bases["tied"], merged, tmp_path / "out", verify=True)
    assert nothing_left(tmp_path)


# --- whole or not there ----------------------------------------------------------------------------------


def test_nothing_is_overwritten(bases: dict[str, Path], tmp_path: Path) -> None:
    base, update = bases["tied"], small_update(bases["tied"], 0.1, 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for taken in (tmp_path / "full", tmp_path / "full" / "mine", base):
        with pytest.raises(UserError, match="exists") as e:
            fold_checkpoint(base, update, taken)
        assert str(taken) in str(e.value)
    assert files_of(tmp_path) == {"full/mine": b"mine"}
    (tmp_path / "empty").mkdir()
    fold_checkpoint(base, update, tmp_path / "empty")
    AutoModelForCausalLM.from_pretrained(tmp_path / "empty")


def test_a_place_that_cannot_be_written_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written") as e:
        fold_checkpoint(bases["tied"], small_update(bases["tied"], 0.1, 0), tmp_path / "file" / "out")
    assert str(tmp_path / "file" / "out") in str(e.value)
    assert files_of(tmp_path) == {"file": b"mine"}


def test_a_disk_that_fills_up_leaves_nothing_behind(qwen3: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(qwen3, "adapter")
    size = sorted(f.stat().st_size for f in qwen3.glob("*.safetensors"))
    limit = (size[-1] + size[-2]) // 2  # a later shard no longer fits
    assert size[0] < limit < size[-1]

    out = tmp_path / "new" / "out"
    with pytest.raises(UserError) as e, small_files(limit):
        fold_checkpoint(qwen3, merge_adapters([adapter]), out)
    assert str(e.value) == f"{out}: cannot be written (File too large): is there space, and a permission?"
    assert not files_of(tmp_path / "new")
    assert not out.exists()


def test_a_fold_that_is_stopped_leaves_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt(stage)

    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(bases["tied"], small_update(bases["tied"], 0.1, 0), tmp_path / "out", progress=stop)
    assert nothing_left(tmp_path)


def fails(dtype: torch.dtype) -> Tensor:
    raise UserError(f"no update in {dtype}")


REFUSED: dict[str, tuple[Callable[[], Adapter], str]] = {
    "another shape": (
        lambda: Adapter("a", {"model.layers.0.self_attn.q_proj": Factors(torch.ones(1, 3), torch.ones(5, 1))}),
        r"q_proj\.weight is \[16, 16\].*`a`.*\[5, 3\]; is this their base model\?",
    ),
    "a layer too many": (
        lambda: Adapter("a", {"model.layers.7.mlp.up_proj": Factors(torch.ones(1, 16), torch.ones(24, 1))}),
        r"has no model\.layers\.7\.mlp\.up_proj.*`a`",
    ),
    "another model": (
        lambda: Adapter("a", {"transformer.h.0.attn.c_attn": Factors(torch.ones(1, 16), torch.ones(48, 1))}),
        r"has no transformer\.h\.0\.attn\.c_attn.*`a`",
    ),
    "a bias": (
        lambda: Adapter(
            "a",
            {
                "model.layers.0.mlp.up_proj": Factors(torch.ones(1, 16), torch.ones(24, 1)),
                "model.layers.0.mlp.up_proj.bias": Dense(torch.Size([24]), lambda _: torch.ones(24), "bias"),
            },
        ),
        r"has no model\.layers\.0\.mlp\.up_proj\.bias: its layer has no bias.*`a`",
    ),
    "a layer it says it has": (
        lambda: Adapter(
            "a",
            {"model.layers.0.mlp.up_proj": Factors(torch.ones(1, 16), torch.ones(24, 1))},
            targets={"target_modules": ["up_proj"]},
        ),
        r"adapter `a`: its config asks for model\.layers\.1\.mlp\.up_proj\.weight, but it holds nothing for it",
    ),
    "an update that fails": (
        lambda: Adapter("a", {"model.layers.0.mlp.up_proj": Dense(torch.Size([24, 16]), fails)}),
        "no update in",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_and_leaves_nothing(bases: dict[str, Path], tmp_path: Path, what: str) -> None:
    make, pattern = REFUSED[what]
    good = small_update(bases["tied"], 0.1, 0)
    for ledger in ([merge_adapters([make()])], [good, merge_adapters([make()])]):
        with pytest.raises(UserError, match=pattern) as e:
            fold_checkpoint(bases["tied"], ledger, tmp_path / "out", verify=True)
        assert "\n" not in str(e.value)
        assert nothing_left(tmp_path)


def test_a_module_that_is_missing_in_the_middle_is_found(
    qwen3: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    for name, settings in (
        ("all", {}),
        ("two", {"target_modules": ["q_proj", "v_proj"]}),
        ("regex", {"target_modules": r".*\.(q|k|v)_proj"}),
        ("layers", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
        ("but", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ):
        folder = make_adapter(qwen3, name, **settings)
        fold_checkpoint(qwen3, merge_adapters([folder]), tmp_path / f"{name} folded")
        gone = "model.layers.1.self_attn.v_proj"
        change_tensors(folder, lambda t, gone=gone: [t.pop(k) for k in list(t) if gone in k])
        with pytest.raises(UserError, match=rf"adapter `{name}`: its config asks for {gone}"):
            fold_checkpoint(qwen3, merge_adapters([folder]), tmp_path / "out")
        assert nothing_left(tmp_path)


def test_a_checkpoint_whose_class_transformers_does_not_have_is_folded_by_its_stored_names(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(bases["untied"], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysModel"]}))
    fold_checkpoint(base, small_update(base, 0.1, 0), tmp_path / "plain", verify=True)
    peft_adapter(bases["untied"], tmp_path / "adapter", 0, target_modules=["lm_head", "q_proj"])
    merged = merge_adapters([load_adapter(tmp_path / "adapter", base=base)])
    want = stored(fold_checkpoint(bases["untied"], merged, tmp_path / "known"))
    got = stored(fold_checkpoint(base, merged, tmp_path / "unknown", verify=True))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysModel"]}))
    with pytest.raises(UserError, match=r"transformers does not know `NobodysModel`.*lm_head\.weight is tied"):
        fold_checkpoint(base, merged, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_fold_computes_what_the_live_sum_does(bases: dict[str, Path], tmp_path: Path) -> None:
    """Two adapters of unlike ranks and modules against weights that were added by hand, in fp32."""
    peft_adapter(bases["qwen2"], tmp_path / "a", 0, r=3, lora_alpha=5, target_modules="all-linear")
    peft_adapter(bases["qwen2"], tmp_path / "b", 1, r=2, lora_alpha=7, target_modules=["q_proj", "up_proj"])
    merged = merge_adapters([tmp_path / "a", tmp_path / "b"], weights=[1, 3])
    out = fold_checkpoint(bases["qwen2"], merged, tmp_path / "out", verify=True)
    by_hand = fresh(bases["qwen2"]).double()
    with torch.no_grad():
        for name, share in (("a", 0.25), ("b", 0.75)):
            for module, delta in true_updates(tmp_path / name).items():
                by_hand.get_submodule(module).weight += share * delta
    assert apart(logits_of(fresh(out)), logits_of(by_hand), logits_of(fresh(bases["qwen2"]))) < 1e-5
