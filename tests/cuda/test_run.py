"""Whole runs on a false GPU: what they give, what they hold, and that nobody reads what is still being copied."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import falsecuda
import pytest
import torch
from conftest import true_updates
from false_gpu import false_gpu

from mot_lora import offload, run
from mot_lora.config import Config
from mot_lora.records import RunRecord

MakeConfig = Callable[..., Config]
T4 = {"name": "Tesla T4", "gib": 16, "capability": "7.5"}
BRANCH = {
    "steps": 2,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "learning_rate": 1e-2,
    "max_length": 128,
    "activation_checkpointing": True,
    "offload": "on",
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors move to host memory too, and lie over several slabs."""
    monkeypatch.setattr(offload, "WORTH", 1)
    monkeypatch.setattr(offload, "SLAB", 10_000)


def close(got: RunRecord, want: RunRecord, within: float) -> bool:
    """Whether two runs have the same losses, but for rounding."""

    def losses(record: RunRecord) -> list[float]:
        measured = [record.before, *(b.evaluation for b in record.branches), *(r.evaluation for r in record.rounds)]
        held_out = [loss for m in measured if m for _, loss in sorted(m.losses.items())]
        return held_out + [loss for b in record.branches for loss in b.train.losses]

    assert len(losses(want)) == 2 * 7 + 2 * 4
    return losses(got) == pytest.approx(losses(want), abs=within)


def runs_everywhere(make_config: MakeConfig, tmp_path: Path) -> None:
    """A run of two rounds in each quantization, on this device and on the CPU."""
    device = torch.cuda.get_device_name()
    for quantization in ("nf4", "int8", "none"):
        settings: dict[str, Any] = {"quantization": quantization, "branch": BRANCH}
        late, folder = falsecuda.late_copies(), tmp_path / quantization
        record = run(make_config(**settings, device="cuda", output=str(folder)))
        assert falsecuda.reports() == ""
        assert falsecuda.late_copies() > late + 50
        assert falsecuda.pinned_peak() > 30_000
        assert json.loads((folder / "environment.json").read_text())["device"] == device
        want = run(make_config(**settings, device="cpu", output=str(tmp_path / f"{quantization}-cpu")))
        assert close(record, want, 0.03)
        for r in record.rounds:
            assert 0.5 < r.fold.survived < 1.5
            assert r.evaluation.questions == 4
        for branch in record.branches:
            update = true_updates(folder / f"round-{branch.round:03d}" / branch.teacher)
            assert all(bool(u.any()) for u in update.values())


@pytest.mark.usefixtures("small")
@false_gpu()
def test_a_run_on_a_card_gives_what_it_gives_on_a_cpu(make_config: MakeConfig, tmp_path: Path) -> None:
    runs_everywhere(make_config, tmp_path)


@pytest.mark.usefixtures("small")
@false_gpu(**T4, count=2)
def test_a_run_on_the_first_of_two_cards_before_ampere(make_config: MakeConfig, tmp_path: Path) -> None:
    runs_everywhere(make_config, tmp_path)
