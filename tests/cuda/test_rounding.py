"""Small updates of weights that a GPU holds in 16 bits: a run says what rounds away, as an export does."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from false_gpu import false_gpu

from mot_lora import export, export_adapter
from mot_lora.config import Config
from mot_lora.runs.ledger import read_run
from mot_lora.runs.rundir import RunDir


@pytest.fixture
def config(make_config: Any, tmp_path: Path) -> Config:
    branch = {"steps": 2, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-4, "max_length": 128}
    made = make_config(rounds=1, quantization="none", device="cuda", branch=branch)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")))
    return made


def survived(config: Config) -> float:
    record = read_run(RunDir(Path(config.output)))
    assert record
    assert record.rounds[0].fold.survived is not None
    return record.rounds[0].fold.survived


@false_gpu()
def test_in_bf16_a_run_says_that_its_update_rounds_away(call: Any, config: Config, tmp_path: Path) -> None:
    status, out, _ = call("run", tmp_path / "recipe.yaml")
    share = survived(config)
    assert (status, 0.1 < share < 0.9) == (0, True)
    line = f"only {share:.2f} of round 1's update survived rounding to 16 bits; quantization=nf4 keeps small updates"
    assert line in out.splitlines()
    # in memory and on disk the same sum is rounded in the same way
    assert export(config.output, tmp_path / "student", round=1).survived == pytest.approx(share, abs=1e-4)
    assert export_adapter(config.output, tmp_path / "adapter", round=1).survived == 1


@false_gpu(name="Tesla T4", gib=16, capability="7.5")
def test_in_fp16_more_of_it_survives_and_nothing_is_said(call: Any, config: Config, tmp_path: Path) -> None:
    status, out, _ = call("run", tmp_path / "recipe.yaml")
    assert (status, survived(config) > 0.9) == (0, True)
    assert "rounding to 16 bits" not in out
