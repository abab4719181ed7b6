"""What is known of a branch, a round and an evaluation: frozen records that go to disk as JSON."""

import math

from pydantic import BaseModel, ConfigDict

from mot_lora.patterns import PerModule


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


class FoldRecord(Record):
    """How a round's merge went into the weights, overall, for a layer or a module."""

    relative_norm: float
    survived: float | None
    sign_conflict: float
    cosine: tuple[tuple[float, ...], ...]
    opposition: tuple[tuple[float, ...], ...]


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


def score(evaluation: EvaluationRecord, metric: str) -> float:
    """The metric as a number that is higher for a better student; -inf where it was not measured.

    >>> score(EvaluationRecord(accuracy=0.5), "accuracy")
    0.5
    """
    value = evaluation.accuracy if metric == "accuracy" else evaluation.loss
    if value is None:
        return -math.inf
    return value if metric == "accuracy" else -value
