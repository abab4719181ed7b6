"""Tests on a false GPU: what becomes of one that fails, skips or hangs."""

from pathlib import Path

import pytest
import torch
from false_gpu import run_on
from falsecuda import Card

BODIES = """
import time, pytest, torch, falsecuda

def test_passes(tmp_path):
    assert torch.cuda.get_device_name() == "Tesla T4"
    torch.ones(3, device="cuda")

def test_has_a_process_of_its_own():
    assert falsecuda.held() == 0
    kept.append(torch.ones(3, device="cuda"))

kept = []

def test_fails():
    secret = torch.arange(3, device="cuda")
    assert secret.sum() == 4

def test_skips():
    pytest.skip("not today")

def test_hangs():
    time.sleep(60)
"""


def test_what_happens_there_is_told_here(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file = tmp_path / "test_bodies.py"
    file.write_text(BODIES)

    def told(name: str, seconds: float = 60) -> tuple[int | None, str]:
        arguments = ["-c", str(request.config.inipath), f"{file}::{name}"]
        return run_on(Card("Tesla T4", 16, "7.5"), arguments, seconds, request.config)

    for name in ("test_passes", "test_has_a_process_of_its_own", "test_has_a_process_of_its_own"):
        assert told(name)[0] == 0
    status, said = told("test_fails")
    assert status == 1
    assert "assert secret.sum() == 4" in said
    assert "assert tensor(3, device='cuda:0') == 4" in said
    status, said = told("test_skips")
    assert status == 0
    assert "not today" in said
    assert told("test_hangs", 0.5)[0] is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_a_compiler_ci_fails_and_others_skip(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match=r"no false GPU here: there is no g\+\+"):
        run_on(Card(), [], 1, request.config)
