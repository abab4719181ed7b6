"""What is known of a branch, a round and an evaluation: frozen records that go to disk as JSON."""

import math
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from mot_lora.patterns import PerModule

ENOUGH = 0.9  # the share of an update below which one is told that it did not survive rounding


class Record(BaseModel):
    """The base of every record: frozen, strict about its keys."""

    # as null, what is not finite could not be read again
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class EvaluationRecord(Record):
    """How a student did: accuracy (avg@n) with its 95 % interval, and the held-out loss on each teacher's traces.

    `loss` is the mean over teachers, in nats a trained token; `forgetting` the accuracy on each set to watch. What was
    not measured is None. `at_once` has how many answers and traces were at work together in the end, where memory ran
    out with as many as asked. `files` are the sha256 of what lies beside the record, where it is one of its own.
    """

    questions: int = 0
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    losses: dict[str, float] = {}
    forgetting: dict[str, float] = {}
    at_once: dict[str, int] = {}
    seconds: float = 0.0
    files: dict[str, str] = {}

    @property
    def loss(self) -> float | None:
        return sum(self.losses.values()) / len(self.losses) if self.losses else None

    @property
    def accuracy_text(self) -> str:
        """`42.0 % (37.3 to 46.9)`, or a dash."""
        if self.accuracy is None or self.interval is None:
            return "-"
        return f"{self.accuracy * 100:.1f} % ({self.interval[0] * 100:.1f} to {self.interval[1] * 100:.1f})"

    @property
    def loss_text(self) -> str:
        """The held-out loss with three decimals, or a dash."""
        return "-" if self.loss is None else f"{self.loss:.3f}"


class Answer(Record):
    """What the student answered to one question: the texts of its samples, and the share of them that is right.

    `answer` is the right one, and `also` what else is.
    """

    question: str
    answer: str
    also: tuple[str, ...] = ()
    texts: tuple[str, ...]
    score: float


class DeviceRecord(Record):
    """What was computed on, `cpu` or `cuda` with its name, and in which format of numbers."""

    kind: str
    name: str
    dtype: str

    @property
    def text(self) -> str:
        """`NVIDIA GeForce RTX 4090 in bfloat16`."""
        return f"{self.name} in {self.dtype}"


class TrainRecord(Record):
    """What training a branch took: optimizer steps, trained tokens, mean loss in nats a token, seconds.

    `losses` has each step's, where the trainer says them.
    """

    steps: int
    tokens: int
    loss: float
    seconds: float = 0.0
    losses: tuple[float, ...] = ()


class BranchRecord(Record):
    """One teacher's branch of one round; `files` are the sha256 of what lies beside the record."""

    round: int
    teacher: str
    learning_rate: float
    train: TrainRecord
    device: DeviceRecord | None = None
    evaluation: EvaluationRecord | None = None
    files: dict[str, str] = {}


class SealRecord(Record):
    """A state within a branch, whole: the sha256 of its files, its learning rate and that one's schedule; tokens and
    seconds that it took.
    """

    files: dict[str, str]
    learning_rate: float
    schedule: int = 1
    tokens: int
    seconds: float


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
    left_out: dict[str, int] = {}
    bad: dict[str, str] = {}
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
    left_out: dict[str, int] = {}
    bad: dict[str, str] = {}
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


class FoldRecord(Record):
    """How a round's merge went into the weights, overall, for a layer or a module."""

    relative_norm: float
    survived: float | None
    sign_conflict: float
    cosine: tuple[tuple[float, ...], ...]
    opposition: tuple[tuple[float, ...], ...]


class AdapterRecord(Record):
    """One adapter: its base, as it says, how many updates of which form it holds, their ranks, |D| and |D| / |W|."""

    name: str
    base: str | None
    parameters: int
    forms: dict[str, int]
    ranks: tuple[int, ...]
    norm: float
    relative_norm: float | None


class LayerRecord(Record):
    """Several adapters in one layer: each one's |D| and |D| / |W|, their cosines, and where their signs conflict."""

    norms: tuple[float, ...]
    relative_norms: tuple[float, ...] | None
    cosine: tuple[tuple[float, ...], ...]
    sign_conflict: float


class InspectRecord(Record):
    """What is known of adapters before they are merged; `lost` is the share of their mean that a rank-r copy loses."""

    adapters: tuple[AdapterRecord, ...]
    overall: LayerRecord
    layers: dict[str, LayerRecord]
    lost: dict[int, float]


class SaveRecord(Record):
    """What became of a merge as an adapter: its ranks, and the share |lost| / |D| that they cost, in all and by module.

    `method` is None for one adapter alone; `rank` is the largest of `ranks`. `uniform`: all modules are written with
    it, so that readers that know one rank and one alpha (vLLM, llama.cpp) scale them as PEFT does.
    """

    method: str | None
    rank: int
    ranks: dict[str, int]
    uniform: bool = True
    lost: float
    modules: dict[str, float]


class KeptRecord(Record):
    """The share of an update D that is in what was written, <change, D> / |D|^2: in all, and of the worst layer.

    None where the update is 0.
    """

    survived: float | None = None
    worst: tuple[str, float] | None = None

    @classmethod
    def of(cls, sums: Mapping[str, tuple[float, float]]) -> Self:
        """From each layer's <change, D> and |D|^2."""
        kept, square = (math.fsum(pair[i] for pair in sums.values()) for i in (0, 1))
        shares = {layer: k / s for layer, (k, s) in sums.items() if s}
        worst = min(shares, key=lambda layer: shares[layer], default=None)
        return cls(survived=kept / square if square else None, worst=(worst, shares[worst]) if worst else None)

    @property
    def faded(self) -> bool:
        """Whether too much of the update is gone, in all or in a layer."""
        shares = [self.survived, self.worst and self.worst[1]]
        return any(share is not None and share < ENOUGH for share in shares)

    @property
    def text(self) -> str:
        """`0.9312 of the update survived, 0.8841 in model.layers.3`."""
        if self.survived is None or self.worst is None:
            return "the update is 0"
        return f"{self.survived:.4f} of the update survived, {self.worst[1]:.4f} in {self.worst[0]}"


class ExportRecord(KeptRecord):
    """A round that was exported: as a full `checkpoint` in this dtype, or as one `lora` adapter of this rank.

    `worst` is a layer of a checkpoint, a module of an adapter.
    """

    round: int
    form: Literal["checkpoint", "lora"]
    dtype: str
    rank: int | None = None


class VerifiedTensor(Record):
    """One written tensor against W_0 + D: |D|, <change, D> / |D|^2, and its largest error in units of rounding.

    A unit is half a step of the tensor's format at that entry, what rounding once can cost; `survived` is None for an
    update of 0.
    """

    update_norm: float
    survived: float | None
    error: float


class VerifyRecord(Record):
    """What reading a folded checkpoint back found: every updated tensor, and how many others are the base's own.

    `loaded`: whether transformers could be asked, and finds all of its model; it has not the class of a model with code
    of its own.
    """

    tensors: dict[str, VerifiedTensor]
    untouched: int
    loaded: bool

    @property
    def error(self) -> float:
        """The largest error of all tensors, in units of rounding."""
        return max((t.error for t in self.tensors.values()), default=0.0)


class RoundRecord(Record):
    """One finished round: whose adapters were merged, how, what the fold kept, and how the student then did.

    `reasons` say of each teacher why it has its weight, where that was found. `files` are the sha256 of what lies
    beside the record.
    """

    round: int
    teachers: tuple[str, ...]
    method: str
    weights: tuple[PerModule, ...]
    reasons: tuple[str, ...] = ()
    density: PerModule | None = None
    scale: PerModule = 1.0
    momentum: float = 0.0
    space: str | None = None
    seed: int
    fold: FoldRecord
    layers: dict[str, FoldRecord]
    modules: dict[str, FoldRecord]
    fold_seconds: float
    device: DeviceRecord | None = None
    evaluation: EvaluationRecord
    files: dict[str, str] = {}


class FinalRecord(Record):
    """How the student of one round did in the end, asked as `eval.final` says; round 0 is the student before.

    `limit` is of the questions; `files` are the sha256 of what lies beside the record.
    """

    round: int
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    limit: int | None
    evaluation: EvaluationRecord
    files: dict[str, str] = {}

    @property
    def label(self) -> str:
        """`final: round 3, avg@16`."""
        who = f"round {self.round}" if self.round else "the student before"
        return f"final: {who}, avg@{self.samples}"


class RunRecord(Record):
    """A whole run: the student before, every branch and round, which round is best, why it stopped, and how the student
    then did, where `eval.final` asks for that.
    """

    before: EvaluationRecord
    branches: tuple[BranchRecord, ...] = ()
    rounds: tuple[RoundRecord, ...] = ()
    metric: str
    best: int
    stopped: str
    final: FinalRecord | None = None

    @property
    def evaluations(self) -> tuple[EvaluationRecord, ...]:
        """All that was measured."""
        parts = (*self.branches, *self.rounds, *([self.final] if self.final else []))
        return (self.before, *(part.evaluation for part in parts if part.evaluation))


class StateRecord(Record):
    """Where a run stands: rounds done and planned; within the round at hand its finished branches, the one that was
    begun with the steps that it can go on from, who works on it now, and the round that eval.final still asks.
    """

    rounds_done: int
    rounds: int
    branches: tuple[str, ...]
    begun: dict[str, int]
    at_work: str | None
    stopped: str
    final: int | None = None

    @property
    def line(self) -> str:
        """The state in one line."""
        at_work = f"at work ({self.at_work})" if self.at_work else "not at work"
        if self.stopped and self.final is not None:
            return f"{at_work}: {self.stopped}, eval.final is left to do"
        if self.stopped:
            return f"finished: {self.stopped}"
        parts = [f"round {self.rounds_done} of {self.rounds} is done" if self.rounds_done else "no round is done yet"]
        if self.branches:
            parts.append(f"of round {self.rounds_done + 1} {', '.join(self.branches)}")
        parts += [f"{name} can go on from step {step}" for name, step in self.begun.items()]
        return f"{at_work}: {', '.join(parts)}"


def score(evaluation: EvaluationRecord, metric: str) -> float:
    """The metric as a number that is higher for a better student; -inf where it was not measured.

    >>> score(EvaluationRecord(accuracy=0.5), "accuracy")
    0.5
    """
    value = evaluation.accuracy if metric == "accuracy" else evaluation.loss
    if value is None:
        return -math.inf
    return value if metric == "accuracy" else -value
