"""A row that cannot be used does not end a file: it is left out, counted by reason and shown; or it stops the work."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from transformers import PreTrainedTokenizerBase
from wild import jsonl, recipe, rows, student

from mot_lora.config import Config, TeacherConfig
from mot_lora.data.dataset import load_data
from mot_lora.data.overlap import Overlap
from mot_lora.data.records import DataRecord
from mot_lora.data.select import Selection
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.errors import UserError
from mot_lora.reader import parse_config

GOOD = [{"question": f"{i}+1?", "response": f"<think>add</think>{i + 1}", "answer": str(i + 1)} for i in range(20)]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"{i}+1?"},
            {"role": "assistant", "content": f"<think>add</think>{i + 1}"},
        ]
    }
    for i in range(20)
]
ASKED, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
IDS = [{"input_ids": [5, 40 + i, i, 8], "labels": [-100, -100, i, 8]} for i in range(20)]

BAD: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "null": (GOOD, {"question": "x?", "response": None, "answer": "5"}, "without an answer"),
    "blank": (GOOD, {"question": "x?", "response": " "}, "without an answer"),
    "no question": (GOOD, {"question": None, "response": "5"}, "without a question"),
    "neither": (GOOD, {"text": "x"}, "without a question"),
    "a list of lists": (GOOD, {"question": ["a", "b"], "response": "5"}, "without text"),
    "half a character": (GOOD, {"question": "x?", "response": "5\ud800"}, "without text"),
    "user last": (TALKS, {"messages": [ASKED, SAID, ASKED]}, "with messages out of order"),
    "assistant alone": (TALKS, {"messages": [SAID]}, "with messages out of order"),
    "no messages": (TALKS, {"messages": []}, "without a question"),
    "null content": (TALKS, {"messages": [ASKED, {"role": "assistant", "content": None}]}, "without text"),
    "an unknown role": (TALKS, {"messages": [ASKED, {"role": "judge", "content": "x"}]}, "with unreadable messages"),
    "a call": (TALKS, {"messages": [ASKED, {**SAID, "tool_calls": [{"name": "f"}]}]}, "answering with a call"),
    "a picture": (GOOD, {"question": "x?", "response": "5", "image": "x.png"}, "with more than text"),
    "all masked": (IDS, {"input_ids": [5, 6], "labels": [-100, -100]}, "without a trained token"),
    "first token only": (IDS, {"input_ids": [5, 6], "labels": [5, -100]}, "without a trained token"),
    "no tokens": (IDS, {"input_ids": [], "labels": []}, "without a question"),
    "other labels": (IDS, {"input_ids": [5, 6], "labels": [-100, 7]}, "with other labels"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedTokenizerBase]:
    folder = tmp_path_factory.mktemp("base")
    student(folder)
    return folder, load_tokenizer(folder)


@pytest.fixture
def read(base: tuple[Path, PreTrainedTokenizerBase]) -> Callable[..., DataRecord]:
    def load(file: Path, evaluation: Path | None = None, **teacher: Any) -> DataRecord:
        config = Config(
            student=str(base[0]),
            teachers=(TeacherConfig.model_validate({"name": "one", "data": str(file), **teacher}),),
        )
        settings = {**config.eval.model_dump(), "data": str(evaluation) if evaluation else None, "holdout": 0.2}
        return load_data(Config.model_validate({**config.model_dump(), "eval": settings}), base[1]).record

    return load


def dumped(path: Path, *found: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in found))
    return path


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_cannot_be_used_is_left_out_and_counted(
    kind: str, read: Callable[..., DataRecord], tmp_path: Path
) -> None:
    """hiyouga/LlamaFactory#6878."""
    good, bad, reason = BAD[kind]
    file = dumped(tmp_path / "t.jsonl", *good[:7], bad, *good[7:])
    record = read(file)
    (one,) = record.teachers
    assert one.left_out == {reason: 1}
    assert one.rows == 21 == one.used + one.held_out + 1
    assert re.fullmatch(rf"{re.escape(str(file))}:8: .+", one.bad[reason])
    assert [line for line in record.remarks if "left out" in line] == [
        f"one: 1 left out {reason}; the first: {one.bad[reason]}"
    ]
    with pytest.raises(UserError, match=re.escape(one.bad[reason])):
        read(file, on_bad_row="stop")


def test_where_all_rows_are_bad_the_reason_is_said(read: Callable[..., DataRecord], tmp_path: Path) -> None:
    file = dumped(tmp_path / "t.jsonl", {"question": "a", "response": None}, {"question": "b", "text": ""}, {"x": 1})
    with pytest.raises(UserError) as e:
        read(file)
    assert str(e.value) == (
        f"{file}:1: nothing in `response` (none of 3 rows can be used: 2 without an answer, 1 without a question)"
    )
    # of two sources, one of which fits nothing, nothing is trained on the other alone
    with pytest.raises(UserError, match="none of 3 rows can be used"):
        read(file, data=[str(dumped(tmp_path / "good.jsonl", *GOOD)), str(file)])


LINES = [
    ('{"question": "x?", "response": ', "not JSON"),
    ('{"question": "x?" "response": 1}', "not JSON"),
    ("not at all", "not JSON"),
    ("[1, 2]", "not an object"),
    ("null", "not an object"),
]


@pytest.mark.parametrize(("line", "reason"), LINES)
def test_a_line_that_is_no_row_is_left_out_and_counted(
    line: str, reason: str, read: Callable[..., DataRecord], tmp_path: Path
) -> None:
    file = dumped(tmp_path / "t.jsonl", *GOOD[:3], line, *GOOD[3:])
    (one,) = read(file).teachers
    assert (one.left_out, one.rows) == ({reason: 1}, 21)
    assert one.bad[reason].startswith(f"{file}:4: ")
    with pytest.raises(UserError, match=r"t\.jsonl:4: "):
        read(file, on_bad_row="stop")


def test_a_file_that_is_cut_short_is_an_error(read: Callable[..., DataRecord], tmp_path: Path) -> None:
    whole = dumped(tmp_path / "t.jsonl", *GOOD).read_bytes()
    (tmp_path / "t.jsonl").write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"t\.jsonl:20: .*; the file ends within this row: was it cut short\?"):
        read(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "t.jsonl.gz")
    (tmp_path / "t.jsonl").write_bytes(whole.rstrip())  # without a last line's end it is whole
    assert read(tmp_path / "t.jsonl").teachers[0].rows == 20


def test_a_table_with_a_cell_too_many(read: Callable[..., DataRecord], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question,response\n" + "".join(f"{i}?,{i}\n" for i in range(9)) + "x,y,z\n")
    assert read(tmp_path / "t.csv").teachers[0].left_out == {"with too many cells": 1}


def test_questions_that_cannot_be_asked_are_left_out_and_counted(
    read: Callable[..., DataRecord], tmp_path: Path
) -> None:
    file = dumped(tmp_path / "t.jsonl", *GOOD)
    asked = dumped(tmp_path / "q.jsonl", {"question": "a", "answer": "1"}, {"question": "b", "answer": None}, "{")
    record = read(file, asked)
    assert (record.questions, record.left_out) == (1, {"not JSON": 1, "without a right answer": 1})
    assert any(line.startswith("questions: 1 left out without a right answer; the first: ") for line in record.remarks)
    with pytest.raises(UserError, match=r"q\.jsonl:1: nothing in `answer`"):
        read(file, dumped(tmp_path / "q.jsonl", {"question": "b", "answer": None}))


def test_a_conversation_that_the_template_does_not_take_is_left_out(tmp_path: Path) -> None:
    student(
        tmp_path / "base",
        template="{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    used = {"messages": [ASKED, SAID, {"role": "tool", "content": "5"}, SAID]}
    file = jsonl(tmp_path / "one.jsonl", [*TALKS, used])
    tree = {
        "student": str(tmp_path / "base"),
        "teachers": [{"name": "one", "data": str(file)}],
        "eval": {"holdout": 0.2},
    }
    (one,) = load_data(parse_config(tree, "here"), load_tokenizer(tmp_path / "base")).record.teachers
    assert one.left_out == {"not taken by the student's template": 1}
    assert "no tools" in next(iter(one.bad.values()))


def test_verdicts_of_a_row_are_counted_as_reasons(read: Callable[..., DataRecord], tmp_path: Path) -> None:
    row = {"problem": "q?", "generations": ["<think>a</think>1", "<think>b</think>2"], "answer": "1"}
    others = [{**row, "problem": f"{i}?"} for i in range(9)]
    marked = {**row, "correctness_math_verify": [True, False], "is_reasoning_complete": [True, True]}
    (one,) = read(dumped(tmp_path / "t.jsonl", *others, marked)).teachers
    assert (one.left_out, one.rows, one.bad) == ({"marked as wrong": 1}, 20, {})
    (one,) = read(dumped(tmp_path / "t.jsonl", *others, marked), verified_only=True).teachers
    assert one.left_out == {"marked as wrong": 1, "wrong answer": 9}


def test_any_right_answer_verifies(read: Callable[..., DataRecord], tmp_path: Path) -> None:
    found = [{**row, "gold": ["seventy", row["answer"]]} for row in GOOD]
    (one,) = read(dumped(tmp_path / "t.jsonl", *found), verified_only=True).teachers
    assert one.left_out == {}


def test_a_teacher_who_never_reasons_is_told(read: Callable[..., DataRecord], tmp_path: Path) -> None:
    bare = [{"question": r["question"], "response": r["answer"]} for r in GOOD]
    record = read(dumped(tmp_path / "t.jsonl", *bare))
    assert [line for line in record.remarks if line.startswith("one: ")] == [
        "one: no trace has a chain of thought in known marks: all have only an answer"
    ]
    assert not [line for line in read(dumped(tmp_path / "t.jsonl", *bare, *GOOD)).remarks if line.startswith("one: ")]


def test_the_commands_show_what_is_left_out(base: tuple[Path, Any], tmp_path: Path, call: Callable[..., Any]) -> None:
    file = dumped(tmp_path / "one.jsonl", *rows(20), {"question": "x?", "answer": None}, "{")
    config = recipe(tmp_path, base[0], file)
    for command in ("data", "plan"):
        status, out, err = call(command, config)
        assert status == 0, err
        assert "one: 1 left out without an answer; the first:" in " ".join(out.split())
        assert "one: 1 left out not JSON; the first:" in " ".join(out.split())
    status, out, _ = call("data", config, "--json")
    assert json.loads(out)["teachers"][0]["left_out"] == {"not JSON": 1, "without an answer": 1}
    assert "one.jsonl:22: not JSON" in refused(call("data", config, "teachers.0.on_bad_row=stop"))
    assert "on_bad_row" in refused(call("data", config, "teachers.0.on_bad_row=ignore"))


def test_a_trace_that_no_tokens_could_make_short_is_not_tokenized(
    base: tuple[Path, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    which = Selection(TeacherConfig(name="a", data="a"), base[1], Overlap((), 13), 64)
    monkeypatch.setattr("mot_lora.data.select.encode", lambda *_: pytest.fail("tokenized"))
    long = {"question": "q", "response": "<think>" + "so 1 + 1 = 2. " * 100_000 + "</think>2"}
    assert which.choose([("row 1", long)], 0) == []
    assert which.left_out == {"too long": 1}
    assert 64 < which.most_characters < 64 * 20
