"""What a cell of a row holds: nothing, a text, or a list or an object that a table has written as text.

pandas would read a column as one type; here each cell is read for itself.
"""

import ast
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from mot_lora.data.column_names import ABOUT

LONGEST = 60  # characters of a name that a message shows


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: null, NaN, blanks, or a list or an object of such.

    >>> is_empty({"role": None, "content": [" "]}), is_empty(0), is_empty(False)
    (True, False, False)
    """
    if isinstance(value, float):
        return math.isnan(value)  # what tables have where there is no number
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, dict):
        return all(map(is_empty, cast("dict[Any, Any]", value).values()))
    return value is None or (isinstance(value, list) and all(map(is_empty, cast("list[Any]", value))))


def unpacked(value: Any) -> Any:
    """A cell as a list or an object where a table holds one as text, as JSON or as Python writes it; else as it is.

    >>> unpacked('[{"role": "user"}]'), unpacked("['a', None]"), unpacked("[0, 1)")
    ([{'role': 'user'}], ['a', None], '[0, 1)')
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found: Any = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return cast("Any", found) if isinstance(found, list | dict) else value
    return value


def as_list(value: Any) -> list[Any] | None:
    """The list that a cell holds, also as text; None where it holds none."""
    value = unpacked(value)
    return cast("list[Any]", value) if isinstance(value, list) else None


def as_object(value: Any) -> dict[str, Any] | None:
    """The object that a cell holds, also as text; None where it holds none."""
    value = unpacked(value)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def without_nulls(value: Any) -> Any:
    """A value without the keys that a table has filled with nulls, so that all its rows have the same ones.

    >>> without_nulls({"name": "add", "arguments": {"a": 2, "city": None}})
    {'name': 'add', 'arguments': {'a': 2}}
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in cast("dict[Any, Any]", value).items() if v is not None}
    return [without_nulls(v) for v in cast("list[Any]", value)] if isinstance(value, list) else value


def first_filled(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first of these keys that holds something; None where none does."""
    return next((row[k] for k in keys if k in row and not is_empty(row[k])), None)


def as_text(value: Any) -> str | None:
    """A text, a number, true or false as a text, also as a list's only one; None for anything else, and for blanks.

    >>> as_text(42.0), as_text(True), as_text(["x"]), as_text([1, 2])
    ('42', 'true', 'x', None)
    """
    if not isinstance(value, str) and len(one := as_list(value) or ()) == 1:
        value = one[0]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers with a gap in it holds 42.0
    if isinstance(value, int | float):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def is_broken(text: str) -> bool:
    r"""Whether a text holds half a character, which no file can hold.

    >>> is_broken("a\ud800"), is_broken("a")
    (True, False)
    """
    return bool(re.search("[\ud800-\udfff]", text))


def at(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of what its cells hold, by a dotted name; None where there is none.

    >>> at({"reward_model": {"ground_truth": "7"}}, "reward_model.ground_truth"), at({"a.b": 1}, "a.b")
    ('7', 1)
    """
    if name in row:
        return row[name]
    value: Any = dict(row)
    for part in name.split("."):
        listed, inner = as_list(value), as_object(value) or {}
        if listed and part.isdecimal() and int(part) < len(listed):
            value = listed[int(part)]
        elif part in inner:
            value = inner[part]
        else:
            return None
    return value


def has(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a column of this name, which may be empty, or its cells hold something of a dotted one."""
    return name in row or at(row, name) is not None


def first_names(names: Iterable[Any], most: int = 20) -> str:
    """The first of the names that a row has, and how many others: some files are one object of a thousand names.

    >>> first_names(["a", "b", "c"], most=2), first_names([])
    ('a, b and 1 more', 'no columns')
    """
    names = list(names)
    short = (name if len(name) <= LONGEST else name[:LONGEST] + "…" for name in map(str, names[:most]))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(" ".join(name.split()) for name in short) + more or "no columns"


def kind(value: Any) -> str:
    """What a value is, in words.

    >>> kind(None), kind([]), kind(" ")
    ('nothing', 'a list', 'an empty text')
    """
    if isinstance(value, str):
        return "a text" if value.strip() else "an empty text"
    return {"NoneType": "nothing", "list": "a list", "dict": "an object"}.get(
        type(value).__name__, type(value).__name__
    )


def passages(value: Any) -> Iterator[str]:
    """The texts of a context: a text, a list of them, or objects with a title and a text, as retrieval writes them."""
    if listed := as_list(value):
        for one in listed:
            yield from passages(one)
    elif row := as_object(value):
        texts = first_filled(row, ABOUT)
        if titles := as_list(row.get("title")):  # HotpotQA: titles, and sentences of each
            for title, sentences in zip(titles, as_list(texts) or (), strict=False):
                yield "\n".join((str(title), "".join(passages(sentences))))
        else:
            yield "\n".join(filter(None, (as_text(row.get("title")), *passages(texts))))
    elif isinstance(value, str):
        yield value
