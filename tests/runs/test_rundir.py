import json
import os
import platform
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import files_of

from mot_lora import UserError
from mot_lora.config import Config
from mot_lora.durable import DamagedError, hashes, write_record, write_text
from mot_lora.reader import parse_config
from mot_lora.records import BranchRecord, EvaluationRecord, TrainRecord
from mot_lora.runs.rundir import FORMAT, MAY_CHANGE, RunDir
from mot_lora.training.savepoint import seal

INPUTS: dict[str, Any] = {"versions": {"mot-lora": "0.1.0"}, "inputs": {"student": "abc", "a.jsonl": "def"}}
HOLD = """
import sys, time
from pathlib import Path
from mot_lora.runs.rundir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(600)
"""


def config(**changes: Any) -> Config:
    tree: dict[str, Any] = {"student": "s", "teachers": [{"name": "a", "data": "a.jsonl"}], "rounds": 2}
    return parse_config({**tree, **changes}, "test")


# --- the lock ------------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "locked\n"
            who = f"process {holder.pid} on {socket.gethostname()}"
            with pytest.raises(UserError, match=who), RunDir(run).lock():
                pass
            # a real second process too, and the first one's name survives it
            other = subprocess.run(command, capture_output=True, text=True, check=False)
            assert who in other.stderr
            assert "locked" not in other.stdout
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    with RunDir(run).lock():
        said = (run / "run.process").read_text()
        assert said == f"process {os.getpid()} on {socket.gethostname()}\n"
    with RunDir(run).lock():  # and it is let go of
        pass


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), RunDir(tmp_path / "file" / "run").lock():
        pass


# --- going on with a run -------------------------------------------------------------------------


def test_a_run_is_begun_once_and_gone_on_with(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.lock():
        run.begin(config(), INPUTS)
        write_record(run.path / "before.json", EvaluationRecord())
        run.begin(config(), {**INPUTS, "versions": {"torch": "9"}})
    assert run.config() == config()
    # as it was begun, not as it goes on
    assert run.environment() == {"format": FORMAT, "folder": str(tmp_path / "run"), **INPUTS}


def test_rounds_stop_and_output_may_change(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.begin(config(), INPUTS)
    longer = config(rounds=7, stop={"patience": 1}, output="elsewhere")
    run.begin(longer, INPUTS)
    assert run.config() == longer


@pytest.mark.parametrize(
    ("branch", "others"),
    [
        ({"batch_tokens": 512}, {}),
        ({"loss_chunk": 256, "activation_checkpointing": False, "liger": "off", "offload": "off"}, {}),
        ({"batch_size": 2, "gradient_accumulation": 8}, {"eval": {"batch_size": 1}}),
        ({"batch_size": 16, "gradient_accumulation": 1, "batch_tokens": 9000}, {"device": "cpu"}),
    ],
)
def test_what_changes_nothing_but_rounding_may_change(
    tmp_path: Path, branch: dict[str, Any], others: dict[str, Any]
) -> None:
    run = RunDir(tmp_path)
    run.begin(config(), INPUTS)
    write_record(run.path / "before.json", EvaluationRecord())
    other = config(branch=branch, **others)
    run.begin(other, INPUTS)
    assert run.config() == other
    run.begin(config(), INPUTS)  # and back


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"seed": 1}, ["seed"]),
        ({"branch": {"batch_size": 2}}, ["branch.batch_size"]),  # half as many traces a step
        (
            {"branch": {"batch_size": 8, "gradient_accumulation": 8}},
            ["branch.batch_size", "branch.gradient_accumulation"],
        ),
        ({"branch": {"max_length": 100, "loss_chunk": 1}}, ["branch.max_length"]),
        ({"lora": {"r": 8}, "branch": {"learning_rate": 1.0}}, ["lora.r", "branch.learning_rate"]),
        ({"quantization": "none"}, ["quantization"]),
        ({"merge": {"method": "ties", "density": 0.5}}, ["merge.method", "merge.density"]),
        ({"teachers": [{"name": "b", "data": "a.jsonl"}]}, ["teachers.0.name"]),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path: Path, changes: dict[str, Any], names: list[str]) -> None:
    run = RunDir(tmp_path)
    run.begin(config(), INPUTS)
    write_record(run.path / "before.json", EvaluationRecord())
    with pytest.raises(UserError, match="started with other settings") as e:
        run.begin(config(**{"rounds": 9, **changes}), INPUTS)
    assert f"({', '.join(sorted(names))})" == f"({', '.join(sorted(_named(str(e.value))))})"
    assert run.config() == config()


def _named(message: str) -> list[str]:
    return message.split("(")[1].split(")")[0].split(", ")


def test_a_run_with_nothing_finished_takes_other_settings(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.begin(config(), INPUTS)
    run.begin(config(seed=7), {**INPUTS, "inputs": {"student": "other"}})
    assert run.config().seed == 7
    assert run.environment()["inputs"] == {"student": "other"}


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"device": "NVIDIA GeForce RTX 4090", "kind": "cuda", "dtype": "bfloat16"}, "cuda"),
        ({"device": "x86_64", "kind": "cpu", "dtype": "float32"}, "cpu"),
        ({"device": "Tesla T4"}, "cuda"),  # as runs before had it
        ({"device": "NVIDIA A100-SXM4-40GB"}, "cuda"),
        ({"device": "x86_64"}, "cpu"),
        ({"device": "arm"}, "cpu"),
        ({"device": "Intel64 Family 6 Model 154 Stepping 3, GenuineIntel"}, "cpu"),
        ({"device": platform.processor() or "cpu"}, "cpu"),
        ({}, None),
    ],
)
def test_a_run_goes_on_on_its_kind_of_device_unless_another_is_asked_for(
    tmp_path: Path, said: dict[str, str], kind: str | None
) -> None:
    run = RunDir(tmp_path)
    run.check_device("auto", "cpu")  # nothing was begun
    run.begin(config(), {**INPUTS, **said})
    write_record(run.path / "before.json", EvaluationRecord())
    assert run.kind == kind
    for here in ("cpu", "cuda"):
        if kind in (None, here):
            run.check_device("auto", here)
        else:
            with pytest.raises(UserError) as e:
                run.check_device("auto", here)
            assert str(e.value) == (
                f"{tmp_path}: started on {kind} ({said['device']}), but here device `auto` is {here}; use that device "
                f"again, or continue with device={here}"
            )
            run.check_device(here, here)
        run.begin(config(device=here), {**INPUTS, **said})


def test_other_files_are_refused_and_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.begin(config(), INPUTS)
    write_record(run.path / "before.json", EvaluationRecord())
    with pytest.raises(UserError, match=r"\(a\.jsonl has changed\)"):
        run.begin(config(), {"inputs": {"student": "abc", "a.jsonl": "other"}})
    with pytest.raises(UserError, match=r"\(student has changed\)"):
        run.begin(config(), {"inputs": {"student": "other", "a.jsonl": "def"}})


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    run = RunDir(tmp_path)
    with pytest.raises(UserError, match="holds something that is not a run"), run.lock():
        run.begin(config(), INPUTS)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match=r"not a run folder: it has no config\.yaml"):
        run.config()


def test_a_run_killed_while_it_began_can_be_begun_again(tmp_path: Path) -> None:
    done = RunDir(tmp_path / "done")
    done.begin(config(), INPUTS)
    killed = RunDir(tmp_path / "killed")
    with killed.lock():
        # the state between the two files that `begin` writes
        write_text(killed.path / "environment.json", (done.path / "environment.json").read_text())
        (killed.path / ".config.yaml.partial").write_text("stud")
    with killed.lock():
        killed.begin(config(), INPUTS)
    assert killed.config() == config()


# --- newer, damaged ------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [FORMAT + 1, 99])
def test_a_run_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path, made: int) -> None:
    run = RunDir(tmp_path)
    run.begin(config(), INPUTS)
    write_record(run.path / "before.json", EvaluationRecord())
    newer = {"format": made, "versions": {"mot-lora": "9.1"}, "inputs": {}, "more": []}
    write_text(tmp_path / "environment.json", json.dumps(newer))
    before = files_of(tmp_path)
    for look in (run.config, run.environment, lambda: run.check(config()), lambda: run.repair(config())):
        with pytest.raises(
            UserError, match=r"written by mot-lora 9\.1, which is newer than this; update mot-lora$"
        ) as e:
            look()
        assert not isinstance(e.value, DamagedError)
    with pytest.raises(UserError, match="newer"), run.lock():
        run.begin(config(), INPUTS)
    for file in tmp_path.glob("run.*"):
        file.unlink()
    assert files_of(tmp_path) == before


def finished(path: Path, rounds: int) -> RunDir:
    """A run of one teacher, without adapters; each branch has a file, and a state that a kill left."""
    run = RunDir(path)
    run.begin(config(rounds=rounds), INPUTS)
    write_record(path / "before.json", EvaluationRecord())
    for number in range(1, rounds + 1):
        branch, state = run.branch(number, "a"), run.job(number, "a").state / "checkpoint-1"
        for folder in (branch, state):
            write_text(folder / "weights.safetensors", f"weights {number}")
        train = TrainRecord(steps=1, tokens=2, loss=0.5)
        record = BranchRecord(round=number, teacher="a", learning_rate=1e-3, train=train, files=hashes(branch))
        write_record(branch / "branch.json", record)
        seal(state, 1e-3, 2, 1.0)
    return run


def test_a_run_that_is_whole_needs_no_repair(tmp_path: Path) -> None:
    run = finished(tmp_path, 3)
    before = files_of(tmp_path)
    run.check(config(rounds=3))
    assert run.repair(config(rounds=3)) is None
    assert files_of(tmp_path) == before


def test_all_damage_is_set_aside_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    run = finished(tmp_path, 3)
    # found in this order: the branch of round 3, the one of round 2 that round 3 is built on, the state of round 1
    damaged = [
        tmp_path / "before.json",
        run.branch(3, "a") / "weights.safetensors",
        run.job(1, "a").state / "checkpoint-1" / "weights.safetensors",
    ]
    for file in damaged:
        file.write_text("something else")
    before = files_of(tmp_path)
    aside = run.repair(config(rounds=3))
    assert aside == tmp_path / "damaged-001"
    assert sorted(files_of(tmp_path).values()) == sorted(before.values())
    assert sorted(p.name for p in aside.iterdir()) == ["before.json", *(f"round-00{n}" for n in ("1", "2", "3", "3-2"))]
    assert [p.name for p in run.round(1).iterdir()] == ["a"]
    run.check(config(rounds=3))
    (run.branch(1, "a") / "weights.safetensors").write_text("again")
    assert run.repair(config(rounds=3)) == tmp_path / "damaged-002"  # never over what lies aside


def test_where_a_run_logs_may_change_whatever_stood_there_before() -> None:
    for key in (
        "branch.report_to",
        "branch.report_to.0",
        "branch.save_steps",
        "branch.offload",
        "teachers.1.learning_rate",
        "stop.metric",
        "eval.branches",
        "eval.final",
        "eval.final.samples",
    ):
        assert MAY_CHANGE.fullmatch(key)
    for key in (
        "branch.steps",
        "branch.batch_size",
        "branch.report_to_all",
        "teachers.1.learning_rates",
        "teachers.1",
        "eval.samples",
        "eval.batch_sizes",
    ):
        assert not MAY_CHANGE.fullmatch(key)
