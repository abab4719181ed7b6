"""What is known of data: what became of rows, and how the student's turn is written."""

from pydantic import Field

from mot_lora.records import Record


class Segment(Record):
    """A piece of a tokenized trace as text, and whether the loss is on it."""

    text: str
    trained: bool


class TurnRecord(Record):
    """The student's turn in its chat template: `head` before the answer, `end` after it, and the stops of generation.

    chain: the marks of a chain of thought, if they are not <think>; listed: whether the tokenizer or the checkpoint
    lists the turn's end as an end of generation; date: the date that the template writes, if any.
    """

    head: str
    end: str
    stops: tuple[str, ...]
    stop_ids: tuple[int, ...] = ()
    chain: tuple[str, str] | None = None
    listed: bool = True
    date: str | None = None

    @property
    def lines(self) -> list[str]:
        """Notes on the turn, a line each."""
        notes = [f"the student's answer is between {self.head!r} and {self.end!r}, as its chat template has them"]
        if self.chain:
            notes.append("its chain of thought is between {!r} and {!r}".format(*self.chain))
        if not self.listed:
            notes.append(
                f"neither its tokenizer nor its checkpoint lists {self.stops[0]} as the end of an answer: here and in "
                "exports it is, but it must be set as a stop wherever else the student is served"
            )
        if self.date:
            notes.append(
                f"its chat template writes the date: here it is always {self.date}, so that a run resumes unchanged"
            )
        return notes


class TeacherDataRecord(Record):
    """One teacher's rows: how many are used or left out, and why.

    `used` are trained on, `held_out` only measured; `left_out` counts rows by reason, `bad` has the first of each
    reason that makes a row unusable. `without_reasoning` used traces have only an answer; from `marked` ones marks of a
    chat template were removed. Tokens are of the used traces; `sample` is one of them, decoded.
    """

    teacher: str
    sources: tuple[str, ...] = ()
    rows: int = 0
    used: int = 0
    held_out: int = 0
    left_out: dict[str, int] = Field(default_factory=dict[str, int])
    bad: dict[str, str] = Field(default_factory=dict[str, str])
    without_reasoning: int = 0
    marked: int = 0
    median_tokens: int = 0
    longest_tokens: int = 0
    longest_row: str = ""
    tokens: int = 0
    sample: tuple[Segment, ...] = ()


class DataRecord(Record):
    """A run's data: each teacher's traces, the number of questions, and the format of the student's turn.

    `left_out` counts unusable questions by reason, and `bad` has the first of each.
    """

    teachers: tuple[TeacherDataRecord, ...]
    questions: int = 0
    left_out: dict[str, int] = Field(default_factory=dict[str, int])
    bad: dict[str, str] = Field(default_factory=dict[str, str])
    turn: TurnRecord | None = None

    @property
    def remarks(self) -> list[str]:
        """Notes on the template, traces with its marks, unusable rows, and teachers without reasoning."""
        marked = [(t.marked, t.teacher) for t in self.teachers if t.marked]
        bad = [(t.teacher, t.left_out[why], why, first) for t in self.teachers for why, first in t.bad.items()]
        bad += [("questions", self.left_out[why], why, first) for why, first in self.bad.items()]
        silent = [t.teacher for t in self.teachers if t.used and t.without_reasoning == t.used]
        return [
            *(self.turn.lines if self.turn else []),
            *(f"{n:,} traces of {who} had marks of a chat template, which were removed" for n, who in marked),
            *(f"{who}: {n:,} left out {why}; the first: {first}" for who, n, why, first in bad),
            *(f"{who}: no trace has a chain of thought in known marks: all have only an answer" for who in silent),
        ]
