"""Records of branches, rounds, evaluations, data and adapters: frozen, and saved as JSON."""

import math

from pydantic import BaseModel, ConfigDict

from mot_lora.patterns import PerModule


class Record(BaseModel):
    """The base of every record: frozen, strict about its keys."""

    # as null, what is not finite could not be read again
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class EvaluationRecord(Record):
    """An evaluation of a student: accuracy (avg@n) with its 95 % interval, and the held-out loss by teacher.

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
    """The student's answers to one question: the texts of its samples, and the share of them that is right.

    `answer` is the right one, and `also` what else is.
    """

    question: str
    answer: str
    also: tuple[str, ...] = ()
    texts: tuple[str, ...]
    score: float


class DeviceRecord(Record):
    """The device of a computation, `cpu` or `cuda` with its name, and the dtype."""

    kind: str
    name: str
    dtype: str

    @property
    def text(self) -> str:
        """`NVIDIA GeForce RTX 4090 in bfloat16`."""
        return f"{self.name} in {self.dtype}"


class TrainRecord(Record):
    """The training of a branch: optimizer steps, trained tokens, mean loss in nats per token, seconds.

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
    """The fold of a round's merge into the weights: overall, of a layer or of a module."""

    relative_norm: float
    survived: float | None
    sign_conflict: float
    cosine: tuple[tuple[float, ...], ...]
    opposition: tuple[tuple[float, ...], ...]


class RoundRecord(Record):
    """One finished round: the teachers merged, the merge's settings, what the fold kept, and the student's evaluation.

    `reasons` explain each teacher's weight if it was searched for. `files` are the sha256 of the files beside the
    record.
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
    """The final evaluation of one round's student, as set in `eval.final`; round 0 is the student before.

    `limit` is the number of questions; `files` are the sha256 of the files beside the record.
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
    """A whole run: the evaluation before it, every branch and round, the best round, why it stopped, and the final
    evaluation, if `eval.final` is set.
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
        """All evaluations of the run."""
        parts = (*self.branches, *self.rounds, *([self.final] if self.final else []))
        return (self.before, *(part.evaluation for part in parts if part.evaluation))


def score(evaluation: EvaluationRecord, metric: str) -> float:
    """The metric as a number that is higher for a better student; -inf if it was not measured.

    >>> score(EvaluationRecord(accuracy=0.5), "accuracy")
    0.5
    """
    value = evaluation.accuracy if metric == "accuracy" else evaluation.loss
    if value is None:
        return -math.inf
    return value if metric == "accuracy" else -value
