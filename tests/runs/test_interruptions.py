"""Real processes that are stopped, killed, starved and tampered with, and what the same command makes of it.

The processes are forked from one that has torch loaded, each with its own signals, limits and locks; some tests start
the installed command itself.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import forks
import pytest
import yaml
from test_distillation import MakeConfig, files, same_run

from mot_lora import UserError
from mot_lora.config import Config
from mot_lora.reader import load_config
from mot_lora.runs.distillation import run
from mot_lora.runs.ledger import read_run, read_state
from mot_lora.runs.rundir import RunDir

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

SLOW = pytest.mark.slow
BRANCH = {"steps": 6, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2, "max_length": 128}
DONE, REFUSED, INT, TERM, HUP, KILL = 0, 2, 130, 143, 129, -signal.SIGKILL


def _command(words: list[str], streams: Path, before: Callable[[], object] | None) -> None:
    """What the forked process does: the command, as the installed one begins it."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{streams}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if before:
        before()
    sys.argv = ["mot-lora", *words]
    from mot_lora.cli.app import main

    Path(f"{streams}.begun").touch()
    main()


@dataclass
class Command:
    """`mot-lora ...` in a process of its own."""

    process: Any
    streams: Path
    words: list[str]

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def when(self, holds: Callable[[], object], number: signal.Signals) -> "Command":
        """Send a signal as soon as something holds, which it must before the process ends."""
        while not holds():
            assert self.process.is_alive(), self.err
            time.sleep(0.0005)
        self.send(number)
        return self

    def end(self) -> int:
        """Wait for the end: the exit status, or minus the signal."""
        self.process.join(120)
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def begun(self) -> bool:
        """Whether it is as far as the command's first line."""
        return Path(f"{self.streams}.begun").exists()

    @property
    def out(self) -> str:
        return Path(f"{self.streams}.out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self.streams}.err").read_text()


Start = Callable[..., Command]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start `mot-lora run` of a config, with overrides and options; `before` is called in the process first."""
    streams = iter(tmp_path / f"process-{n}" for n in range(1000))

    def begin(config: Config, *words: str, before: Callable[[], object] | None = None) -> Command:
        name = next(streams)
        file = name.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        command = ["run", str(file), "-q", *words]
        process = forks.process(_command, command, name, before)
        process.start()
        return Command(process, name, command)

    return begin


@pytest.fixture
def tiny(make_config: MakeConfig) -> Callable[..., Config]:
    """A run in which random numbers matter, with states within its branches."""

    def make(output: str, branch: Mapping[str, Any] = {}, **changes: Any) -> Config:
        return make_config(
            **{
                "branch": {**BRANCH, "save_steps": 2, **branch},
                "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
                "rounds": 1,
                "output": output,
                **changes,
            }
        )

    return make


@pytest.fixture(scope="module")
def kept() -> dict[str, Config]:
    return {}


@pytest.fixture
def begun(
    start: Start, tiny: Callable[..., Config], kept: dict[str, Config], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    """A run that went on until something was there, or to its end; each kind of run is done once. `copy` it to use."""

    def make(until: str = "", **changes: Any) -> Config:
        key = repr((until, changes))
        if key not in kept:
            kept[key] = tiny(str(tmp_path_factory.mktemp("begun") / "run"), **changes)
            process = start(kept[key])
            if until:
                process.when((Path(kept[key].output) / until).exists, signal.SIGKILL)
            assert process.end() == (KILL if until else DONE), process.err
        return kept[key]

    return make


@pytest.fixture
def whole(begun: Callable[..., Config]) -> Callable[..., Path]:
    """The folder of a run that was never stopped, to compare with."""
    return lambda **changes: Path(begun(**changes).output)


def copy(config: Config, output: Path) -> Config:
    """A run in another place, as far as it is."""
    shutil.copytree(config.output, output)
    return config.model_copy(update={"output": str(output)})


def sealed(run: Path, teacher: str, step: int, round: int = 1) -> Callable[[], bool]:
    return (run / f"round-{round:03d}" / f".{teacher}.training" / f"checkpoint-{step}" / "sealed.json").exists


def tree(folder: Path, *without: str) -> dict[str, bytes]:
    """Every file of a folder, but for those of the given names."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in without)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def one_line(text: str) -> str:
    assert len(text.splitlines()) == 1, text
    return text.strip()


# --- stopped and gone on with ---------------------------------------------------------------------------


STOPS: list[tuple[Callable[[Path], Callable[[], bool]], signal.Signals, int]] = [
    (lambda run: (run / "run.lock").exists, signal.SIGINT, INT),  # at the very start
    (lambda run: (run / "environment.json").exists, signal.SIGTERM, TERM),  # while the student is loaded or measured
    (lambda run: sealed(run, "a", 2), signal.SIGTERM, TERM),
    (lambda run: sealed(run, "a", 4), signal.SIGKILL, KILL),
    (lambda run: sealed(run, "a", 6), signal.SIGINT, INT),  # trained, not measured
    (lambda run: sealed(run, "b", 2), signal.SIGHUP, HUP),
    (lambda run: (run / "round-001" / "b" / "branch.json").exists, signal.SIGTERM, TERM),  # fold, evaluation
]


def test_a_run_stopped_by_every_signal_ends_in_the_bytes_of_one_never_stopped(
    start: Start, tiny: Callable[..., Config], whole: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for when, number, status in STOPS:
        process = start(tiny(str(run))).when(when(run), number)
        asked = time.monotonic()
        assert process.end() == status, process.err
        assert time.monotonic() - asked < 10
        assert not list(run.rglob("*.partial")) or status == KILL
        if status == KILL:
            assert process.err == ""
        else:
            assert process.out == ""
            assert one_line(process.err) == (
                f"stopped; no finished work is lost; resume with: mot-lora run {process.words[1]}"
            )
    process = start(tiny(str(run)))
    assert process.end() == DONE, process.err
    assert same_run(whole(), run)
    assert not list(run.rglob(".*"))


@pytest.mark.parametrize("pause", [0.01, pytest.param(0, marks=SLOW), pytest.param(0.05, marks=SLOW)])
def test_a_second_signal_while_it_saves_costs_no_more_than_that_state(
    start: Start, tiny: Callable[..., Config], whole: Callable[..., Path], tmp_path: Path, pause: float
) -> None:
    run = tmp_path / "run"
    process = start(tiny(str(run))).when(sealed(run, "a", 2), signal.SIGTERM)
    time.sleep(pause)
    if process.process.is_alive():
        process.send(signal.SIGINT)
    assert process.end() in (INT, TERM)
    assert "Traceback" not in process.err
    assert len(process.err.splitlines()) == 1
    process = start(tiny(str(run)))
    assert process.end() == DONE, process.err
    assert same_run(whole(), run)


def test_what_nohup_and_the_background_ignore_stays_ignored_and_sigterm_stops(
    start: Start, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(tiny(str(run)), before=_in_background).when(sealed(run, "a", 2), signal.SIGHUP)
    process.send(signal.SIGINT)
    process.when(sealed(run, "a", 6), signal.SIGTERM)
    assert process.end() == TERM, process.err
    assert one_line(process.err).startswith("stopped; ")


def _in_background() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.usefixtures("signals_as_usual")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW)])
def test_the_installed_command_says_how_to_go_on(
    tiny: Callable[..., Config], tmp_path: Path, number: signal.Signals
) -> None:
    file = tmp_path / "config with a space.yaml"
    file.write_text(yaml.safe_dump(tiny(str(tmp_path / "run")).model_dump(mode="json")))
    command = [str(Path(sys.executable).parent / "mot-lora"), "run", str(file), "branch.steps=500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not sealed(tmp_path / "run", "a", 2)():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert one_line(err).endswith(f"resume with: mot-lora run '{file}' branch.steps=500")
    assert list((tmp_path / "run").rglob("sealed.json"))


TOO_LATE = {signal.SIGKILL: KILL, signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 1}


@pytest.mark.slow
def test_forty_kills_at_random_moments_over_two_rounds(
    start: Start, tiny: Callable[..., Config], whole: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = whole(rounds=2)
    begun = time.monotonic()  # the first process also waited for the one that it was forked from
    assert start(tiny(str(tmp_path / "timed"), rounds=2)).end() == DONE
    longest = 0.7 * (time.monotonic() - begun)
    chance, kills = random.Random(os.environ.get("SEED", "0")), Counter[str]()
    for attempt in range(1000):
        run = tmp_path / f"run-{attempt}"
        while True:
            process = start(tiny(str(run), rounds=2))
            number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            while not process.begun:
                time.sleep(0.001)
            process.process.join(chance.uniform(0.1, longest) if kills.total() < 40 else None)
            if process.process.is_alive():
                process.send(number)
            status = process.end()
            if status == DONE:
                break
            if status == TOO_LATE[number] and process.out:  # its handlers are gone, and its work is done
                continue
            assert status == {signal.SIGKILL: KILL, signal.SIGTERM: TERM, signal.SIGINT: INT}[number], process.err
            assert len(process.err.splitlines()) == (number != signal.SIGKILL), process.err
            kills[number.name] += 1
        assert same_run(wanted, run)
        if kills.total() >= 40:
            break
    print(f"{attempt + 1} runs, killed by {dict(kills)}")
    assert kills.total() >= 40
    assert len(kills) == 3


# --- the power cord -------------------------------------------------------------------------------------


def test_the_folder_as_it_was_at_any_moment_is_gone_on_with(
    start: Start, tiny: Callable[..., Config], whole: Callable[..., Path], tmp_path: Path
) -> None:
    run, config = tmp_path / "run", tiny(str(tmp_path / "run"))
    process = start(config)
    snapshots: list[Path] = []
    chance = random.Random(os.environ.get("SEED", "0"))
    while process.process.is_alive():
        taken = tmp_path / f"snapshot-{len(snapshots)}"
        # what vanishes while it is copied is not in the copy; what is half-written is, and is half
        with suppress(shutil.Error, OSError):
            shutil.copytree(run, taken)
        if list(taken.glob("round-001/.*.training/checkpoint-*")):
            snapshots.append(taken)
            time.sleep(chance.uniform(0, 0.2))
        else:
            shutil.rmtree(taken, ignore_errors=True)
    assert process.end() == DONE
    assert len(snapshots) >= 2
    for snapshot in chance.sample(snapshots, 2):
        shutil.rmtree(run)
        snapshot.rename(run)
        process = start(config)
        assert process.end() == DONE, process.err
        assert same_run(whole(), run)


def test_what_a_kill_left_of_old_states_is_not_taken_for_damaged(
    start: Start, tiny: Callable[..., Config], whole: Callable[..., Path], tmp_path: Path
) -> None:
    # states are deleted one by one: old ones for newer ones, and all when their branch is finished
    run = tmp_path / "run"
    process = start(tiny(str(run)), before=_die_while_a_seal_lies_beside_another)
    assert process.end() == KILL, process.err
    assert len(list(run.rglob("checkpoint-*"))) == 2
    process = start(tiny(str(run)), before=_die_while_a_finished_branch_is_tidied)
    assert process.end() == KILL, process.err
    assert (run / "round-001" / "a" / "branch.json").exists()
    assert (run / "round-001" / ".a.training").exists()
    process = start(tiny(str(run)))
    assert process.end() == DONE, process.err
    assert same_run(whole(), run)
    assert not list(run.rglob(".*"))


def _die_after_deleting(of: Callable[[Path], bool]) -> None:
    """SIGKILL in the middle of a rmtree, when a file of such a folder is gone."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "shutil.rmtree" and of(folder := Path(args[0])) and folder.exists():
            victim = next(f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "sealed.json")
            victim.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _die_while_a_seal_lies_beside_another() -> None:
    _die_after_deleting(lambda folder: folder.name == "checkpoint-2")


def _die_while_a_finished_branch_is_tidied() -> None:
    _die_after_deleting(lambda folder: ".a.training" in str(folder) and Path(str(folder).split(".a.")[0], "a").exists())


# --- two at once ----------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_a_dead_one_does_not_bar_the_way(
    start: Start, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = start(tiny(str(run), {"steps": 500}))
    while not sealed(run, "a", 2)():
        time.sleep(0.001)
    who = f"process {first.process.pid} on {socket.gethostname()}"
    first.send(signal.SIGSTOP)  # at work, and still, so that the folder can be looked at
    before = tree(run)
    second = start(tiny(str(run), {"steps": 500}))
    assert second.end() == REFUSED
    assert one_line(second.err) == f"error: {run}: another run is using this folder ({who})"
    state = read_state(RunDir(run))
    assert state.at_work == who
    assert state.begun["a"] >= 2
    assert f"running ({who}): no round is done yet, a can resume from step" in state.line
    assert tree(run) == before
    first.send(signal.SIGKILL)
    assert first.end() == KILL
    assert read_state(RunDir(run)).at_work is None
    third = start(tiny(str(run), {"steps": 500}))
    third.when(lambda: f"process {third.process.pid} " in (run / "run.process").read_text(), signal.SIGKILL)
    assert third.end() == KILL


# --- what may change ------------------------------------------------------------------------------------


def test_other_settings_data_or_base_are_refused_by_name(
    start: Start, tiny: Callable[..., Config], qwen3: Path, tmp_path: Path
) -> None:
    student = shutil.copytree(qwen3, tmp_path / "student")
    config = tiny(str(tmp_path / "run"), {"steps": 1}, student=str(student))
    assert start(config).end() == DONE
    before = tree(tmp_path / "run", "run.lock", "run.process")

    def refused(*overrides: str) -> str:
        with pytest.raises(UserError) as e:
            run(load_config(file, overrides))
        assert tree(tmp_path / "run", "run.lock", "run.process") == before
        return one_line(str(e.value))

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    settings = "started with other settings"
    assert f"{settings} (seed)" in refused("seed=1", "rounds=3", "stop.patience=2")
    assert f"{settings} (lora.r, lora.dropout)" in refused("lora={r: 8, alpha: 8, dropout: 0.2}")
    changed = yaml.safe_dump([{**t.model_dump(mode="json"), "samples": 5 + i} for i, t in enumerate(config.teachers)])
    assert f"{settings} (teachers.0.samples, teachers.1.samples)" in refused(f"teachers={changed}")
    assert f"{settings} (branch.max_grad_norm)" in refused("branch.max_grad_norm=0.5", "branch.save_steps=1")
    assert f"{settings} (eval.max_new_tokens)" in refused("eval.max_new_tokens=5")
    data = Path(config.teachers[1].sources[0])
    was = data.read_text()
    data.write_text(was.replace("23 + 1", "23 + 2"))
    assert "b.jsonl has changed" in refused()
    data.write_text(was)
    weights = next(student.glob("*.safetensors"))
    flip(weights)
    assert "started with other inputs (student has changed)" in refused()
    flip(weights)
    assert run(load_config(file)).stopped


def test_what_may_change_goes_on(start: Start, tiny: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = start(tiny(str(path))).when(sealed(path, "a", 2), signal.SIGTERM)
    assert process.end() == TERM
    moved = path.rename(tmp_path / "moved")
    config = tiny(str(moved), {"save_steps": 3, "report_to": "tensorboard"}, rounds=2, stop={"patience": 9})
    process = start(config)
    assert process.end() == DONE, process.err
    assert process.err == ""
    assert [r.round for r in read_run(RunDir(moved)).rounds] == [1, 2]


@pytest.mark.slow
def test_another_learning_rate_of_a_teacher_counts_from_the_start_of_its_branch(
    start: Start, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    # a state within the branch holds the old rate, and weights that it made
    path = tmp_path / "run"
    process = start(tiny(str(path))).when(sealed(path, "a", 2), signal.SIGTERM)
    assert process.end() == TERM
    lower = [t.model_copy(update={"learning_rate": 1e-3} if t.name == "a" else {}) for t in tiny(str(path)).teachers]
    lower = [t.model_dump() for t in lower]
    assert start(tiny(str(path), teachers=lower)).end() == DONE
    assert start(tiny(str(tmp_path / "other"), teachers=lower)).end() == DONE
    assert same_run(tmp_path / "other", path)
    record = read_run(RunDir(path))
    assert [b.learning_rate for b in record.branches] == [1e-3, 1e-2]


def test_from_scratch_begins_beside_what_is_there(start: Start, tiny: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert start(tiny(str(path), {"steps": 2})).end() == DONE
    (tmp_path / "run-2").mkdir()
    before = tree(tmp_path / "run"), tree(tmp_path / "run-2")
    process = start(tiny(str(path), {"steps": 2}, seed=7), "--from-scratch")
    assert process.end() == DONE, process.err
    assert one_line(process.out).startswith(f"run folder: {tmp_path / 'run-3'} ")
    assert (tree(tmp_path / "run"), tree(tmp_path / "run-2")) == before
    names = ("adapter_model.safetensors",)
    assert files(tmp_path / "run-3", *names).keys() == files(path, *names).keys()
    assert files(tmp_path / "run-3", *names) != files(path, *names)


# --- damage ---------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


# the file, in a run of two finished rounds, and what --repair sets aside for it
BRANCH_1, ROUND_1 = ["round-001/a"], ["round-001/answers.jsonl", "round-001/round.json", "round-002"]
DAMAGE: list[tuple[str, list[str]]] = [
    ("round-001/a/adapter_model.safetensors", BRANCH_1 + ROUND_1),
    ("round-001/a/adapter_config.json", BRANCH_1 + ROUND_1),
    ("round-001/a/answers.jsonl", BRANCH_1 + ROUND_1),
    ("round-001/a/branch.json", BRANCH_1 + ROUND_1),
    ("round-001/answers.jsonl", ROUND_1),
    ("round-001/round.json", ROUND_1),
    ("round-002/b/adapter_model.safetensors", ["round-002/answers.jsonl", "round-002/b", "round-002/round.json"]),
    ("before.json", ["before.answers.jsonl", "before.json"]),
    ("before.answers.jsonl", ["before.answers.jsonl", "before.json"]),
]
MADE_AGAIN = ("round-001/round.json", "before.json", "environment.json")
UNSURE = ("run.lock", "run.process", "data.json", "config.yaml", "report.html", "environment.json")


@pytest.fixture
def damaged(begun: Callable[..., Config], tmp_path: Path) -> Config:
    """A finished run of two rounds to do harm to."""
    return copy(begun(rounds=2), tmp_path / "run")


HARM = [
    pytest.param(file, harm, id=f"{harm.__name__} {file}")
    for file, _ in DAMAGE
    for harm in (flip, halve, Path.unlink)
    if harm is not Path.unlink or file not in MADE_AGAIN
]


@pytest.mark.parametrize(("file", "harm"), HARM)
def test_damage_is_found_and_named_and_nothing_else_changes(
    damaged: Config, file: str, harm: Callable[[Path], None]
) -> None:
    folder = Path(damaged.output)
    harm(folder / file)
    before = tree(folder, *UNSURE)
    with pytest.raises(UserError) as e:
        run(damaged)
    assert one_line(str(e.value)).startswith(f"{folder / file}: damaged (")
    assert "--repair" in str(e.value)
    assert tree(folder, *UNSURE) == before


def test_a_damaged_environment_is_refused_and_set_aside(damaged: Config) -> None:
    # it has no checksum: what can still be read is compared, and what cannot is damaged
    file = Path(damaged.output) / "environment.json"
    was = file.read_bytes()
    (fingerprint, *_) = json.loads(was)["inputs"].values()
    file.write_bytes(was.replace(fingerprint.encode(), fingerprint[::-1].encode()))
    with pytest.raises(UserError, match=r"other inputs \(.* has changed\)|damaged"):
        run(damaged)
    file.write_bytes(was[: len(was) // 2])
    with pytest.raises(UserError, match=r"environment\.json: damaged \(.*--repair"):
        run(damaged)
    run(damaged, repair=True)
    assert (file.parent / "damaged-001" / file.name).read_bytes() == was[: len(was) // 2]


REPAIRED = [pytest.param(*d, marks=() if i in (0, 8) else SLOW) for i, d in enumerate(DAMAGE)]


@pytest.mark.parametrize(("file", "aside"), REPAIRED)
def test_repair_sets_damage_aside_and_does_it_again(
    damaged: Config, whole: Callable[..., Path], file: str, aside: list[str]
) -> None:
    folder = Path(damaged.output)
    flip(folder / file)
    before = tree(folder)
    run(damaged, repair=True)
    kept = folder / "damaged-001"
    assert sorted(p for p in aside if (kept / p).exists()) == sorted(aside)
    assert {n: c for n, c in before.items() if (kept / n).exists()} == tree(kept)
    shutil.move(kept, folder.parent / "aside")
    assert same_run(whole(rounds=2), folder)
    run(damaged)  # and all is well


@pytest.mark.slow
@pytest.mark.parametrize("file", MADE_AGAIN)
def test_a_record_that_is_gone_is_made_again_the_same(damaged: Config, whole: Callable[..., Path], file: str) -> None:
    folder = Path(damaged.output)
    (folder / file).unlink()
    run(damaged)
    assert same_run(whole(rounds=2), folder)


def test_the_student_before_is_measured_again_without_forgetting_the_rounds(
    damaged: Config, whole: Callable[..., Path]
) -> None:
    folder = Path(damaged.output)
    shutil.rmtree(folder / "round-002")
    (folder / "before.json").unlink()
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        run(damaged.model_copy(update={"seed": 1}))
    run(damaged)
    assert same_run(whole(rounds=2), folder)


OTHERS = ("trainer_state.json", "adapter_model.safetensors", "rng_state.pth", "sealed.json")


@pytest.mark.parametrize("name", ["optimizer.pt", *(pytest.param(n, marks=SLOW) for n in OTHERS)])
def test_a_damaged_state_within_a_branch_is_found_and_its_branch_trained_again(
    start: Start, begun: Callable[..., Config], whole: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    config = copy(begun(until="round-001/.b.training/checkpoint-4/sealed.json"), tmp_path / "run")
    folder = Path(config.output)
    state = max(folder.rglob("checkpoint-*"))
    flip(state / name)
    before = tree(folder, *UNSURE)
    process = start(config)
    assert process.end() == REFUSED
    assert one_line(process.err).startswith(f"error: {state / name}: damaged (")
    assert tree(folder, *UNSURE) == before
    process = start(config, "--repair")
    assert process.end() == DONE, process.err
    assert (folder / "damaged-001" / state.relative_to(folder) / name).exists()
    shutil.rmtree(folder / "damaged-001")
    assert same_run(whole(), folder)


# --- no room --------------------------------------------------------------------------------------------


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_disk_that_takes_no_more_ends_in_one_line_and_the_run_goes_on_later(
    start: Start, tiny: Callable[..., Config], whole: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    adapter = (whole() / "round-001" / "a" / "adapter_model.safetensors").stat().st_size
    # environment.json, data.json, a checkpoint's adapter, its optimizer: each size stops it later than the one before
    for size in (500, 1500, adapter - 1, adapter + 1000):  # the message itself takes 300
        process = start(tiny(str(run)), before=partial(_limit_files, size))
        assert process.end() == REFUSED, process.err
        assert re.fullmatch(
            rf"error: (round 1, teacher `a`: )?{run}\S*: cannot be written \(.+\): is there space, .*",
            one_line(process.err),
        )
        assert not list(run.rglob("*.partial"))
        assert not list(run.rglob("sealed.json"))
    # without states within branches it is the branch itself that finds no room
    config = tiny(str(tmp_path / "other"), {"save_steps": None})
    process = start(config, before=partial(_limit_files, adapter - 1))
    assert process.end() == REFUSED
    assert [p.name for p in (tmp_path / "other" / "round-001").iterdir()] == [".a.training"]
    assert not list((tmp_path / "other").rglob("sealed.json"))
    process = start(tiny(str(run)))
    assert process.end() == DONE, process.err
    assert same_run(whole(), run)


def test_a_full_disk(start: Start, tiny: Callable[..., Config], whole: Callable[..., Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=100k", "tmpfs", str(disk)], check=False, capture_output=True).returncode:
        pytest.skip("a disk of one's own takes the right to mount it")
    try:
        for size in (100, 300):
            subprocess.run([*mount, f"remount,size={size}k", "tmpfs", str(disk)], check=True)
            process = start(tiny(str(disk / "run")))
            assert process.end() == REFUSED, process.err
            assert "No space left" in one_line(process.err) or "cannot be written" in process.err
            assert not list(disk.rglob("*.partial"))
        subprocess.run([*mount, "remount,size=100m", "tmpfs", str(disk)], check=True)
        process = start(tiny(str(disk / "run")))
        assert process.end() == DONE, process.err
        assert same_run(whole(), disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_no_memory_ends_in_one_line_with_what_to_lower(
    start: Start, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    long = tmp_path / "long.jsonl"
    rows = [{"question": f"{i} + 1 = ?", "answer": f"{i} + 1 = " * 2000 + "2"} for i in range(8)]
    long.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = tiny(
        str(tmp_path / "run"),
        {"max_length": 100_000, "batch_size": 4, "loss_chunk": 100_000},
        teachers=[{"name": "a", "data": str(long)}],
        eval={"holdout": 0.2, "max_new_tokens": 4, "batch_size": 1},
    )
    process = start(config, before=_limit_memory)
    assert process.end() == REFUSED, process.err
    assert re.search(
        r"error: round 1, teacher `a`: out of memory \(.*can't allocate memory.*\); resume with branch\.batch_size=2 "
        r"branch\.gradient_accumulation=\d+ branch\.loss_chunk=50000, or start a new run with branch\.max_length "
        r"below \d{4}, the longest trace",
        one_line(process.err),
    )


def _limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 500 * 2**20, resource.RLIM_INFINITY))


# --- training that goes astray --------------------------------------------------------------------------


def test_a_branch_that_goes_astray_stops_and_the_others_are_kept(
    start: Start, tiny: Callable[..., Config], whole: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    teachers = [t.model_dump() for t in tiny(str(path)).teachers]
    wild = [{**teachers[0], "learning_rate": 1e30}, teachers[1]]
    for _ in range(2):  # the same command comes to the same end
        process = start(tiny(str(path), teachers=wild))
        assert process.end() == REFUSED
        assert re.fullmatch(
            r"error: round 1, teacher `a` \(teachers\.0\.learning_rate=\.\.\.\): the loss went from 6\.\d+ to nan at "
            r"step \d: lower its learning_rate, now 1e\+30; the other branches are kept, and the same command resumes",
            one_line(process.err),
        )
        assert [p.name for p in (path / "round-001").iterdir()] == ["b"]
    process = start(tiny(str(path), teachers=[{**teachers[0], "learning_rate": 1e-2}, teachers[1]]))
    assert process.end() == DONE, process.err
    assert same_run(whole(), path)
