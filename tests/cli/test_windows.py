"""The package without what only Unix has (see as_on_windows.py)."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from as_on_windows import renaming
from conftest import files_of, stored

from mot_lora import run
from mot_lora.durable import move, sync
from mot_lora.reader import load_config

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine

PROGRAM = Path(__file__).with_name("as_on_windows.py")


def on_windows(*commands: list[Any]) -> subprocess.CompletedProcess[str]:
    """Commands, one after the other, in one process whose console is Windows' too."""
    words = [[str(word) for word in command] for command in commands]
    return subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", PROGRAM, json.dumps(words)],
        capture_output=True,
        encoding="cp1252",
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        check=False,
    )


PLAYED = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Windows is played on Linux")


@PLAYED
def test_a_run_and_all_that_is_made_of_it(config_file: Path, tmp_path: Path) -> None:
    output, same = tmp_path / "run", tmp_path / "same"
    config = ["run", config_file, "-q", "branch.save_steps=1"]
    branches = [output / "round-001" / teacher for teacher in "ab"]
    done = on_windows(
        ["init", tmp_path / "new.yaml"],
        ["data", config_file],
        [*config, f"output={output}"],
        [*config, f"output={output}", "rounds=2"],  # gone on with
        ["show", output],
        ["report", output],
        ["export", output, "--round", 2, "--out", tmp_path / "student"],
        ["merge", *branches, "--out", tmp_path / "merged"],
        ["fold", load_config(config_file).student, tmp_path / "merged", "--out", tmp_path / "folded"],
        ["inspect", tmp_path / "merged"],
        ["plan", config_file, "--card", "RTX 4090"],
    )
    assert done.returncode == 0, done.stderr
    run(load_config(config_file, [f"output={same}", "branch.save_steps=1", "rounds=2"]))
    for teacher in "ab":
        for file in ("adapter_model.safetensors", "adapter_config.json", "answers.jsonl"):
            parts = "round-002", teacher, file
            assert output.joinpath(*parts).read_bytes() == same.joinpath(*parts).read_bytes(), parts
    assert stored(tmp_path / "folded").keys() == stored(tmp_path / "student").keys()
    assert not [name for name in files_of(tmp_path) if ".partial" in name]


@PLAYED
def test_a_file_is_moved_when_another_program_has_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", renaming(onto_files=True))
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    reader = (tmp_path / "new").open()
    threading.Timer(0.2, reader.close).start()
    move(tmp_path / "new", tmp_path / "old")
    assert reader.closed
    assert (tmp_path / "old").read_text() == "new"
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_not_there_cannot_be_flushed_and_a_folder_can(tmp_path: Path) -> None:
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "absent")
