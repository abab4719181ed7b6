import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mot_lora import UserError
from mot_lora.config import Config
from mot_lora.reader import parse_config
from mot_lora.records import BranchRecord, EvaluationRecord, TrainRecord
from mot_lora.rundir import RunDir, staged, write_lines, write_record, write_text

INPUTS = {"inputs": {"student": "abc", "a.jsonl": "def"}}
HOLD = """
import sys, time
from pathlib import Path
from mot_lora.rundir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(600)
"""


def config(**changes: Any) -> Config:
    tree: dict[str, Any] = {"student": "s", "teachers": [{"name": "a", "data": "a.jsonl"}], "rounds": 2}
    return parse_config({**tree, **changes}, "test")


# --- writing whole or not at all -----------------------------------------------------------------


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "round" / "a"

    def cut_short() -> None:
        with staged(path) as folder:
            (folder / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        cut_short()
    assert list(path.parent.iterdir()) == []

    with staged(path) as folder:
        (folder / "weights").write_text("whole")
        assert not path.exists()
    assert (path / "weights").read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_staged_folder_replaces_what_was_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(RuntimeError), staged(path):
        raise RuntimeError
    assert (path / "old").exists()
    with staged(path) as folder:
        (folder / "new").write_text("new")
    assert [f.name for f in path.iterdir()] == ["new"]


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from mot_lora.rundir import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "a"
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -signal.SIGKILL
    assert not path.exists()
    with staged(path) as folder:
        assert list(folder.iterdir()) == []
        (folder / "new").write_text("new")
    assert list(tmp_path.iterdir()) == [path]
    assert [f.name for f in path.iterdir()] == ["new"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_text(path, "old")
    inode = path.stat().st_ino
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "x" * 100_000 + "\ud800")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_ino != inode  # renamed into place, never written over
    assert [f.name for f in path.parent.iterdir()] == ["file.json"]


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    record = BranchRecord(
        round=3,
        teacher="a",
        train=TrainRecord(steps=1, tokens=2, loss=0.1),
        evaluation=EvaluationRecord(accuracy=1 / 3),
    )
    assert run.branch_record(3, "a") is None
    write_record(run.branch(3, "a") / "branch.json", record)
    assert (tmp_path / "round-003" / "a" / "branch.json").exists()
    assert run.branch_record(3, "a") == record
    write_lines(tmp_path / "lines", [record, record])
    lines = (tmp_path / "lines").read_text().splitlines()
    assert [BranchRecord.model_validate_json(line) for line in lines] == [record, record]


@pytest.mark.parametrize("content", ["", "{", '{"round": 1}', '{"round": 1, "teacher": "a", "train": null}', "[]"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    run = RunDir(tmp_path)
    write_text(run.branch(1, "a") / "branch.json", content)
    with pytest.raises(UserError, match=r"round-001/a/branch\.json: damaged.*remove it") as e:
        run.branch_record(1, "a")
    assert "\n" not in str(e.value)


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
        said = (run / "run.lock").read_text()
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
    assert run.environment() == INPUTS


def test_rounds_stop_and_output_may_change(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.begin(config(), INPUTS)
    longer = config(rounds=7, stop={"patience": 1}, output="elsewhere")
    run.begin(longer, INPUTS)
    assert run.config() == longer


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"seed": 1}, ["seed"]),
        ({"lora": {"r": 8}, "branch": {"learning_rate": 1.0}}, ["lora.r", "branch.learning_rate"]),
        ({"quantization": "none"}, ["quantization"]),
        ({"student": "other"}, ["student"]),
        ({"merge": {"method": "ties", "density": 0.5}}, ["merge.method", "merge.density"]),
        ({"teachers": [{"name": "b", "data": "a.jsonl"}]}, ["teachers"]),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path: Path, changes: dict[str, Any], names: list[str]) -> None:
    run = RunDir(tmp_path)
    run.begin(config(), INPUTS)
    write_record(run.path / "before.json", EvaluationRecord())
    with pytest.raises(UserError, match="begun with other settings") as e:
        run.begin(config(**{"rounds": 9, **changes}), INPUTS)
    assert f"({', '.join(sorted(names))})" == f"({', '.join(sorted(_named(str(e.value))))})"
    assert run.config() == config()


def _named(message: str) -> list[str]:
    return message.split("(")[1].split(")")[0].split(", ")


def test_a_run_with_nothing_finished_takes_other_settings(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.begin(config(), INPUTS)
    run.begin(config(seed=7), {"inputs": {"student": "other"}})
    assert run.config().seed == 7
    assert run.environment()["inputs"] == {"student": "other"}


def test_other_files_are_refused_and_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.begin(config(), INPUTS)
    write_record(run.path / "before.json", EvaluationRecord())
    with pytest.raises(UserError, match=r"\(a\.jsonl changed since\)"):
        run.begin(config(), {"inputs": {"student": "abc", "a.jsonl": "other"}})
    with pytest.raises(UserError, match=r"\(student changed since\)"):
        run.begin(config(), {"inputs": {"student": "other", "a.jsonl": "def"}})


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    run = RunDir(tmp_path)
    with pytest.raises(UserError, match="holds something that is not a run"), run.lock():
        run.begin(config(), INPUTS)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match=r"not a run: it has no config\.yaml"):
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
