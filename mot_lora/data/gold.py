"""Right answers, as people's cells hold them."""

from collections.abc import Iterator
from typing import Any

from mot_lora.data.cells import (
    as_list,
    as_object,
    as_text,
)
from mot_lora.data.column_names import (
    NO_ANSWER,
)


def right_answers(value: Any) -> Iterator[str]:
    """What is right to answer, each text of it, from a text, a number, true or false, or lists and objects of them.

    >>> list(right_answers("6 * 7 = 42\\n#### 42")), list(right_answers({"value": "NYC", "aliases": ["New York"]}))
    (['42'], ['NYC', 'New York'])
    """
    if isinstance(value, bool):
        yield from ("true", "yes") if value else ("false", "no")
    elif (listed := as_list(value)) and (not isinstance(value, str) or all(isinstance(v, str) for v in listed)):
        for one in listed:  # but a text like [1, 2] is itself an answer
            yield from right_answers(one)
    elif (inner := as_object(value)) and not isinstance(value, str):
        for key in ("value", "text", "answer", "ground_truth", "spans", "aliases"):
            yield from right_answers(inner.get(key))
    elif (text := as_text(value)) and (right := final_part(text)) and right.lower() not in NO_ANSWER:
        yield right


def final_part(answer: str) -> str:
    """What stands after ####, with which GSM8K and its like set off the right answer; else all of it."""
    before, mark, after = answer.rpartition("####")
    return (after.strip().partition("\n")[0] if mark else before or after).strip()
