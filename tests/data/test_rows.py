"""Rows from files of every kind, folders and saved datasets: the same rows, and each mistake in one line."""

import csv
import gzip
import io
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mot_lora.data.dataset import fingerprint
from mot_lora.data.rows import READERS, has_known_suffix, read_rows
from mot_lora.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"question": "1 + 1?", "reasoning": 'one,\n"and"\tone', "answer": "2"},
    {"question": "¿2 + 2?", "reasoning": "two\u2028and\u0085two\r\nand\x0bso", "answer": "4"},
    {"question": " 3 ", "reasoning": "'", "answer": "x;y|z"},
]
NESTED: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"{i} + 1?"},
            {"role": "assistant", "content": f"<think>x</think>{i + 1}"},
        ],
        "ids": [1, 2, i],
        "none": None,
        "score": i / 3,
        "right": i == 1,
    }
    for i in range(4)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` makes of a folder of files is kept in a cache, and that is not to be the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows)


def table(rows: list[dict[str, Any]], dialect: str = "excel") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, rows[0], dialect=dialect)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def write_parquet(path: Path, rows: list[dict[str, Any]], **settings: Any) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path, **settings)


def packed(data: bytes) -> bytes:
    return gzip.compress(data)


TEXT: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "x.jsonl": lines,
    "X.JSONL": lines,
    "x.ndjson": lines,
    "x.v1.2.jsonl": lines,
    "lines.json": lines,
    "x.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "inner.json": lambda rows: json.dumps({"data": rows}).encode(),
}
TABLES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "x.csv": table,
    "x.tsv": lambda rows: table(rows, "excel-tab"),
}


def values(path: str | Path, *choice: str) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path, *choice)]


def message_of(*asked: Any) -> str:
    with pytest.raises(UserError) as e:
        read_rows(*asked)
    assert not re.search(r"[\r\n]", str(e.value))
    return str(e.value)


# --- the same rows from every format -------------------------------------------------------------------


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", [*TEXT, *TABLES])
def test_every_text_format_gives_the_same_rows_and_fingerprint(tmp_path: Path, name: str, bom: bytes, gz: bool) -> None:
    data = bom + {**TEXT, **TABLES}[name](ROWS)
    path = tmp_path / (name + ".gz" * gz)
    path.write_bytes(packed(data) if gz else data)
    assert values(path) == ROWS
    assert fingerprint(read_rows(path)) == fingerprint([("elsewhere", row) for row in ROWS])


@pytest.mark.parametrize("rows", [ROWS, NESTED], ids=["texts", "messages"])
def test_parquet_and_saved_datasets_give_the_rows_and_fingerprint_of_jsonl(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines(rows))
    write_parquet(tmp_path / "x.parquet", rows, row_group_size=2)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "dict")
    prints = {fingerprint(read_rows(tmp_path / n)) for n in ("x.jsonl", "x.parquet", "saved", "dict")}
    assert len(prints) == 1
    assert all(values(tmp_path / n) == rows for n in ("x.jsonl", "x.parquet", "saved", "dict"))


def test_pandas_own_files_are_read(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS)
    frame.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "x.json", orient="records")
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_csv(tmp_path / "x.csv.gz", index=False)
    frame.to_parquet(tmp_path / "x.parquet")
    assert all(values(tmp_path / f"x.{s}") == ROWS for s in ("jsonl", "json", "csv", "csv.gz", "parquet"))


def test_a_fingerprint_tells_rows_apart_and_not_their_columns_order() -> None:
    def of(*rows: dict[str, Any]) -> str:
        return fingerprint([("", row) for row in rows])

    a, b = {"question": "1", "answer": "2"}, {"question": "3", "answer": "4"}
    assert of(a, b) == of(dict(reversed(a.items())), b)
    assert len({of(a, b), of(b, a), of(a), of(a, a), of({**a, "answer": 2}), of({**a, "answer": "2 "})}) == 6
    assert of({"x": "\ud800", "y": b"\xff"}) != of({"x": "\ud801", "y": b"\xff"})


# what no sign of a format is: a text of any other is any text
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.lists(st.sampled_from(["question", "answer", "a b", "Ünï", "x\u2028y"]), min_size=1, max_size=3, unique=True)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_text_comes_back_from_every_format(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    columns = data.draw(names)
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(columns, anything)), min_size=1, max_size=3))
    folder = tmp_path_factory.getbasetemp()
    for name, form in TEXT.items():
        (folder / name).write_bytes(form(rows))
        assert values(folder / name) == rows
    write_parquet(folder / "x.parquet", rows)
    assert values(folder / "x.parquet") == rows
    as_read = [{k: v or None for k, v in row.items()} for row in rows]  # a table has no empty text
    quoted = "".join(
        ",".join('"' + cell.replace('"', '""') + '"' for cell in line) + "\r\n"
        for line in [columns, *([row[c] for c in columns] for row in rows)]
    )
    (folder / "x.csv").write_bytes(quoted.encode())
    assert values(folder / "x.csv") == as_read


# --- lines and where they stand ------------------------------------------------------------------------

GOOD = b'{"question": "1 + 1 = ?", "answer": "2"}\n'


def test_windows_line_ends_and_empty_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\r\n" + GOOD.replace(b"\n", b"\r\n") * 2 + b"  \r\n\n" + GOOD.strip())
    assert [where for where, _ in read_rows(path)] == [f"{path}:{n}" for n in (2, 3, 6)]
    path = tmp_path / "a.csv"
    path.write_bytes(b"question,answer\r\n\r\n1,2\r\n\r\n3,4")
    assert read_rows(path) == [
        (f"{path}:3", {"question": "1", "answer": "2"}),
        (f"{path}:5", {"question": "3", "answer": "4"}),
    ]


def test_signs_that_only_look_like_line_ends_do_not_end_a_row(tmp_path: Path) -> None:
    # str.splitlines would cut at each; JSON and CSV leave them as they are, also where nothing is quoted
    signs = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e"
    row = {"question": "q" + "q".join(signs) + "q", "answer": "2"}
    (tmp_path / "a.jsonl").write_bytes(lines([row]))
    (tmp_path / "a.csv").write_bytes(f"question,answer\n{row['question']},2\n".encode())
    (tmp_path / "b.csv").write_bytes(f'question,answer\n"{row["question"]}",2\n'.encode())
    (tmp_path / "a.tsv").write_bytes(f"question\tanswer\n{row['question']}\t2\n".encode())
    assert all(values(tmp_path / n) == [row] for n in ("a.jsonl", "a.csv", "b.csv", "a.tsv"))


def test_newlines_within_quotes_stay_and_lines_are_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'question,answer\n"a\nb\r\nc\rd","1"\nq,2,3\n')
    assert re.fullmatch(rf"{re.escape(str(path))}:\d: has more cells than the header has names", message_of(path))
    path.write_bytes(b'question,answer\n"a\nb\r\nc\rd","1"\nq,2\n')
    (_, first), (where, _) = read_rows(path)
    assert first["question"] == "a\nb\r\nc\rd"
    assert int(where.rpartition(":")[2]) >= 5


def test_old_line_ends_end_lines_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"question,answer\r1,2\r3,4\r")
    assert values(tmp_path / "a.csv") == [{"question": "1", "answer": "2"}, {"question": "3", "answer": "4"}]


def test_a_cell_may_hold_a_megabyte(tmp_path: Path) -> None:
    row = {"question": "q", "reasoning": 'so, "then"\n' * 100_000, "answer": "2"}
    assert len(row["reasoning"]) > 2**20
    for name, form in {**TEXT, **TABLES}.items():
        (tmp_path / name).write_bytes(form([row]))
        assert values(tmp_path / name) == [row]


def test_an_empty_cell_is_nothing_and_a_missing_one_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'question,reasoning,answer\n1,,2\n3,""\n')
    assert values(tmp_path / "a.csv") == [
        {"question": "1", "reasoning": None, "answer": "2"},
        {"question": "3", "reasoning": None, "answer": None},
    ]


def test_one_object_is_one_row_and_a_list_in_an_object_is_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS[0]))
    assert read_rows(path) == [(f"{path}[0]", ROWS[0])]
    path.write_text(json.dumps({"rows": ROWS}))
    assert [where for where, _ in read_rows(path)] == [f"{path}[{i}]" for i in range(3)]
    for row in (NESTED[0], {"messages": NESTED[0]["messages"]}, {"conversations": NESTED[0]["messages"]}):
        path.write_text(json.dumps(row))
        assert values(path) == [row]


# --- folders and datasets ------------------------------------------------------------------------------


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """A saved DatasetDict of two splits, of which none is `train`."""
    both = {"easy": datasets.Dataset.from_list(ROWS[:1]), "hard": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


def test_a_split_is_chosen_by_name(splits: Path) -> None:
    assert values(splits, "easy") == ROWS[:1]
    assert values(splits, "hard") == ROWS[1:]
    assert [where for where, _ in read_rows(splits, "hard")] == [f"{splits}[0]", f"{splits}[1]"]


def test_of_several_splits_train_is_taken_or_one_is_asked_for(splits: Path, tmp_path: Path) -> None:
    assert message_of(splits).endswith("name one of its splits in `split`: easy, hard")
    assert message_of(splits, "train").endswith("name one of its splits in `split`: easy, hard")
    with_train = {"test": datasets.Dataset.from_list(ROWS[:1]), "train": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(with_train).save_to_disk(tmp_path / "two")
    assert values(tmp_path / "two") == ROWS[1:]
    assert values(tmp_path / "two", "test") == ROWS[:1]


def test_one_split_saved_alone_has_no_name(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert message_of(tmp_path / "saved", "train").endswith("holds a single split; leave `split` out")


def test_a_folder_of_data_files_is_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "train.jsonl").write_bytes(lines(ROWS[:2]))
    (tmp_path / "traces" / "test.jsonl").write_bytes(lines(ROWS[2:]))
    assert values(tmp_path / "traces") == ROWS[:2]
    assert values(tmp_path / "traces", "test") == ROWS[2:]
    assert values(tmp_path / "traces", "train[1:]") == ROWS[1:2]
    assert message_of(tmp_path / "traces", "dev").startswith(f"{tmp_path / 'traces'}: neither a data folder nor")


def test_a_folder_that_is_named_as_a_file_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    assert message_of(tmp_path / "x.jsonl").startswith(f"{tmp_path / 'x.jsonl'}: neither a data folder nor")
    (tmp_path / "x.jsonl" / "train.jsonl").write_bytes(lines(ROWS))
    assert values(tmp_path / "x.jsonl") == ROWS


@pytest.mark.parametrize(
    "name", ["open-r1/OpenR1-Math-220k", "gsm8k", "owner/name/more", "a b", "\0", "../..", "x" * 300]
)
def test_a_hub_name_that_cannot_be_had_is_one_line_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    began = time.monotonic()
    assert message_of(name, "train", "default").startswith(name)
    assert time.monotonic() - began < 20


# --- mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [*READERS, ".jsonl.gz", ".csv.gz"])
def test_a_missing_file_is_said_to_be_missing_and_not_looked_for_on_the_hub(tmp_path: Path, suffix: str) -> None:
    assert "no such file; give a .jsonl" in message_of(tmp_path / f"none{suffix}")
    assert f"none{suffix}: no such file" in message_of(f"none{suffix}")
    assert "no such file" in message_of(tmp_path / "none")


@pytest.mark.parametrize("name", ["x.txt", "x", "x.gz", "x.pdf", "x.jsonl.zst", "x.jsonl~"])
def test_a_file_of_another_kind_is_told_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD)
    assert message_of(tmp_path / name).startswith(f"{tmp_path / name}: not named as a data file is; give a .jsonl")


def test_a_file_has_no_split_and_no_subset(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    for choice in (("train",), (None, "main")):
        assert message_of(tmp_path / "a.jsonl", *choice).endswith("a file has no `split` or `subset`; leave them out")


HUGE = b"9" * 5000
MISTAKES = [
    ("a.jsonl", GOOD + b'{"question": \n', r":2: not JSON \(Expecting value at character 14\)"),
    (
        "a.jsonl",
        GOOD + b'{"question": "q" "answer": "2"}\n',
        r":2: not JSON \(Expecting ',' delimiter at character 18\)",
    ),
    ("a.jsonl", GOOD + b"\n[1, 2]\n", r':3: a row must be an object like {"question": '),
    ("a.jsonl", GOOD + b"null\n", r":2: a row must be an object"),
    ("a.jsonl", GOOD * 2 + GOOD.strip() * 2, r":3: not JSON \(Extra data"),
    ("a.jsonl", b"[" * 100_000, r":1: not JSON that can be read"),
    ("a.jsonl", b'{"a": ' + HUGE + b"}", r":1: not JSON that can be read"),
    ("a.jsonl", GOOD + b'{"question": "\x00"}', r":2: not JSON \(Invalid control character"),
    ("a.jsonl", b"\n \n", r": holds no rows$"),
    ("a.jsonl", b"", r": holds no rows$"),
    ("a.jsonl", b"\x80\x81\xff", r": not text in UTF-8"),
    ("a.jsonl", '{"question": "q"}'.encode("utf-16"), r": not text in UTF-8"),
    ("a.jsonl.gz", GOOD, r": cannot be read \(not gzip\)"),
    ("a.jsonl.gz", packed(GOOD * 99)[:-9], r": cannot be read \(Compressed file ended"),
    ("a.jsonl.gz", packed(GOOD * 99)[:14] + b"\xff\xff" + packed(GOOD * 99)[16:], r": cannot be read \("),
    ("a.jsonl.gz", b"", r": holds no rows$"),
    ("a.json", b"", r": holds no rows$"),
    ("a.json", b" \n", r": holds no rows$"),
    ("a.json", b"[]", r": holds no rows$"),
    ("a.json", b'[\n{"question": "1"},\n{"question" "2"}]', r":3: not JSON \(Expecting ':' delimiter\)"),
    ("a.json", b"[1]", r"\[0\]: a row must be an object"),
    ("a.json", b"7", r": must hold a list of objects like"),
    ("a.json", b"[" * 100_000, r": not JSON that can be read"),
    ("a.json", b"[" + HUGE + b"]", r": not JSON that can be read"),
    ("a.json", GOOD + b"{\n", r":2: not JSON"),
    ("a.csv", b"", r": holds no rows$"),
    ("a.csv", b"question,answer\n", r": holds no rows$"),
    ("a.csv", b'question,answer\n1,2\n"3,4\n', r":3: not CSV \(unexpected end of data\)"),
    ("a.csv", b'question,answer\n"1"x,2\n', r":2: not CSV \("),
    ("a.csv", b"question,answer\n1,2,3\n", r":2: has more cells than the header has names"),
    ("a.csv", b"question,answer,answer\n1,2,3\n", r": two columns are called `answer`$"),
    ("a.csv", b"\xff\xfeq", r": not text in UTF-8"),
    ("a.parquet", b"", r": not parquet \("),
    ("a.parquet", GOOD, r": not parquet \("),
    ("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", r": not parquet \("),
]


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_names_the_file_and_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    said = message_of(path)
    assert re.match(re.escape(str(path)) + message, said), said


def test_parquet_that_is_cut_short_is_refused_at_every_length(tmp_path: Path) -> None:
    write_parquet(tmp_path / "whole.parquet", NESTED)
    data = (tmp_path / "whole.parquet").read_bytes()
    for cut in range(0, len(data), 97):
        (tmp_path / "a.parquet").write_bytes(data[:cut])
        assert message_of(tmp_path / "a.parquet").startswith(f"{tmp_path / 'a.parquet'}: ")


def test_parquet_without_rows_holds_none(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert message_of(tmp_path / "a.parquet").endswith(": holds no rows")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read all: a link to itself is what it may not
        path.unlink()
        path.symlink_to(path)
    assert str(path) in message_of(path)


def test_a_name_that_no_file_can_have_is_one_line(tmp_path: Path) -> None:
    for name in ("x" * 300 + ".jsonl", "x\0.jsonl", "x\n.jsonl"):
        assert message_of(tmp_path / name).startswith(str(tmp_path))


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert "no such file" in message_of(tmp_path / "a.jsonl")  # and it is not waited for


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("a.jsonl", True),
        ("a/b.PARQUET", True),
        ("a.json.gz", True),
        ("owner/name", False),
        ("owner/v1.5", False),
        ("a.gz", False),
    ],
)
def test_data_files_are_told_by_their_names(name: str, known: bool) -> None:
    assert has_known_suffix(Path(name)) is known


# --- generated problems ----------------------------------------------------------------------------------


def test_generated_problems_are_rows_and_always_the_same() -> None:
    rows = read_rows("reasoning_gym:chain_sum:7")
    assert rows == read_rows("reasoning_gym:chain_sum:7")
    assert [where for where, _ in rows] == [f"reasoning_gym:chain_sum:7[{i}]" for i in range(7)]
    for _, row in rows:
        assert set(row) == {"question", "answer"}
        sum_ = re.search(r"[\d+ -]*\d [+-] [\d+ -]*\d", row["question"])
        assert sum_
        assert sum(int(x) for x in re.findall(r"[+-]?\d+", sum_[0].replace(" ", ""))) == int(row["answer"])
    hundred = values("reasoning_gym:chain_sum")
    assert len(hundred) == 100
    assert hundred[:7] == [row for _, row in rows]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("reasoning_gym:no_such_task", "no task of reasoning-gym"),
        ("reasoning_gym:", "no task of reasoning-gym"),
        ("reasoning_gym:chain_sum:many", "reasoning_gym:TASK:NUMBER"),
        ("reasoning_gym:chain_sum:0", "reasoning_gym:TASK:NUMBER"),
        ("reasoning_gym:chain_sum:-3", "reasoning_gym:TASK:NUMBER"),
        ("reasoning_gym:chain_sum:7:8", "reasoning_gym:TASK:NUMBER"),
        ("reasoning_gym:chain_sum:10000000", "reasoning_gym:TASK:NUMBER"),
    ],
)
def test_a_task_that_cannot_be_generated_is_named(source: str, words: str) -> None:
    message = message_of(source)
    assert message.startswith(f"{source}: ")
    assert words in message
