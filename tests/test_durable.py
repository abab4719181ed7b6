import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mot_lora import UserError
from mot_lora.durable import (
    DamagedError,
    beside,
    check_files,
    hashes,
    read_record,
    staged,
    write_lines,
    write_record,
    write_text,
)
from mot_lora.records import BranchRecord, EvaluationRecord, TrainRecord
from mot_lora.runs.rundir import RunDir

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
from mot_lora.durable import staged
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
        learning_rate=1e-3,
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
    with pytest.raises(UserError, match=r"round-001/a/branch\.json: damaged.*--repair") as e:
        run.branch_record(1, "a")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change", [lambda t: t.replace("0.5", "0.6"), lambda t: t[:-3], lambda t: t.replace("a", "")])
def test_a_record_that_is_not_as_it_was_written_is_found(tmp_path: Path, change: Callable[[str], str]) -> None:
    file = tmp_path / "record.json"
    record = TrainRecord(steps=1, tokens=2, loss=0.5)
    write_record(file, record)
    assert read_record(file, TrainRecord) == record
    file.write_text(change(file.read_text()))
    with pytest.raises(DamagedError, match=r"record\.json: damaged") as e:
        read_record(file, TrainRecord)
    assert e.value.path == file


def test_numbers_of_a_record_keep_their_checksum(tmp_path: Path) -> None:
    # JSON writes them anew when the record is read
    for loss in (1e-300, 1e22, 0.1 + 0.2, float("nan"), float("inf"), -0.0):
        write_record(tmp_path / "r", TrainRecord(steps=10**15, tokens=0, loss=loss))
        found = read_record(tmp_path / "r", TrainRecord)
        assert repr(found.loss) == repr(loss)


def test_files_are_those_that_were_written(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("1")
    (tmp_path / "notes.txt").write_text("2")
    said = hashes(tmp_path)
    assert list(said) == ["a.json"]
    check_files(tmp_path, said)
    (tmp_path / "a.json").write_text("3")
    with pytest.raises(DamagedError, match=r"a\.json: damaged \(its checksum differs"):
        check_files(tmp_path, said)
    (tmp_path / "a.json").unlink()
    with pytest.raises(DamagedError, match=r"a\.json: damaged \(No such file"):
        check_files(tmp_path, said)


def test_a_folder_beside_is_never_one_that_is_there(tmp_path: Path) -> None:
    made: list[str] = []
    for _ in range(3):
        made.append(beside(tmp_path / "run").name)
        (tmp_path / made[-1]).mkdir()
    assert made == ["run", "run-2", "run-3"]
