"""Training that is cut off at any step, in this process, and goes on: to the same bytes."""

import os
import random
import shutil
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_branch import factors, new_model, same, settings
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedTokenizerBase

from mot_lora.data.encoding import encode
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Example, Trace
from mot_lora.durable import DamagedError, write_record
from mot_lora.interruption import Shield, signals_raise
from mot_lora.records import TrainRecord
from mot_lora.runs.rundir import RunDir
from mot_lora.training.adapter import reset_adapter
from mot_lora.training.branch import train
from mot_lora.training.job import Job
from mot_lora.training.savepoint import is_sealed, newest, remember_randomness, seal

pytestmark = pytest.mark.usefixtures("signals_as_usual")

Factors = dict[str, torch.Tensor]


class Branch:
    """A branch with dropout, on one model, to be trained again and again."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.examples = examples

    def train(self, job: Job, progress: Any = None, **changes: Any) -> tuple[Factors, TrainRecord]:
        reset_adapter(self.model, 0)
        more = {"progress": progress} if progress else {}
        record = train(self.model, self.tokenizer, self.examples, settings(**changes), seed=3, job=job, **more)
        return factors(self.model), record.model_copy(update={"seconds": 0.0})


@pytest.fixture(scope="module")
def branch(qwen3: Path) -> Branch:
    tokenizer = load_tokenizer(qwen3)
    traces = [
        Trace(({"role": "user", "content": f"{i} + 1 = ?"},), f"{i} + 1 = {i + 1}. " * (i % 5 + 1)) for i in range(16)
    ]
    return Branch(new_model(qwen3, dropout=0.1), tokenizer, [encode(tokenizer, t) for t in traces])


def stop_after(step: int, by: Callable[[], object]) -> Any:
    """A progress that stops the training after a step."""

    def progress(_: str, done: int, *__: Any, **___: Any) -> None:
        if done == step:
            by()

    return progress


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def give_up() -> NoReturn:
    """As a progress that takes Ctrl-C itself, like a notebook's."""
    raise KeyboardInterrupt


def job(path: Path) -> Job:
    return RunDir(path).job(1, "a")


def states(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 4},
        {"steps": 3, "save_steps": 2},
        {"epochs": 1.5, "batch_size": 5, "gradient_accumulation": 2},  # 16 traces: the last batches are short
        {"epochs": 2, "batch_size": 4, "gradient_accumulation": 4, "schedule": "cosine", "warmup": 0.5},
    ],
)
def test_a_branch_stopped_after_any_step_ends_in_the_same_bytes(
    branch: Branch, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole, record = branch.train(job(tmp_path / "whole"), **changes)
    assert record.steps == len(record.losses) >= 2
    for stop in range(1, record.steps + 1):
        by = interrupt if stop % 2 else give_up
        place = job(tmp_path / f"{stop}{by.__name__}")
        with pytest.raises(KeyboardInterrupt):
            branch.train(place, stop_after(stop, by), **changes)
        assert states(place.state) == [f"checkpoint-{stop}"]
        torch.manual_seed(stop)
        random.seed(stop)
        steps: list[int] = []
        got, again = branch.train(place, lambda _, done, *__, steps=steps, **___: steps.append(done), **changes)
        assert steps == ([] if stop == record.steps else list(range(stop, record.steps + 1)))
        assert same(got, whole)
        assert again == record


def test_a_branch_stopped_at_every_step_in_turn_ends_in_the_same_bytes(branch: Branch, tmp_path: Path) -> None:
    whole, record = branch.train(job(tmp_path / "whole"), steps=5)
    for step in range(1, 6):
        with pytest.raises(KeyboardInterrupt):
            branch.train(job(tmp_path / "parts"), stop_after(step, interrupt), steps=5)
    got, again = branch.train(job(tmp_path / "parts"), steps=5)
    assert same(got, whole)
    assert again == record


@contextmanager
def before_each_optimizer_step(call: Any) -> Generator[None]:
    hook = register_optimizer_step_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_signal_within_an_optimizer_step_waits_for_its_end(branch: Branch, tmp_path: Path, step: int) -> None:
    whole, record = branch.train(job(tmp_path / "whole"), steps=5)
    taken = 0

    def terminate() -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGTERM)

    place = job(tmp_path / "parts")
    with pytest.raises(SystemExit) as e, signals_raise(), before_each_optimizer_step(terminate):
        branch.train(place, steps=5)
    assert e.value.code == 143
    assert (taken, states(place.state)) == (step, [f"checkpoint-{step}"])
    got, again = branch.train(place, steps=5)
    assert same(got, whole)
    assert again == record


@pytest.mark.parametrize("micro", [1, 4, 5])
def test_a_signal_within_a_forward_pass_loses_that_step_alone(branch: Branch, tmp_path: Path, micro: int) -> None:
    # random numbers were drawn, tokens counted, and gradients are there of half a step
    whole, record = branch.train(job(tmp_path / "whole"), steps=4, activation_checkpointing=False)
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == micro:
            interrupt()

    last = branch.model.get_base_model().get_submodule("model.layers.1.mlp.down_proj")
    place = job(tmp_path / "parts")
    hook = last.register_forward_hook(count)
    try:
        with pytest.raises(KeyboardInterrupt):
            branch.train(place, steps=4, activation_checkpointing=False)
    finally:
        hook.remove()
    finished = (micro - 1) // 2
    assert states(place.state) == ([f"checkpoint-{finished}"] if finished else [])
    got, again = branch.train(place, steps=4, activation_checkpointing=False)
    assert same(got, whole)
    assert again == record


def test_a_branch_without_a_place_of_its_own_leaves_nothing(branch: Branch, tmp_path: Path) -> None:
    reset_adapter(branch.model, 0)
    chosen = settings(save_steps=1, report_to=("tensorboard",))
    train(branch.model, branch.tokenizer, branch.examples, chosen, seed=3)
    got = factors(branch.model)
    whole, _ = branch.train(job(tmp_path))
    assert same(got, whole)


# --- seals ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(branch: Branch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a branch that was stopped after its second step."""
    place = job(tmp_path_factory.mktemp("begun"))

    with pytest.raises(KeyboardInterrupt):
        branch.train(place, stop_after(2, interrupt))
    return place.state


def test_the_newest_whole_state_counts_and_older_ones_go(begun: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(begun, tmp_path / "states")
    found = newest(folder)
    assert found
    assert found[0].name == "checkpoint-2"
    assert found[1].tokens > 0
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-10")
    assert newest(folder)[0].name == "checkpoint-10"  # by number, not by letter
    (folder / "checkpoint-10" / "sealed.json").unlink()
    assert newest(folder)[0].name == "checkpoint-2"
    seal(folder / "checkpoint-10", 1e-2, 5, 6.0)
    assert states(folder) == ["checkpoint-10"]
    assert is_sealed(folder / "checkpoint-10")
    assert (newest(folder)[1].tokens, newest(folder)[1].seconds) == (5, 6.0)
    assert newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "sealed.json"])
def test_a_state_that_is_not_as_it_was_sealed_is_named(begun: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(begun, tmp_path / "states")
    file = folder / "checkpoint-2" / name
    for size in (file.stat().st_size // 2, 0):
        os.truncate(file, size)
        with pytest.raises(DamagedError, match="damaged") as e:
            newest(folder)
        assert e.value.path == file


def test_randomness_is_that_of_all_generators() -> None:
    restore = remember_randomness()

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    first = draw()
    assert draw() != first
    restore()
    assert draw() == first


# --- signals --------------------------------------------------------------------------------------------


def test_held_signals_come_when_they_are_let_through() -> None:
    happened: list[str] = []
    with pytest.raises(KeyboardInterrupt), Shield() as shield:  # noqa: PT012
        shield.hold()
        os.kill(os.getpid(), signal.SIGINT)
        happened.append("held")
        shield.release()
        happened.append("never")
    assert happened == ["held"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_held_at_the_end_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), Shield() as shield:  # noqa: PT012
        shield.hold()
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_are_exceptions_only_within_the_block_and_where_nobody_has_other_plans() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_raise():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(SystemExit) as e:
                os.kill(os.getpid(), signal.SIGTERM)
        assert e.value.code == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_state_of_another_schedule_begins_the_branch_anew(branch: Branch, tmp_path: Path, begun: Path) -> None:
    place = job(tmp_path / "parts")
    shutil.copytree(begun, place.state)
    found = newest(place.state)
    assert found
    write_record(found[0] / "sealed.json", found[1].model_copy(update={"schedule": 1}))
    steps: list[int] = []
    got, again = branch.train(place, lambda _, done, *__, steps=steps, **___: steps.append(done))
    whole, record = branch.train(job(tmp_path / "whole"))
    assert steps[0] == 0
    assert same(got, whole)
    assert again == record


def test_another_learning_rate_begins_the_branch_anew(branch: Branch, tmp_path: Path) -> None:
    # its optimizer and schedule would go on with the rate that the state was made with
    with pytest.raises(KeyboardInterrupt):
        branch.train(job(tmp_path / "parts"), stop_after(2, interrupt))
    got, again = branch.train(job(tmp_path / "parts"), learning_rate=1e-3)
    whole, record = branch.train(job(tmp_path / "whole"), learning_rate=1e-3)
    assert same(got, whole)
    assert again == record


def test_a_state_that_was_torn_while_it_was_written_is_written_anew(
    branch: Branch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = job(tmp_path)
    torn = place.state / "checkpoint-2"
    torn.mkdir(parents=True)
    for name in ("README.md", "optimizer.pt", "left.over"):
        (torn / name).touch()
    with pytest.raises(KeyboardInterrupt):
        branch.train(place, stop_after(2, interrupt))
    assert not (torn / "left.over").exists()
    assert newest(place.state)[0] == torn
    assert caplog.messages == []
