import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_distillation import MakeConfig

from mot_lora import UserError
from mot_lora.config import Config
from mot_lora.runs.distillation import run
from mot_lora.runs.ledger import read_run
from mot_lora.runs.rundir import RunDir
from mot_lora.training.tracking import check_trackers, open_tracker

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

BRANCH = {"steps": 3, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-2, "max_length": 128}


@pytest.fixture
def tracked(make_config: MakeConfig) -> Config:
    return make_config(branch={**BRANCH, "report_to": "tensorboard"}, eval={"holdout": 0.2, "branches": False})


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What tensorboard shows of a folder: (step, value) by tag."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_lines(config: Config) -> None:
    """One line a teacher, each step once, over all rounds, with the losses of the records."""
    record = read_run(RunDir(Path(config.output)))
    logs = Path(config.output) / "logs"
    assert sorted(p.name for p in logs.iterdir()) == ["a", "b"]
    for teacher in ("a", "b"):
        shown = logged(logs / teacher)
        assert sorted(shown) == ["train/grad_norm", "train/learning_rate", "train/loss"]
        losses = [loss for b in record.branches if b.teacher == teacher for loss in b.train.losses]
        assert [step for step, _ in shown["train/loss"]] == list(range(1, len(losses) + 1))
        assert [value for _, value in shown["train/loss"]] == pytest.approx(losses)
        assert [step for step, _ in shown["train/learning_rate"]] == list(range(1, len(losses) + 1))


def test_tensorboard_shows_one_line_a_teacher_on_across_rounds(tracked: Config) -> None:
    run(tracked)
    check_lines(tracked)


@pytest.mark.parametrize("save_steps", [None, 1])
def test_an_interruption_leaves_no_gap_and_no_step_twice(tracked: Config, save_steps: int | None) -> None:
    tracked = tracked.model_copy(update={"branch": tracked.branch.model_copy(update={"save_steps": save_steps})})
    for stop, done in (("round 1, a, train", 2), ("round 1, b, train", 3), ("round 2, b, train", 1)):
        with pytest.raises(KeyboardInterrupt):
            run(tracked, progress=_stop_at(stop, done))
    run(tracked)
    check_lines(tracked)


def test_a_step_that_is_taken_again_is_shown_once(tracked: Config) -> None:
    # after a kill the newest state is older than the last step that was logged
    with pytest.raises(RuntimeError, match="as if killed"):
        run(tracked, progress=_stop_at("round 2, a, train", 2, RuntimeError("as if killed")))
    assert not list(Path(tracked.output).rglob("sealed.json"))
    run(tracked)
    check_lines(tracked)


def _stop_at(stop: str, at: int, error: BaseException | None = None) -> Callable[..., None]:
    def progress(stage: str, done: int, *_: Any, **__: Any) -> None:
        if (stage, done) == (stop, at):
            raise error or KeyboardInterrupt

    return progress


def test_a_tracker_goes_on_after_a_step_and_replaces_what_came_later(tmp_path: Path) -> None:
    job = RunDir(tmp_path).job(1, "a")
    for after, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        log, close = open_tracker("tensorboard", job, after)
        for step in steps:
            log({"loss": 10.0 * after + step}, step)
        close()
    assert logged(tmp_path / "logs" / "a") == {"train/loss": [(1, 1), (2, 12), (3, 13), (4, 14)]}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_told_before_the_work(make_config: MakeConfig, name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    config = make_config(branch={**BRANCH, "report_to": ["tensorboard", name]})
    with pytest.raises(UserError, match=rf"^branch\.report_to: {name} is not installed; pip install {name}, or leave"):
        run(config)
    assert not Path(config.output).exists()
    check_trackers(["tensorboard"])


def test_without_a_tracker_nothing_is_logged(make_config: MakeConfig) -> None:
    config = make_config(rounds=1, branch=BRANCH)
    run(config)
    assert not (Path(config.output) / "logs").exists()


def test_a_tracker_that_cannot_be_imported_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("trackio", None)
    with pytest.raises(UserError, match=r"trackio cannot be imported \(No module named 'a_package_that"):
        check_trackers(["trackio"])


def test_the_log_of_a_branch_that_goes_astray_ends_and_the_next_teacher_has_its_own(tracked: Config) -> None:
    first, second = tracked.teachers
    wild = tracked.model_copy(update={"teachers": (first.model_copy(update={"learning_rate": 1e30}), second)})
    with pytest.raises(UserError, match="teacher `a`"):
        run(wild)
    logs = Path(tracked.output) / "logs"
    assert logged(logs / "a")["train/loss"][0][0] == 1
    assert [step for step, _ in logged(logs / "b")["train/loss"]] == [1, 2, 3]
    run(tracked)
    check_lines(tracked)
