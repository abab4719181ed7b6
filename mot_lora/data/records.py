"""What is known of data: what became of rows, and how the student's turn is written."""

from pydantic import Field

from mot_lora.records import Record


class Segment(Record):
    """A piece of a tokenized trace as text, and whether the loss is on it."""

    text: str
    trained: bool


class TurnRecord(Record):
    """What the student's chat template writes around its words: `head` before them, `end` after, and where they stop.

    chain: what it writes around a chain of thought, where that is not <think>; listed: whether the tokenizer or the
    checkpoint names the turn's end as an end of generation; date: the day that the template writes, if any.
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
        """What there is to say of it, a line each."""
        said = [f"the student's words stand between {self.head!r} and {self.end!r}, as its chat template has them"]
        if self.chain:
            said.append("its chain of thought stands between {!r} and {!r}".format(*self.chain))
        if not self.listed:
            said.append(
                f"neither its tokenizer nor its checkpoint says that {self.stops[0]} ends an answer: it does here, and "
                "in what is exported, and must be named as a stop wherever else the student is served"
            )
        if self.date:
            said.append(
                f"its chat template writes the date: it is told {self.date} on every day, so that a run goes on alike"
            )
        return said


class TeacherDataRecord(Record):
    """What became of one teacher's rows.

    `used` are trained on, `held_out` only measured, `left_out` has the count for each reason, and `bad` the first row
    that could not be used for it; `without_reasoning` of the used traces go straight to the answer, `marked` of them
    held marks of a chat template, which were taken off. Tokens are of the used traces; `sample` is one, decoded.
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
    """What a run reads: each teacher's traces, how many questions the student is asked, and how its turn is written.

    Questions that could not be used are counted by reason in `left_out`, and `bad` has the first of each.
    """

    teachers: tuple[TeacherDataRecord, ...]
    questions: int = 0
    left_out: dict[str, int] = Field(default_factory=dict[str, int])
    bad: dict[str, str] = Field(default_factory=dict[str, str])
    turn: TurnRecord | None = None

    @property
    def remarks(self) -> list[str]:
        """What there is to say of the template, of traces that held its marks, of rows that could not be used, and of
        teachers who never reason.
        """
        marked = [(t.marked, t.teacher) for t in self.teachers if t.marked]
        bad = [(t.teacher, t.left_out[why], why, first) for t in self.teachers for why, first in t.bad.items()]
        bad += [("questions", self.left_out[why], why, first) for why, first in self.bad.items()]
        silent = [t.teacher for t in self.teachers if t.used and t.without_reasoning == t.used]
        return [
            *(self.turn.lines if self.turn else []),
            *(f"{n:,} traces of {who} held marks of a chat template: they were taken off" for n, who in marked),
            *(f"{who}: {n:,} left out {why}; the first: {first}" for who, n, why, first in bad),
            *(f"{who}: no trace has a chain of thought in marks that are known: all are answer only" for who in silent),
        ]
