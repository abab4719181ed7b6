"""The rows of a data source: JSONL, JSON, CSV, parquet, a saved dataset, one of the Hub, or a generated one.

datasets wants one type per column and gives up a file at the first row with another; it reads what it has saved itself,
and the Hub.
"""

import csv
import gzip
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from mot_lora.data.column_names import MESSAGES
from mot_lora.errors import RowError, UserError
from mot_lora.reader import GYM

Row = tuple[str, dict[str, Any]]
"""Where a row stands (file and line), and its values by column."""


def read_rows(
    source: str | Path, split: str | None = None, subset: str | None = None, bad: list[RowError] | None = None
) -> list[Row]:
    """All rows of a file, a folder or a Hub dataset; a file's format is known by its name.

    Files: .jsonl and .json (lines or a list of objects, both), .csv, .tsv, each also with .gz, and .parquet. A folder
    is one of `save_to_disk`, or of data files. `split` and `subset` choose within a dataset; the split is `train`
    unless given.
    `reasoning_gym:TASK` or `reasoning_gym:TASK:50` are generated problems, a hundred by default, always the same.

    Errors: UserError, which names the file, and the line where there is one. Lines that are not rows go into `bad`
    instead, where that is given and the file has rows.

    >>> read_rows("owner/name", split="train[:100]")  # doctest: +SKIP
    """
    if str(source).startswith(GYM):
        if split or subset:
            raise UserError(f"{source}: has no `split` or `subset`; leave them out")
        return _read_gym(str(source))
    path = Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as e:
        raise UserError(f"{source}: cannot be read ({e.strerror}); {HINT}") from e
    if is_file:
        if split or subset:
            raise UserError(f"{source}: a file has no `split` or `subset`; leave them out")
        found = list(_read_file(path))
        rows, spoiled = [r for r in found if isinstance(r, tuple)], [r for r in found if isinstance(r, RowError)]
        if spoiled and (bad is None or not rows):
            raise spoiled[0]
        if bad is not None:
            bad += spoiled
    elif is_folder or not (path.is_absolute() or has_known_suffix(path)):
        rows = _read_dataset(str(source), split, subset)
    else:
        raise UserError(f"{source}: no such file; {HINT}")
    if not rows:
        raise UserError(f"{source}: holds no rows")
    return rows


def source_name(source: str, subset: str | None = None, split: str | None = None) -> str:
    """A source of rows, as the fingerprints of a run name it.

    >>> source_name("owner/name", split="train")
    'owner/name train'
    """
    return " ".join(x for x in (source, subset, split) if x)


def has_known_suffix(path: Path) -> bool:
    """Whether a path is named as a data file is.

    >>> has_known_suffix(Path("traces.jsonl.gz")), has_known_suffix(Path("owner/name"))
    (True, False)
    """
    return _suffix(path) in READERS


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_file(path: Path) -> Iterator[Row | RowError]:
    if not has_known_suffix(path):
        raise UserError(f"{path}: not named as a data file is; {HINT}")
    try:
        yield from READERS[_suffix(path)](path)
    except (OSError, EOFError, zlib.error) as e:
        reason = "not gzip" if isinstance(e, gzip.BadGzipFile) else getattr(e, "strerror", None) or e
        raise UserError(f"{path}: cannot be read ({reason}); {HINT}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not text in UTF-8; {HINT}") from e


def _text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode("utf-8-sig")


def _jsonl(path: Path) -> Iterator[Row | RowError]:
    text = _text(path)
    return (_json if LIST.match(text) else _lines)(path, text)


def _lines(path: Path, text: str) -> Iterator[Row | RowError]:
    # "\n" alone ends a row: str.splitlines would also cut at signs that JSON allows within a text
    *lines, last = text.split("\n")
    for number, line in enumerate((*lines, last), 1):
        if line.strip():
            yield _line(line, f"{path}:{number}", cut=number > len(lines) > 0)


def _line(text: str, where: str, cut: bool) -> Row | RowError:
    """One line of a file, which may be cut: without an end."""
    try:
        return _object(json.loads(text), where)
    except json.JSONDecodeError as e:
        message = f"not JSON ({e.msg} at character {e.colno})"
        if cut and (e.pos >= len(text.rstrip()) or e.msg.startswith("Unterminated")):
            raise UserError(f"{where}: {message}; the file ends within this row: was it cut short?") from e
    except (ValueError, RecursionError) as e:
        message = f"not JSON that can be read ({e})"
    return RowError(where, message, "not JSON")


def _json(path: Path, text: str) -> Iterator[Row | RowError]:
    try:
        whole: Any = json.loads(text)
    except json.JSONDecodeError as e:
        if e.msg == "Extra data":  # many a .json holds lines
            yield from _lines(path, text)
            return
        where = f"{path}:{e.lineno}" if text.strip() else str(path)
        raise UserError(f"{where}: {f'not JSON ({e.msg})' if text.strip() else 'holds no rows'}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON that can be read ({e})") from e
    if isinstance(whole, dict):
        ((name, inner), *others) = [*cast("dict[str, Any]", whole).items()] or [("", None)]
        whole = cast("list[Any]", inner) if isinstance(inner, list) and not others and name not in MESSAGES else [whole]
    if not isinstance(whole, list):
        raise UserError(f"{path}: must hold a list of objects like {EXAMPLE}")
    for number, value in enumerate(cast("list[Any]", whole)):
        yield _object(value, f"{path}[{number}]")


def _object(value: Any, where: str) -> Row | RowError:
    if isinstance(value, dict):
        return where, cast("dict[str, Any]", value)
    return RowError(where, f"a row must be an object like {EXAMPLE}", "not an object")


def _csv(path: Path) -> Iterator[Row | RowError]:
    csv.field_size_limit(2**31 - 1)  # a trace is longer than the 128 KiB that a cell may hold by default
    dialect = "excel-tab" if _suffix(path) == ".tsv" else "excel"
    # only what the format calls a line's end: str.splitlines would also cut at signs that a cell may hold
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), dialect=dialect, strict=True)
    try:
        names = reader.fieldnames or ()
        if twice := next((name for name in names if list(names).count(name) > 1), None):
            raise UserError(f"{path}: two columns are called `{twice}`")
        for values in reader:
            where = f"{path}:{reader.line_num}"
            if None in values:
                yield RowError(where, "has more cells than the header has names", "with too many cells")
            else:
                yield where, {key: value or None for key, value in values.items()}
    except csv.Error as e:
        raise UserError(f"{path}:{reader.reader.line_num}: not CSV ({e})") from e


def _parquet(path: Path) -> Iterator[Row]:
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    try:
        values = parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{path}: not parquet ({_first_line(e)})") from e
    return ((f"{path}[{i}]", row) for i, row in enumerate(values))


def _read_dataset(name: str, split: str | None, subset: str | None) -> list[Row]:
    datasets = import_module("datasets")
    try:
        if any((Path(name) / f).exists() for f in ("state.json", "dataset_dict.json")):
            found: Any = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, subset, split=split)
            split = None if split else split
        if isinstance(found, dict):
            found = cast("dict[str, Any]", found)
            chosen = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
            if chosen not in found:
                raise UserError(f"{name}: name one of its splits in `split`: {', '.join(map(str, found))}")
            found = found[chosen]
        elif split:
            raise UserError(f"{name}: holds a single split; leave `split` out")
        rows: Iterable[dict[str, Any]] = found
        return [(f"{name}[{i}]", dict(row)) for i, row in enumerate(rows)]
    except UserError:
        raise
    except Exception as e:  # what the library raises for a folder, a name or a network is of a dozen kinds
        raise UserError(
            f"{name}: neither a data folder nor a dataset that can be downloaded from the Hub ({_first_line(e)})"
        ) from e


def _read_gym(source: str) -> list[Row]:
    if not importlib.util.find_spec("reasoning_gym"):
        raise UserError(f"{source}: needs reasoning-gym: pip install 'mot-lora[eval]'")
    task, _, size = source.removeprefix(GYM).partition(":")
    if size and not (size.isdecimal() and 0 < int(size) < 10**6):
        raise UserError(f"{source}: write reasoning_gym:TASK, or reasoning_gym:TASK:NUMBER for that many problems")
    # some tasks follow the order of sets, or draw from `random` itself: in a process of their own they stay the same
    command = [sys.executable, "-P", "-c", GYM_PROCESS, task, size or str(GYM_SIZE)]
    made = subprocess.run(
        command,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if made.returncode:
        what = next(iter(made.stderr.strip().splitlines()[-1:]), "it ended without a word").partition(": ")
        raise UserError(f"{source}: no task of reasoning-gym ({what[2] or what[0]})")
    problems: list[tuple[str, Any]] = json.loads(made.stdout.splitlines()[-1])
    if all(answer is None for _, answer in problems):
        raise UserError(f"{source}: its problems have no right answer to compare with; take another task")
    return [(f"{source}[{i}]", {"question": q, "answer": a}) for i, (q, a) in enumerate(problems)]


def _first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


READERS: dict[str, Callable[[Path], Iterator[Row | RowError]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": lambda path: _json(path, _text(path)),
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
GYM_SIZE = 100
GYM_PROCESS = """
import json, random, sys
import reasoning_gym
random.seed(0)
problems = reasoning_gym.create_dataset(sys.argv[1], size=int(sys.argv[2]), seed=0)
found = [(p["question"], None if p["answer"] is None else str(p["answer"])) for p in problems]
print()
print(json.dumps(found))
"""
LIST = re.compile(r"\s*\[\s*\{")  # some .jsonl hold one list
EXAMPLE = '{"question": ..., "reasoning": ..., "answer": ...}'
HINT = "give a .jsonl, .json, .csv, .tsv (each also .gz) or .parquet file, a saved dataset's folder, or a Hub name"
