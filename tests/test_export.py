import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import stored, true_updates
from transformers import AutoModelForCausalLM, AutoTokenizer

from mot_lora import UserError, export, run
from mot_lora.config import Config
from mot_lora.durable import write_record
from mot_lora.merge import dare_linear, dare_ties, seed_for, ties
from mot_lora.records import EvaluationRecord

MakeConfig = Callable[..., Config]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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
        assert export(config.output, out, round=2, dtype=dtype) == 2
        got = stored(out)
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
    assert export(finished.output, tmp_path / "best") == 2
    assert export(finished.output, tmp_path / "one", round=1, dtype=torch.float32) == 1
    for name, rounds, dtype in (("best", 2, torch.bfloat16), ("one", 1, torch.float32)):
        got = stored(tmp_path / name)
        for key, want in exact_student(qwen3, Path(finished.output), rounds).items():
            assert (got[key] != want.to(dtype)).double().mean() < 1e-3

    card = (tmp_path / "best" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "qwen3"
    assert str(qwen3.parent) not in card  # whose machine it was made on is nobody's business
    rounds = [json.loads(f.read_text()) for f in sorted(Path(finished.output).glob("round-*/round.json"))]
    for text in ("a (weight 1)", "b (weight 1)", "2 rounds", "linear", "nf4", "arXiv 2509.08814"):
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
    with pytest.raises(UserError, match="is not the model that"):
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
    with pytest.raises(UserError, match="nothing is finished"):
        export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_an_export_into_an_empty_folder_is_whole(finished: Config, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(finished.output, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_disk_that_fills_up_leaves_nothing_behind(finished: Config, tmp_path: Path) -> None:
    def small_files() -> None:  # the second shard no longer fits
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    command = [sys.executable, "-m", "mot_lora.cli", "export", finished.output, "--out", str(tmp_path / "new" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=small_files)
    assert not (tmp_path / "new" / "out").exists()
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'new' / 'out'}: cannot be written")
