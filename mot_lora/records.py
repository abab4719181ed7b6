"""What is known of a branch, a round and an evaluation: frozen records that go to disk as JSON."""

import math
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from mot_lora.config import PerModule


class Record(BaseModel):
    """The base of every record: frozen, strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EvaluationRecord(Record):
    """How a student did: accuracy (avg@n) with its 95 % interval, and the held-out loss on each teacher's traces.

    `loss` is the mean over teachers, in nats a trained token. What was not measured is None.
    """

    questions: int = 0
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    losses: dict[str, float] = {}
    seconds: float = 0.0

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
    """What the student answered to one question: the texts of its samples, and the share of them that is right."""

    question: str
    answer: str
    texts: tuple[str, ...]
    score: float


class TrainRecord(Record):
    """What training a branch took: optimizer steps, trained tokens, mean loss in nats a token, seconds."""

    steps: int
    tokens: int
    loss: float
    seconds: float = 0.0


class BranchRecord(Record):
    """One teacher's branch of one round."""

    round: int
    teacher: str
    train: TrainRecord
    evaluation: EvaluationRecord | None = None


class Tally(Record):
    """Sums over entries that say how an update relates to its base, its fold and its branches; tallies add up.

    base_sq: |W|^2; update_sq: |D|^2; kept: <change, D>, change being what the fold did to the weights in use;
    gram: <D_i, D_j> of the branches; conflicts: entries on which the signs of branches differ.
    """

    entries: int
    base_sq: float
    update_sq: float
    kept: float
    conflicts: int
    gram: tuple[tuple[float, ...], ...]

    @property
    def relative_norm(self) -> float:
        """|D| / |W|."""
        return math.sqrt(self.update_sq / self.base_sq) if self.base_sq else math.inf

    @property
    def survived(self) -> float | None:
        """<change, D> / |D|^2: the share of the update that is in the weights after rounding; None for no update."""
        return self.kept / self.update_sq if self.update_sq else None

    @property
    def sign_conflict(self) -> float:
        """Share of entries on which the branches disagree about the sign."""
        return self.conflicts / self.entries

    @property
    def cosine(self) -> tuple[tuple[float, ...], ...]:
        """Cosine between every two branches' updates."""
        norms = [math.sqrt(max(row[i], 0.0)) for i, row in enumerate(self.gram)]
        return tuple(
            tuple(g / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0 for j, g in enumerate(row))
            for i, row in enumerate(self.gram)
        )


def add_tallies(tallies: Iterable[Tally]) -> Tally:
    """The tally of several modules together. Errors: ValueError for none."""
    rows = list(tallies)
    if not rows:
        raise ValueError("no tallies to add")
    n = range(len(rows[0].gram))
    return Tally(
        entries=sum(t.entries for t in rows),
        base_sq=math.fsum(t.base_sq for t in rows),
        update_sq=math.fsum(t.update_sq for t in rows),
        kept=math.fsum(t.kept for t in rows),
        conflicts=sum(t.conflicts for t in rows),
        gram=tuple(tuple(math.fsum(t.gram[i][j] for t in rows) for j in n) for i in n),
    )


class FoldRecord(Record):
    """How a round's merge went into the weights, overall or for one layer: the readable form of a Tally."""

    relative_norm: float
    survived: float | None
    sign_conflict: float
    cosine: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, tally: Tally) -> "FoldRecord":
        return cls(
            relative_norm=tally.relative_norm,
            survived=tally.survived,
            sign_conflict=tally.sign_conflict,
            cosine=tally.cosine,
        )


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

    @classmethod
    def of(cls, tally: Tally) -> "LayerRecord":
        norms = tuple(math.sqrt(max(row[i], 0.0)) for i, row in enumerate(tally.gram))
        size = math.sqrt(tally.base_sq)
        return cls(
            norms=norms,
            relative_norms=tuple(n / size for n in norms) if size else None,
            cosine=tally.cosine,
            sign_conflict=tally.sign_conflict,
        )


class InspectRecord(Record):
    """What is known of adapters before they are merged; `lost` is the share of their mean that a rank-r copy loses."""

    adapters: tuple[AdapterRecord, ...]
    overall: LayerRecord
    layers: dict[str, LayerRecord]
    lost: dict[int, float]


class SaveRecord(Record):
    """What became of a merge as an adapter: its ranks, and the share |lost| / |D| that they cost, in all and by module.

    `method` is None for one adapter alone; `rank` is the largest of `ranks`.
    """

    method: str | None
    rank: int
    ranks: dict[str, int]
    lost: float
    modules: dict[str, float]


class VerifiedTensor(Record):
    """One written tensor against W_0 + D: |D|, <change, D> / |D|^2, and its largest error in units of rounding.

    A unit is half a step of the tensor's format at that entry, what rounding once can cost; `survived` is None for an
    update of 0.
    """

    update_norm: float
    survived: float | None
    error: float


class VerifyRecord(Record):
    """What reading a folded checkpoint back found: every updated tensor, and how many others are the base's own."""

    tensors: dict[str, VerifiedTensor]
    untouched: int

    @property
    def error(self) -> float:
        """The largest error of all tensors, in units of rounding."""
        return max((t.error for t in self.tensors.values()), default=0.0)


class RoundRecord(Record):
    """One finished round: whose adapters were merged, how, what the fold kept, and how the student then did."""

    round: int
    teachers: tuple[str, ...]
    method: str
    weights: tuple[PerModule, ...]
    density: PerModule | None = None
    scale: PerModule = 1.0
    space: str | None = None
    seed: int
    fold: FoldRecord
    layers: dict[str, FoldRecord]
    fold_seconds: float
    evaluation: EvaluationRecord


class RunRecord(Record):
    """A whole run: the student before, every branch and round, which round is best, and why it stopped."""

    before: EvaluationRecord
    branches: tuple[BranchRecord, ...] = ()
    rounds: tuple[RoundRecord, ...] = ()
    metric: str
    best: int
    stopped: str


def score(evaluation: EvaluationRecord, metric: str) -> float:
    """The metric as a number that is higher for a better student; -inf where it was not measured.

    >>> score(EvaluationRecord(accuracy=0.5), "accuracy")
    0.5
    """
    value = evaluation.accuracy if metric == "accuracy" else evaluation.loss
    if value is None:
        return -math.inf
    return value if metric == "accuracy" else -value
