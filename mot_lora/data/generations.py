"""The generations that one row lists: each as a row of its own, and what the row says of it."""

from collections.abc import Mapping
from typing import Any

from mot_lora.data.cells import as_list, at, first_filled
from mot_lora.data.column_names import COMPLETE, CORRECT, MESSAGES, NUMBERED, REASONING, RESPONSE
from mot_lora.data.columns import RowReader
from mot_lora.data.conversation import is_conversation

WRONG = "marked as wrong"
ENDLESS = "reasoning never ends"


def generations(reader: RowReader) -> tuple[str, list[tuple[str, Mapping[str, Any]]]] | None:
    """The column of the answer, and the row once for each of the generations that it lists, with what the row lists
    of each of them; None for a row of one.
    """
    named = "answer" in reader.columns
    if not named and first_filled(reader.filled, MESSAGES) is not None:
        return None
    numbered = {reader.names[n]: v for n, v in reader.filled.items() if NUMBERED.fullmatch(n)}
    if numbered and not named:
        rest = {k: v for k, v in reader.row.items() if k not in numbered}
        return "generation", [(f"{reader.where}, {k}", {**rest, "generation": v}) for k, v in numbered.items()]
    cell = reader.find("answer", RESPONSE)
    # a text that looks like a list is one answer, but in a column of several
    texts = as_list(cell[1]) if cell and (not isinstance(cell[1], str) or cell[0].lower().endswith("s")) else None
    if cell is None or not texts or is_conversation(texts):
        return None
    name = cell[0] if named else reader.names[cell[0]]
    of_each = [reader.names[n] for n in (*REASONING, *CORRECT, *COMPLETE) if n in reader.names]
    also = {k: as_list(at(reader.row, k)) or [] for k in (*of_each, reader.columns.get("reasoning", name))}
    listed = {**{k: values for k, values in also.items() if len(values) == len(texts)}, name: texts}
    rows = [{**reader.row, **{k: values[i] for k, values in listed.items()}} for i in range(len(texts))]
    places = [f"{reader.where}, generation {i + 1}" for i in range(len(texts))] if len(texts) > 1 else [reader.where]
    return name, [*zip(places, rows, strict=True)]


def verdict(row: Mapping[str, Any]) -> str:
    """Why a generation is not to be used, by what its row says of it; empty where that is nothing."""
    said = {str(name).strip().lower(): value for name, value in row.items() if isinstance(value, bool)}
    if not all(said.get(n, True) for n in COMPLETE):
        return ENDLESS
    verdicts = [said[n] for n in CORRECT if n in said]
    return WRONG if verdicts and not any(verdicts) else ""
