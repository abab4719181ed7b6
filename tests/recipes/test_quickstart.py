"""The recipe that everybody runs first."""

from pathlib import Path

import pytest

from mot_lora.reader import load_config
from mot_lora.runs.distillation import run

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def test_recipes_are_configs() -> None:
    for recipe in QUICKSTART.parent.glob("*.yaml"):
        assert load_config(recipe).rounds >= 2


@pytest.mark.slow
def test_the_student_ends_clearly_better_than_it_began(tmp_path: Path) -> None:
    record = run(load_config(QUICKSTART, [f"output={tmp_path / 'run'}", "eval.branches=false"]))
    before, after = record.before.interval, record.rounds[-1].evaluation.interval
    assert before
    assert after
    assert after[0] > before[1]
