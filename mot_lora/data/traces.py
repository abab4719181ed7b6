"""Teachers' traces and evaluation questions, from the rows of a data source, whatever their columns are called."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mot_lora.data.cells import as_list, as_object, is_empty, kind
from mot_lora.data.choices import Choices
from mot_lora.data.column_names import GOLD, MESSAGES, QUESTION, RESPONSE, RIGHT, WRITTEN
from mot_lora.data.columns import NO_QUESTION, NO_RESPONSE, NO_RIGHT, Cell, RowReader
from mot_lora.data.conversation import CALLING, ORDER, Message, text_of
from mot_lora.data.generations import WRONG, generations, verdict
from mot_lora.data.gold import right_answers
from mot_lora.data.reasoning import calls_tool, think
from mot_lora.errors import RowError

IGNORE = -100  # the label of a token that no loss is taken of


@dataclass(frozen=True)
class Trace:
    """One worked problem: the conversation up to the answer, the answer with its chain of thought, and the right
    answer where the row has one beside it, with what else is right, and the tools that it offers.
    """

    prompt: tuple[Message, ...]
    completion: str
    gold: str | None = None
    also: tuple[str, ...] = ()
    tools: tuple[Any, ...] = ()

    @property
    def right_answers(self) -> tuple[str, ...]:
        return () if self.gold is None else (self.gold, *self.also)

    @property
    def question(self) -> str:
        """The last thing the user said."""
        return next((m["content"] for m in reversed(self.prompt) if m["role"] == "user"), "")


@dataclass(frozen=True)
class Example:
    """A tokenized trace; labels are IGNORE where there is no loss, else the token itself.

    >>> Example.after((5, 6, 7), prompt_length=2).labels
    (-100, -100, 7)
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @classmethod
    def after(cls, input_ids: tuple[int, ...], prompt_length: int) -> "Example":
        """Trained on everything after the prompt."""
        return cls(input_ids, (IGNORE,) * prompt_length + input_ids[prompt_length:])

    @property
    def prompt_length(self) -> int:
        """How many tokens stand before the first trained one."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels))

    def __len__(self) -> int:
        return len(self.input_ids)


def batches(lengths: Sequence[int], most: int | None, tokens: int | None) -> Iterator[list[int]]:
    """Indices by length, in batches of at most `most` and of at most `tokens` with padding; long ones alone.

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
    """A problem to answer and the right answer, with what else is right and what is said before the problem."""

    question: str
    answer: str
    also: tuple[str, ...] = ()
    before: tuple[Message, ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        return (*self.before, {"role": "user", "content": self.question})

    @property
    def right_answers(self) -> tuple[str, ...]:
        return (self.answer, *self.also)


def read_trace(row: Mapping[str, Any], where: str, columns: Mapping[Any, str] | None = None) -> Trace | Example:
    r"""One row as a trace: `messages`, `conversations`, a question with its answer, or token ids with their labels.

    The completion is "<think>\n{reasoning}\n</think>\n\n{answer}"; a chain that the answer already has is left as it
    is, and without one the answer stands alone. Options and context are part of the question. `columns` names columns,
    or with dots what their cells hold, by what they mean: messages, question, reasoning, answer (the teacher's), gold
    (the right one), choices, context, system, tools, input_ids, labels.

    Errors: RowError, which begins with `where`.

    >>> read_trace({"problem": "1 + 1?", "thinking": "1 + 1 = 2", "solution": "2"}, "row 1").completion
    '<think>\n1 + 1 = 2\n</think>\n\n2'
    """
    reader = RowReader(row, where, columns or {})
    if "input_ids" in reader.columns or (reader.find("input_ids", ("input_ids",)) and not {*reader.columns} & {*TEXTS}):
        return _example(reader)
    reader.refuse_more_than_text()
    if messages := reader.find("messages", MESSAGES):
        choices = reader.choices()
        *prompt, last = reader.messages(messages, choices)
        return _trace(reader, tuple(prompt), last["content"], reader.gold(), choices)
    question, written = reader.question(), reader.written()
    if not question:
        raise reader.lacks("question", (*QUESTION, *MESSAGES), ("question", "messages"), NO_QUESTION)
    if not written:
        wanted = ("answer (completion, response, ...)", "messages")
        raise reader.lacks("answer", (*RESPONSE, *WRITTEN), wanted, NO_RESPONSE)
    own = reader.columns.get("answer") or reader.names[written[0]]
    choices = reader.choices(own)
    reasoning = reader.reasoning()
    text, chain = reader.completion(written), _chain(reader, reasoning) if reasoning else ""
    if choices and isinstance(written[1], int) and (place := choices.place(written[1], where)) is not None:
        text = choices.labels[place]
    return _trace(reader, reader.prompt(question, choices), think(chain, text), reader.gold(own), choices)


def read_traces(
    row: Mapping[str, Any], where: str, columns: Mapping[Any, str] | None = None
) -> list[tuple[str, Trace | Example | str | RowError]]:
    """A row's traces, one for each generation that it lists, and where each stands; or why one is not to be used.

    A reason is a text where the row itself says that a generation is wrong or never ends, as open-r1's and KTO's do.

    >>> row = {"problem": "1 + 1?", "generations": ["2", "3"], "correctness_math_verify": [True, False]}
    >>> [found if isinstance(found, str) else found.completion for _, found in read_traces(row, "row 1")]
    ['2', 'marked as wrong']
    """
    columns = columns or {}
    reader = RowReader(row, where, columns)
    undesired = WRONG if reader.is_undesired() else ""
    try:
        several = generations(reader)
    except RowError as e:
        return [(where, e)]
    rows = [(where, row)]
    if several:
        columns, rows = {**columns, "answer": several[0]}, several[1]
    found: list[tuple[str, Trace | Example | str | RowError]] = []
    for place, one in rows:
        try:
            found.append((place, (verdict(one) if several else undesired) or read_trace(one, place, columns)))
        except RowError as e:
            found.append((place, e))
    return found


def settled(rows: Sequence[Mapping[str, Any]], columns: Mapping[Any, str]) -> Mapping[Any, str]:
    """What columns mean in all rows of a source: where some have a right answer beside a response, a row in which the
    response is empty has no answer, and the right one is not the teacher's.

    >>> settled([{"response": "so 2", "answer": "2"}, {"response": None, "answer": "4"}], {})
    {'answer': 'response'}
    """
    if columns.keys() & {"answer", "messages", "input_ids"}:
        return columns
    names: set[str] = set()
    beside = False
    for row in rows:
        reader = RowReader(row, "", columns)
        if reader.first("messages", MESSAGES):
            return columns
        own = [n for n in RESPONSE if n in reader.filled]
        names.update(reader.names[n] for n in own)
        beside = beside or bool(own and reader.first("gold", WRITTEN))
    return {**columns, "answer": names.pop()} if beside and len(names) == 1 else columns


def read_question(row: Mapping[str, Any], where: str, columns: Mapping[Any, str] | None = None) -> Question:
    """One row as an evaluation question with the right answer; columns as in `read_trace`.

    Errors: RowError, which begins with `where`.

    >>> read_question({"problem": "1 + 1?", "solution": "One more than one. #### 2"}, "row 1").answer
    '2'
    """
    reader = RowReader(row, where, columns or {})
    reader.refuse_more_than_text()
    question = reader.question() or reader.find("messages", MESSAGES)
    if not question:
        raise reader.lacks("question", (*QUESTION, *MESSAGES), ("question",), NO_QUESTION)
    if "answer" in reader.columns and "gold" not in reader.columns:
        named = {("gold" if role == "answer" else role): column for role, column in reader.columns.items()}
        reader = RowReader(row, where, named)
    choices = reader.choices()
    if choices and choices.right is None:
        raise reader.error("nothing says which of its options is right", NO_RIGHT)
    gold = reader.gold() or reader.find("answer", RESPONSE)
    answers = choices.answers if choices else right_answers(gold[1]) if gold else ()
    if not (right := tuple(dict.fromkeys(answers))):
        if gold and not is_empty(gold[1]):
            said = "has nothing after ####" if "####" in str(gold[1]) else f"holds no right answer: {kind(gold[1])}"
            raise reader.error(f"`{gold[0]}` {said}", NO_RIGHT)
        raise reader.lacks("gold", (*GOLD, *RIGHT), ("answer (solution, gold, ...)",), NO_RIGHT)
    prompt = reader.prompt(question, choices)
    *before, asked = prompt
    if any(m["role"] != "system" for m in before):
        asks = sum(m["role"] == "user" for m in prompt)
        raise reader.error(f"`{question[0]}` must ask one thing, not hold {asks} turns of a user", ORDER)
    return Question(asked["content"], right[0], right[1:], tuple(before))


TEXTS = ("messages", "question")  # who names one of these in `columns` wants no token ids


def _trace(
    reader: RowReader, prompt: tuple[Message, ...], completion: str, right: Cell | None, choices: Choices | None
) -> Trace:
    if calls_tool(completion):
        raise reader.error("calls a tool within its answer; a trace must be in the teacher's own words", CALLING)
    if right and right[0] == "solution" and str(right[1]).strip() == completion.strip():
        right = None  # the teacher's own text once more is nothing to judge it by
    answers = choices.answers if choices and choices.right is not None else right_answers(right[1]) if right else ()
    every = tuple(dict.fromkeys(answers))
    return Trace(prompt, completion, every[0] if every else None, every[1:], reader.tools())


def _chain(reader: RowReader, cell: Cell) -> str:
    """A chain, also in parts as APIs have it."""
    parts = [] if isinstance(cell[1], str) else as_list(cell[1]) or []
    return text_of(parts) if parts and as_object(parts[0]) else reader.text(cell)


def _example(reader: RowReader) -> Example:
    ids, labels = reader.integers("input_ids"), reader.integers("labels")
    if len(ids) != len(labels) or any(y not in (x, IGNORE) for x, y in zip(ids, labels, strict=False)):
        raise reader.error(f"`labels` must be as long as `input_ids`, and equal to it or {IGNORE}", "with other labels")
    if all(y == IGNORE for y in labels[1:]):
        raise reader.error(f"no token of `labels` is trained: all are {IGNORE}", "without a trained token")
    return Example(ids, labels)
