"""`mot-lora compare` as one calls it: what it prints, writes and refuses."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import refused

from mot_lora.analysis.comparison import Comparison, summarize
from mot_lora.analysis.outcomes import ArmRun

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

SMALL = ["rounds=1", "branch.steps=1", "branch.gradient_accumulation=1", "eval.limit=2", "eval.max_new_tokens=2"]


def test_a_comparison_is_told_written_and_told_again(call: Any, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    asked = ["compare", config_file, *SMALL, "--arms", "base,std,linear", "--seeds", "0,1", "--out", out]
    status, printed, error = call(*asked)
    assert (status, error) == (0, "")
    assert "seed 1, linear, round 1, fold" in printed
    for title in ("accuracy, the same steps per branch", "accuracy, the same total branch-steps", "cost of one seed"):
        assert title in printed
    assert printed.rstrip().endswith(f"comparison: {out} (open compare.html)")

    written = json.loads((out / "compare.json").read_text())
    runs = [ArmRun.model_validate(r) for r in written["runs"]]
    assert {(r.arm, r.seed) for r in runs} == {(a, s) for a in ("base", "std:a", "std:b", "linear") for s in (0, 1)}
    assert Comparison.model_validate(written["comparison"]) == summarize(runs)
    assert str(config_file) in written["settings"]["Command"]
    assert written["settings"]["Config"] == config_file.read_text()
    rows = list(csv.DictReader((out / "compare.csv").read_text().splitlines()))
    # base and linear stand in both budgets, a single teacher once in each
    assert len(rows) == 2 * 2 * (1 + 1 + 2)
    page = (out / "compare.html").read_text()
    assert "<script" not in page
    assert "STD a" in page

    record = {f: f.stat().st_mtime_ns for f in out.glob("seed-*/*/round-*/round.json")}
    status, printed, error = call(*asked, "--json")
    assert status == 0
    told = json.loads(printed)
    assert told.pop("out") == str(out)
    assert Comparison.model_validate(told) == summarize(runs)
    assert {f: f.stat().st_mtime_ns for f in out.glob("seed-*/*/round-*/round.json")} == record
    status, printed, error = call(*asked, "--quiet")
    assert (status, printed, error) == (0, f"comparison: {out} (open compare.html)\n", "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seeds", "0,x"], "--seeds 0,x: give whole numbers"),
        (["--seeds", "1,1"], "--seeds 1,1: a seed is repeated; give each once"),
        (["--arms", "std,mdt"], "unknown arm `mdt`; known arms: base, std, mtd"),
        (["--arms", "vote"], "arm `vote` needs arm `std`"),
        (["--arms", "noisy"], "arm `noisy` needs compare.noisy"),
        (["--arms", "greedy"], "arm `greedy` needs eval.validation"),
        (["--budgets", "step"], "--budgets step: give steps, total or both"),
        (["branch={epochs: 1}"], "needs branch.steps"),
        (["rounds=0"], "`rounds`"),
        (["eval.data=nowhere.jsonl"], "seed 0, arm std:a"),
    ],
)
def test_mistakes_are_one_line(call: Any, config_file: Path, tmp_path: Path, arguments: list[str], named: str) -> None:
    asked = ["compare", config_file, *SMALL, "--out", tmp_path / "out", "--seeds", "0", *arguments]
    if "branch" in arguments[0]:
        asked = [a for a in asked if a not in SMALL[1:]]
    assert named in refused(call(*asked))
    assert not list(tmp_path.glob("out/*/*/before.json"))


def test_a_run_is_no_place_for_a_comparison(call: Any, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("student: x\n")
    assert "is a run folder; choose another folder" in refused(call("compare", config_file, "--out", tmp_path / "run"))
