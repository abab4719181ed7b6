"""Teachers' traces and evaluation questions, from the rows of a data source, whatever their columns are called."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mot_lora.columns import GOLD, MESSAGES, QUESTION, REASONING, RESPONSE, RIGHT, WRITTEN, Cell, Cells, Message
from mot_lora.errors import UserError
from mot_lora.loss import IGNORE
from mot_lora.thought import think


@dataclass(frozen=True)
class Trace:
    """One worked problem: the conversation up to the answer, the answer with its chain of thought, and the right
    answer where the row has one beside it.
    """

    prompt: tuple[Message, ...]
    completion: str
    gold: str | None = None

    @property
    def question(self) -> str:
        """The last thing the user said."""
        return self.prompt[-1]["content"]


@dataclass(frozen=True)
class Example:
    """A tokenized trace; labels are IGNORE where no loss is, else the token itself. The last may be trained only.

    >>> Example.after((5, 6, 7), prompt_length=2).labels
    (-100, -100, 7)
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @classmethod
    def after(cls, input_ids: tuple[int, ...], prompt_length: int) -> "Example":
        """Trained on all that stands after the prompt."""
        return cls(input_ids, (IGNORE,) * prompt_length + input_ids[prompt_length:])

    @property
    def prompt_length(self) -> int:
        """How many tokens stand before the first trained one."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels))

    def __len__(self) -> int:
        return len(self.input_ids)


def batches(lengths: Sequence[int], most: int | None, tokens: int | None) -> Iterator[list[int]]:
    """Places by length, in batches of at most so many, and at most so many tokens with padding; long ones alone.

    >>> list(batches([3, 9, 4], most=2, tokens=10))
    [[0, 2], [1]]
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) == most or (tokens is not None and (len(batch) + 1) * lengths[i] > tokens)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass(frozen=True)
class Question:
    """A problem to answer and the right answer."""

    question: str
    answer: str


def read_trace(row: Mapping[str, Any], where: str, columns: Mapping[Any, str] | None = None) -> Trace | Example:
    r"""One row as a trace: `messages`, `conversations`, a question with its answer, or token ids with their labels.

    The completion is "<think>\n{reasoning}\n</think>\n\n{answer}"; a chain that the answer already has is left as it
    is, and without one the answer stands alone. `columns` names columns by what they mean: messages, question,
    reasoning, answer (the teacher's), gold (the right one), system, input_ids, labels.

    Errors: UserError, which begins with `where`.

    >>> read_trace({"problem": "1 + 1?", "thinking": "1 + 1 = 2", "solution": "2"}, "row 1").completion
    '<think>\n1 + 1 = 2\n</think>\n\n2'
    """
    cells = Cells(row, where, columns or {})
    if "input_ids" in cells.columns or (cells.find("input_ids", ("input_ids",)) and not {*cells.columns} & {*TEXTS}):
        return _example(cells)
    gold = cells.find("gold", GOLD)
    if messages := cells.find("messages", MESSAGES):
        turns = cells.messages(messages)
        right = gold or cells.first("gold", RIGHT)
        return _trace(turns[:-1], turns[-1]["content"], right)
    question = cells.find("question", QUESTION)
    answer = cells.find("answer", RESPONSE)
    written = answer or cells.first("answer", WRITTEN)
    if not question or not written:
        raise cells.lacks("answer (completion, response, ...)" if question else "question", "messages")
    right = gold or cells.first("gold", [c for c in RIGHT if c != written[0]] if answer is None else RIGHT)
    prompt = cells.prompt(question)
    reasoning = cells.find("reasoning", REASONING)
    text = cells.completion(written)
    chain = cells.text(reasoning) if reasoning else ""
    return _trace(prompt, think(chain, text), right)


def read_question(row: Mapping[str, Any], where: str, columns: Mapping[Any, str] | None = None) -> Question:
    """One row as a question of an evaluation, with the right answer; columns as in `read_trace`.

    Errors: UserError, which begins with `where`.

    >>> read_question({"problem": "1 + 1?", "solution": "One more than one. #### 2"}, "row 1").answer
    '2'
    """
    cells = Cells(row, where, columns or {})
    question = cells.find("question", QUESTION) or cells.find("messages", MESSAGES)
    if columns and "answer" in columns and "gold" not in columns:
        gold = cells.find("answer", ())
    else:
        gold = cells.find("gold", GOLD) or cells.first("gold", RIGHT) or cells.find("answer", RESPONSE)
    if not question or not gold:
        raise cells.lacks("answer (solution, gold, ...)" if question else "question")
    prompt = [m for m in cells.prompt(question) if m["role"] == "user"]
    if len(prompt) != 1:
        raise UserError(f"{where}: `{question[0]}` must ask one thing, not hold {len(prompt)} turns of a user")
    if not (right := final_part(cells.text(gold))):
        raise UserError(f"{where}: `{gold[0]}` has nothing after ####")
    return Question(prompt[0]["content"], right)


TEXTS = ("messages", "question")  # who names one of these in `columns` wants no token ids


def final_part(answer: str) -> str:
    """What stands after ####, with which GSM8K and its like set off the right answer; else all of it."""
    return answer.rpartition("####")[2].strip()


def _trace(prompt: tuple[Message, ...], completion: str, right: Cell | None) -> Trace:
    if right and right[0] == "solution" and str(right[1]).strip() == completion.strip():
        right = None  # the teacher's own text once more is nothing to judge it by
    return Trace(prompt, completion, _gold(right))


def _gold(cell: Cell | None) -> str | None:
    value = cell[1] if cell else None
    if isinstance(value, list) and len(cast("list[Any]", value)) == 1:
        value = cast("list[Any]", value)[0]
    # what is no text cannot be judged by, and only some runs want it
    return final_part(str(value)) or None if isinstance(value, str | int | float) else None


def _example(cells: Cells) -> Example:
    ids, labels = cells.integers("input_ids"), cells.integers("labels")
    if len(ids) != len(labels) or any(y not in (x, IGNORE) for x, y in zip(ids, labels, strict=False)):
        raise UserError(f"{cells.where}: `labels` must be as long as `input_ids`, and equal to it or {IGNORE}")
    if all(y == IGNORE for y in labels[1:]):
        raise UserError(f"{cells.where}: no token of `labels` is trained: all are {IGNORE}")
    return Example(ids, labels)
