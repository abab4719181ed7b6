import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import logits_of, refused, stored, true_updates
from limits import small_files
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from mot_lora import UserError, export, export_adapter
from mot_lora.config import Config
from mot_lora.durable import write_record
from mot_lora.merging.methods import dare_linear, dare_ties, ties
from mot_lora.merging.seeds import seed_for
from mot_lora.records import EvaluationRecord
from mot_lora.runs.distillation import run

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

MakeConfig = Callable[..., Config]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Tensors = dict[str, torch.Tensor]


def exact_student(base: Path, out: Path, rounds: int) -> dict[str, torch.Tensor]:
    """W_0 + the ledger in fp64, from the base and the run's files alone."""
    total = {n: t.double() for n, t in stored(base).items()}
    for number in range(1, rounds + 1):
        record = json.loads((out / f"round-{number:03d}" / "round.json").read_text())
        branches = [true_updates(out / f"round-{number:03d}" / t) for t in record["teachers"]]
        weights, settings = record["weights"], {"density": record["density"], "scale": record["scale"]}
        for module in branches[0]:
            deltas = torch.stack([b[module] for b in branches])
            if record["method"] == "linear":
                shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
                update = record["scale"] * (shares.view(-1, 1, 1) * deltas).sum(0)
            elif record["method"] == "ties":
                update = ties(deltas, weights, **settings)
            else:
                method = {"dare_linear": dare_linear, "dare_ties": dare_ties}[record["method"]]
                seeds = [seed_for(record["seed"], t, module) for t in record["teachers"]]
                generators = [torch.Generator().manual_seed(s) for s in seeds]
                update = method(deltas, weights, **settings, generator=generators)
            assert update.dtype == torch.float64
            total[f"{module}.weight"] += update
    return total


def shares_kept(base: Tensors, exact: Tensors, got: Tensors) -> tuple[float, dict[str, float]]:
    """<change, D> / |D|^2, in all and by layer."""
    kept: dict[str, float] = {}
    square: dict[str, float] = {}
    for name in (n for n in got if "_proj" in n):
        layer, before = name[: name.index(".", len("model.layers."))], base[name].double()
        change, d = got[name].double() - before, exact[name] - before
        kept[layer] = kept.get(layer, 0.0) + float((change * d).sum())
        square[layer] = square.get(layer, 0.0) + float(d.square().sum())
    return sum(kept.values()) / sum(square.values()), {layer: kept[layer] / square[layer] for layer in kept}


@pytest.mark.parametrize(
    ("model", "merge"),
    [
        ("qwen3", {"weights": [1, 3], "scale": 1.3}),
        ("llama", {}),
        ("qwen3", {"method": "ties", "density": 0.4, "scale": 0.7}),
        ("qwen3", {"method": "dare_linear", "density": 0.5}),
        ("llama", {"method": "dare_ties", "density": 0.5, "weights": [2, 1]}),
    ],
)
def test_an_export_is_w0_plus_the_ledger_rounded_once(
    request: pytest.FixtureRequest, make_config: MakeConfig, tmp_path: Path, model: str, merge: dict[str, Any]
) -> None:
    base: Path = request.getfixturevalue(model)
    config = make_config(student=str(base), merge=merge, eval={"branches": False, "holdout": 0.2})
    run(config)
    exact, base_tensors = exact_student(base, Path(config.output), 2), stored(base)
    for dtype in DTYPES.values():
        out = tmp_path / "export" / str(dtype)
        said = export(config.output, out, round=2, dtype=dtype)
        assert (said.round, said.form, f"torch.{said.dtype}", said.rank) == (2, "checkpoint", str(dtype), None)
        got = stored(out)
        survived, layers = shares_kept(base_tensors, exact, got)
        assert said.survived == pytest.approx(survived, rel=1e-5)
        assert said.worst is not None
        assert said.worst[1] == pytest.approx(layers[said.worst[0]], rel=1e-5) == pytest.approx(min(layers.values()))
        assert got.keys() == exact.keys()
        changed = off = entries = 0
        for name, tensor in got.items():
            assert tensor.dtype == dtype
            want = exact[name].to(dtype)
            if "_proj" not in name:
                assert torch.equal(tensor, want)
                continue
            # sums of fp64 in another order may fall on the other side of a tie
            off += int((tensor != want).sum())
            entries += tensor.numel()
            changed += int((tensor != base_tensors[name].to(dtype)).sum())
            torch.testing.assert_close(
                tensor.double(), exact[name], rtol=2**-8 if dtype.itemsize == 2 else 2**-23, atol=1e-9
            )
        assert off <= entries / 10_000
        assert changed > entries / 2
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert loaded.dtype == dtype
        tokenizer = AutoTokenizer.from_pretrained(out)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "1 + 1 = ?"}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt")
        new = loaded.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert new.shape[1] == ids["input_ids"].shape[1] + 4


@pytest.fixture
def finished(make_config: MakeConfig) -> Config:
    """Two rounds whose held-out loss falls, so that the second is best."""
    config = make_config(eval={"branches": False, "holdout": 0.3}, stop={"metric": "loss"})
    assert run(config).best == 2
    return config


def test_a_student_is_exported_by_round_with_its_card(finished: Config, qwen3: Path, tmp_path: Path) -> None:
    best = export(finished.output, tmp_path / "best")
    assert (best.round, best.dtype) == (2, "bfloat16")
    assert export(finished.output, tmp_path / "one", round=1, dtype=torch.float32).round == 1
    for name, rounds, dtype in (("best", 2, torch.bfloat16), ("one", 1, torch.float32)):
        got = stored(tmp_path / name)
        for key, want in exact_student(qwen3, Path(finished.output), rounds).items():
            assert (got[key] != want.to(dtype)).double().mean() < 1e-3

    card = (tmp_path / "best" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "qwen3"
    assert str(qwen3.parent) not in card  # whose machine it was made on is nobody's business
    rounds = [json.loads(f.read_text()) for f in sorted(Path(finished.output).glob("round-*/round.json"))]
    kept = f"In bfloat16 {best.survived:.4f} of the update survived"
    for text in ("a (weight 1)", "b (weight 1)", "2 rounds", "linear", "nf4", "arXiv 2509.08814", kept):
        assert text in card
    for r in rounds:
        losses = list(r["evaluation"]["losses"].values())
        assert f"{sum(losses) / 2:.3f}" in card
    assert "after round 2" not in (tmp_path / "one" / "README.md").read_text()


def test_an_export_refuses_what_it_cannot_do(finished: Config, qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="round 3 is not finished"):
        export(finished.output, tmp_path / "out", round=3)
    with pytest.raises(UserError, match="not a run"):
        export(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for taken in (tmp_path / "full", tmp_path / "full" / "mine"):
        with pytest.raises(UserError, match="exists"):
            export(finished.output, taken)
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["mine"]

    # a base with one other bit, under the name that the run was begun with
    copy = tmp_path / "moved"
    shutil.copytree(finished.output, copy)
    other = Path(shutil.copytree(qwen3, tmp_path / "qwen3"))
    shard = max(other.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**said, "student": str(other)}))
    with pytest.raises(UserError, match="not the model that"):
        export(copy, tmp_path / "out")

    # an adapter with one other bit
    (copy / "config.yaml").write_text(yaml.safe_dump(said))
    weights = copy / "round-001" / "b" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"round-001/b/adapter_model\.safetensors: damaged \(its checksum"):
        export(copy, tmp_path / "out")
    weights.write_bytes(whole)

    # the record of the first round says that nothing got better
    before = copy / "before.json"
    said = EvaluationRecord.model_validate({k: v for k, v in json.loads(before.read_text()).items() if k != "sha256"})
    write_record(before, said.model_copy(update={"losses": {"a": 0.1}}))
    with pytest.raises(UserError, match="no round is better"):
        export(copy, tmp_path / "out")
    before.unlink()
    with pytest.raises(UserError, match="no part of this run is finished"):
        export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_an_export_into_an_empty_folder_is_whole(finished: Config, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(finished.output, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_disk_that_fills_up_leaves_nothing_behind(finished: Config, tmp_path: Path, call: Any) -> None:
    with small_files(60_000):  # the second shard no longer fits
        status, _, err = call("export", finished.output, "--out", tmp_path / "new" / "out")
    assert status == 2
    assert re.fullmatch(rf"error: {tmp_path / 'new' / 'out'}: cannot be written .+\n", err)
    assert not (tmp_path / "new" / "out").exists()
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


# --- what rounds away, and what keeps it ---------------------------------------------------------------------


def test_an_export_says_that_a_small_update_rounds_away(make_config: MakeConfig, tmp_path: Path, call: Any) -> None:
    """|D|/|W| of a thousandth: bf16 keeps half of it, fp32 and an adapter all."""
    config = lean(make_config, rounds=1, branch={**LEAN, "learning_rate": 1e-4})
    out = tmp_path / "student"
    status, said, _ = call("export", config.output, "--round", 1, "--out", out)
    assert status == 0
    survived, layers = shares_kept(
        stored(Path(config.student)), exact_student(Path(config.student), Path(config.output), 1), stored(out)
    )
    assert 0.1 < survived < 0.9
    worst = min(layers, key=layers.__getitem__)
    line = f"{survived:.4f} of the update survived, {layers[worst]:.4f} in {worst}"
    assert said.splitlines()[-2:] == [
        f"round 1 in bfloat16: {out}",
        f"{line}: the rest rounded away; --dtype float32 keeps it, and so does --as lora, as an adapter",
    ]
    assert f"In bfloat16 {line}." in (out / "README.md").read_text()
    for name, arguments in (("wide", ("--dtype", "float32")), ("adapter", ("--as", "lora"))):
        status, said, _ = call("export", config.output, "--round", 1, "--out", tmp_path / name, *arguments)
        assert (status, said.splitlines()[-1][:27]) == (0, "1.0000 of the update surviv")
        assert "rounded away" not in said


LEAN = {"steps": 2, "batch_size": 1, "gradient_accumulation": 1, "learning_rate": 1e-2, "max_length": 128}


def lean(make_config: MakeConfig, **settings: Any) -> Config:
    """A run that is finished, and soon."""
    plain = {"data": make_config().eval.data, "branches": False, "limit": 1, "max_new_tokens": 1, "holdout": 0.1}
    branch = {**LEAN, "activation_checkpointing": False}
    config = make_config(**{"branch": branch, "eval": plain, **settings})
    run(config)
    return config


LEDGERS: dict[str, dict[str, Any]] = {
    "mean": {},
    "weights": {"weights": [1, 3], "scale": 1.3},
    "momentum": {"momentum": 0.5, "scale": {"mlp.*": 2.0}, "weights": [{"q_proj": 0.5}, 2]},
    "core": {"method": "ties", "density": 0.5, "space": "core"},
}


@pytest.mark.parametrize("merge", LEDGERS)
def test_an_adapter_of_all_rounds_is_the_fp32_student(
    make_config: MakeConfig, qwen3: Path, tmp_path: Path, merge: str
) -> None:
    config = lean(make_config, merge=LEDGERS[merge], lora={"r": 3, "alpha": 7, "rslora": merge == "mean"})
    out = tmp_path / "adapter"
    said = export_adapter(config.output, out, round=2)
    assert said.model_dump() == {
        "survived": 1.0, "worst": said.worst, "round": 2, "form": "lora", "dtype": "float32", "rank": 12
    }  # fmt: skip
    assert said.worst is not None
    assert said.worst[1] == 1
    export(config.output, tmp_path / "student", round=2, dtype=torch.float32)
    base, student = stored(qwen3), stored(tmp_path / "student")
    tensors, settings = stored(out), json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (12, 12, {})
    assert settings["base_model_name_or_path"] == config.student
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    modules = {n.removesuffix(".weight"): n for n in base if "_proj" in n}
    assert len(tensors) == 2 * len(modules)
    for module, name in modules.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        d = student[name].double() - base[name].double()
        assert float((b @ a - d).norm() / d.norm()) < 1e-4  # what fp32 leaves of W_0 + D - W_0
    exact = ledger_by_hand(config)
    for module, d in exact.items() if merge != "core" else ():
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        assert float((b @ a - d).norm() / d.norm()) < 1e-6

    want = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32))
    live = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config.student, dtype=torch.float32), str(out)
    )
    assert {m.scaling["default"] for m in live.modules() if isinstance(m, LoraLayer)} == {1.0}
    torch.testing.assert_close(logits_of(live), want, rtol=1e-4, atol=1e-5)
    with live.disable_adapter():
        assert float((logits_of(live) - want).abs().max()) > 100 * 1e-5
    card = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert (card["library_name"], card["base_model"]) == ("peft", "qwen3")


def ledger_by_hand(config: Config) -> Tensors:
    """The sum of scaled B @ A over rounds and teachers, in fp64, of a linear run of two rounds."""
    total: Tensors = {}
    m = config.merge.momentum
    for number, velocity in ((1, 1 + m + m**2), (2, 1 + m)):
        record = json.loads((Path(config.output) / f"round-{number:03d}" / "round.json").read_text())
        branches = [true_updates(Path(config.output) / f"round-{number:03d}" / t) for t in record["teachers"]]
        said = json.loads((Path(config.output) / "round-001" / "a" / "adapter_config.json").read_text())
        root = said["r"] ** 0.5 if said["use_rslora"] else 1.0

        def setting(value: Any, module: str) -> float:
            if not isinstance(value, dict):
                return value
            return next((x for pattern, x in value.items() if pattern.removesuffix(".*") in module), 1.0)

        for module in branches[0]:
            w = [setting(x, module) for x in record["weights"]]
            mean = sum(x * root * b[module] for x, b in zip(w, branches, strict=True)) / sum(w)
            step = velocity * setting(record["scale"], module) * mean
            total[module] = total[module] + step if module in total else step
    return total


@pytest.mark.parametrize("merge", [{"method": "ties", "density": 0.4}, {"weights": [2, 1]}], ids=["ties", "linear"])
def test_an_adapter_of_a_smaller_rank_says_what_it_keeps(
    make_config: MakeConfig, qwen3: Path, tmp_path: Path, merge: dict[str, Any], call: Any
) -> None:
    config = lean(make_config, merge=merge)
    status, out, _ = call(
        "export", config.output, "--round", 2, "--as", "lora", "--rank", 3, "--out", tmp_path / "a", "--json"
    )
    assert status == 0
    said = json.loads(out)
    exact, base = exact_student(qwen3, Path(config.output), 2), stored(qwen3)
    d = {n.removesuffix(".weight"): exact[n] - base[n].double() for n in base if "_proj" in n}
    squares = {m: torch.linalg.svdvals(x).square() for m, x in d.items()}
    kept = {m: float(s[:3].sum() / s.sum()) for m, s in squares.items()}
    whole = sum(float(s[:3].sum()) for s in squares.values()) / sum(float(s.sum()) for s in squares.values())
    assert said["survived"] == pytest.approx(whole, abs=1e-6)
    assert said["worst"][1] == pytest.approx(kept[said["worst"][0]], abs=1e-6) == pytest.approx(min(kept.values()))
    assert {k: said[k] for k in ("out", "round", "form", "dtype", "rank")} == {
        "out": str(tmp_path / "a"), "round": 2, "form": "lora", "dtype": "float32", "rank": 3
    }  # fmt: skip
    tensors = stored(tmp_path / "a")
    for module, x in d.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{y}.weight"].double() for y in "AB")
        assert float((x - b @ a).square().sum() / x.square().sum()) == pytest.approx(1 - kept[module], abs=1e-6)
    text = f"As this adapter of the base, of rank 3, {whole:.4f} of the update survived"
    assert text in (tmp_path / "a" / "README.md").read_text()


def test_adapters_that_cannot_be_written_are_refused(make_config: MakeConfig, tmp_path: Path, call: Any) -> None:
    config = lean(make_config, merge={"method": "ties", "density": 0.4})
    lora = ("export", config.output, "--round", 2, "--out", tmp_path / "out", "--as", "lora")
    assert "a ties merge is not low-rank; give a rank, e.g. --rank 16, the sum of the branches' ranks" in refused(
        call(*lora)
    )
    assert "--dtype bfloat16: an adapter is written in float32" in refused(call(*lora, "--dtype", "bfloat16"))
    assert "--rank 2: a checkpoint has no rank; add --as lora" in refused(call(*lora[:-2], "--rank", 2))
    assert "rank" in refused(call(*lora, "--rank", 0))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    taken = ("export", config.output, "--round", 2, "--as", "lora", "--rank", 2, "--out", tmp_path / "taken")
    assert "taken: exists" in refused(call(*taken))
    assert [f.name for f in (tmp_path / "taken").iterdir()] == ["mine"]
    assert "round 3 is not finished" in refused(call(*lora, "--rank", 2, "--round", 3))
    assert not (tmp_path / "out").exists()
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_an_adapter_on_a_full_disk_leaves_nothing_behind(finished: Config, tmp_path: Path, call: Any) -> None:
    with small_files(10_000):
        status, _, err = call("export", finished.output, "--as", "lora", "--out", tmp_path / "new" / "out")
    assert status == 2
    assert re.fullmatch(rf"error: {tmp_path / 'new' / 'out'}: cannot be written .+\n", err)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())
