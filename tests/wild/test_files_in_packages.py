"""Files and problems as packages carry them: lists called .jsonl, tables that are no data, tasks without an answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wild import rows

from mot_lora.data.rows import read_rows
from mot_lora.data.traces import read_traces
from mot_lora.errors import RowError, UserError


@pytest.mark.parametrize("indent", [None, 4])
def test_a_jsonl_that_is_one_list_is_read_as_a_list(tmp_path: Path, indent: int | None) -> None:
    file = tmp_path / "codeio.jsonl"
    file.write_text(json.dumps(rows(3), indent=indent), encoding="utf-8")
    assert [row for _, row in read_rows(file)] == rows(3)


def test_lines_of_lists_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("[1]\n[2]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.jsonl:1: a row must be an object"):
        read_rows(file)


def test_a_list_that_is_cut_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(rows(3), indent=4)[:-3], encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.jsonl:\d+: not JSON"):
        read_rows(file)


def test_an_object_of_a_thousand_names_is_refused_by_a_short_line() -> None:
    """LlamaFactory's dataset_info.json, datasets' languages.json."""
    row = {f"dataset number {i} {'x' * 100}": {"file_name": "a.json"} for i in range(1000)}
    ((_, error),) = read_traces(row, "row 1")
    assert isinstance(error, RowError)
    assert "it has dataset number 0 " in str(error)
    assert "and 980 more; say in `columns`" in str(error)
    assert len(str(error)) < 2000


def test_a_task_without_right_answers_is_refused() -> None:
    with pytest.raises(UserError, match=r"reasoning_gym:rush_hour:2: its problems have no right answer"):
        read_rows("reasoning_gym:rush_hour:2")


@pytest.mark.parametrize("task", ["list_functions", "isomorphic_strings"])
def test_problems_are_the_same_in_every_process(task: str) -> None:
    """Of one that draws from `random` itself, and one that follows the order of sets."""
    source = f"reasoning_gym:{task}:3"
    code = f"import json; from mot_lora.data.rows import read_rows; print(json.dumps(read_rows({source!r})))"
    there = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, check=True
    )
    assert json.loads(there.stdout) == json.loads(json.dumps(read_rows(source)))
