"""The script that tries everything on a GPU: its order, its results on a false one, and that it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from falsecuda import Card, why_not

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "benchmarks" / "gpu.py"
CARD = Card(name="NVIDIA GeForce RTX 3060", gib=12)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "BENCH_PYTHON"}
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: torch finds no CUDA GPU here; torch ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


FRAGILE = """
import json, sys
first, *others = sys.argv[sys.argv.index("--check") + 1].split(",")
print("a library says something")
print("found: " + json.dumps({"name": first, "ok": True, "seconds": 1}), flush=True)
if others:
    sys.exit("Traceback ...\\nRuntimeError: CUDA error: an illegal memory access\\nCUDA kernel errors might be")
"""


def test_a_check_that_ends_its_process_is_told_and_the_others_are_made(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.setattr(gpu, "PYTHON", [sys.executable, str(tmp_path / "fragile.py")])
    found = dict(gpu.checks(["machine", "nf4", "int8", "offload", "answer"], tiny=False))
    assert [*found] == ["machine", "nf4", "int8", "offload", "answer"]
    assert [row["ok"] for row in found.values()] == [True, False, True, False, True]
    assert found["nf4"]["error"] == (
        "its process ended with status 1: RuntimeError: CUDA error: an illegal memory access"
    )


def test_a_stage_that_fails_says_why(gpu: Any, tmp_path: Path) -> None:
    def breaks(*_: Any) -> dict[str, Any]:
        raise RuntimeError("a line\nand another")

    assert gpu.stage(breaks, tmp_path, {}, False)["error"] == "RuntimeError: a line and another"
    row = gpu.stage(lambda *_: {"passed": 1, "failed": {"test_x": "why"}}, tmp_path, {}, False)
    assert (row["ok"], row["error"], row["result"]["passed"]) == (False, "failed: test_x", 1)
    assert gpu.stage(lambda *_: {"passed": 2, "failed": {}}, tmp_path, {}, False)["ok"]


def test_results_are_named_after_the_card(gpu: Any) -> None:
    assert gpu.file_of("NVIDIA GeForce RTX 4090") == "gpu_rtx_4090.json"
    assert gpu.file_of("Tesla T4") == "gpu_tesla_t4.json"
    assert gpu.file_of("NVIDIA A100-SXM4-80GB") == "gpu_a100_sxm4_80gb.json"


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason="no false GPU here")
def test_all_of_it_runs_on_a_false_gpu_and_goes_on_after_a_kill(gpu: Any, tmp_path: Path) -> None:
    python = f"{sys.executable} {ROOT / 'tests' / 'cuda' / 'run.py'} {' '.join(repr(o) for o in CARD.options())}"
    environment = {**os.environ, "BENCH_PYTHON": python}
    command = [sys.executable, str(SCRIPT), "--tiny", "--folder", str(tmp_path)]
    file = tmp_path / "gpu_rtx_3060.json"

    def stages() -> dict[str, Any]:
        return json.loads(file.read_text())["stages"] if file.exists() else {}

    begun = subprocess.Popen([*command, "--again"], env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while "nf4" not in stages():
            assert begun.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        os.killpg(begun.pid, signal.SIGKILL)
        begun.wait()
    before = stages()
    assert [*before][:2] == ["machine", "nf4"]  # what one wants to know first
    assert "one_card" not in before

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    after = stages()
    assert {name: after[name] for name in before} == before
    assert [*after] == [f.__name__ for f in (*gpu.CHECKS, *gpu.STAGES)]
    assert all(row["ok"] for row in after.values())
    assert f"{'nf4':12}done" in done.stdout.splitlines()

    assert after["machine"]["result"]["card"] == CARD.name
    assert after["attention"]["result"]["keys shared by heads"]["chosen"] == "flash_attention"
    assert 0.9 < after["nf4_fold"]["result"]["survived"] < 1.1
    assert after["offload"]["result"] == {"off_by": 0, "two_alike_differ_by": 0}
    first, second = after["nf4_step"]["result"]["losses"]
    assert second < first - 0.001
    assert after["quickstart"]["result"]["rounds"][0]["survived"] > 0.9
    assert abs(after["one_card"]["result"]["rows"][0]["plan_over_measured"]) < 0.03
    assert "fold, cold, 2 ahead" in after["fold_memory"]["result"]["measured"]

    again = subprocess.run(
        [*command, "--only", "machine", "--again"], env=environment, capture_output=True, check=False
    )
    assert again.returncode == 0
    repeated = stages()
    assert repeated.pop("machine") != after.pop("machine")
    assert repeated == after
