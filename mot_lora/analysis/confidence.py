"""The confidence of students in the tokens of traces, and how much of its branches' gains a merge keeps."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mot_lora.durable import DamagedError, read_record
from mot_lora.records import Record
from mot_lora.runs.rundir import RunDir

CONSENSUS = "consensus.json"

THRESHOLD = 0.1  # nats by which log p must rise to count as a gain
Kind = Literal["none", "one", "several", "all"]
KINDS: tuple[Kind, ...] = ("none", "one", "several", "all")
Outcome = Literal["yes", "in part", "no", "unclear"]


class Estimate(Record):
    """A mean or a ratio, and half the width of its 95 % interval; None with too few questions."""

    value: float
    half: float | None = None

    @property
    def low(self) -> float:
        return -math.inf if self.half is None else self.value - self.half

    @property
    def high(self) -> float:
        return math.inf if self.half is None else self.value + self.half


class StudentConfidence(Record):
    """One student on each teacher's held-out traces: mean p and mean log p (nats) of a trained token.

    Round 0 is the base; `branch` is None for a merged student.
    """

    round: int
    branch: str | None = None
    p: dict[str, float]
    log_p: dict[str, float]

    @property
    def mean(self) -> float:
        """The mean p over teachers."""
        return math.fsum(self.p.values()) / len(self.p)


class ClassRecord(Record):
    """The tokens that so many branches gained on, and what became of them; changes are of log p, in nats per token.

    All are against the student that the round began with but `base`, which is the merged student's against W_0.
    `p_start` is that student's mean p; `gain` the mean of the branches that gained, `mean` of all branches; `kept` is
    merged / gain.
    """

    kind: Kind
    tokens: int
    share: float
    p_start: float
    gain: float | None
    mean: float
    merged: Estimate
    base: float
    kept: Estimate | None


class ConsensusRound(Record):
    """The consensus of one round's branches; `difference`: `kept` of all branches' gains minus that of single ones."""

    round: int
    classes: tuple[ClassRecord, ...]
    difference: Estimate | None

    def of(self, kind: Kind) -> ClassRecord | None:
        return next((c for c in self.classes if c.kind == kind), None)

    @property
    def outcome(self) -> Outcome:
        """Whether gains of all branches are kept and gains of a single one fade (arXiv 2509.08814).

        `no` if gains of all branches are lost, or the share kept of single ones is as large; `in part` if single gains
        shrink but remain; `unclear` if the intervals do not decide.
        """
        agreed, lone, difference = self.of("all"), self.of("one"), self.difference
        if agreed is None or lone is None or difference is None:
            return "unclear"
        if agreed.merged.high <= 0 or difference.high <= 0:
            return "no"
        if agreed.merged.low <= 0 or difference.low <= 0:
            return "unclear"
        return "in part" if lone.merged.low > 0 else "yes"


class TokenRecord(Record):
    """A token of a trace: its text and, if it is trained, its class, log p at the round's start, and the changes."""

    text: str
    kind: Kind | None = None
    start: float = 0.0
    branches: tuple[float, ...] = ()
    merged: float = 0.0


class ExampleRecord(Record):
    """The tokens of one held-out trace of a teacher; the last `more` are left out."""

    teacher: str
    prompt: str
    tokens: tuple[TokenRecord, ...]
    more: int = 0


class LossLine(Record):
    """Held-out losses (nats per token, mean over teachers) at points of a line through the weights."""

    name: str
    at: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """The largest rise of the loss above the straight line between its ends; negative if it stays below.

        >>> LossLine(name="", at=(0, 0.5, 1), losses=(1, 1.75, 2)).barrier
        0.25
        """
        (first, *_, last), (begin, *_, end) = self.at, self.losses
        chord = [begin + (end - begin) * (x - first) / (last - first) for x in self.at]
        return max(y - c for y, c in list(zip(self.losses, chord, strict=True))[1:-1])


class LandscapeRecord(Record):
    """The loss around a round: between every two branches (0 to 1), and around the merged student, along the round's
    update D and along random directions, by distance in units of |D| (-1 along D is the round's start).
    """

    between: tuple[LossLine, ...]
    update: LossLine
    random: tuple[LossLine, ...]


class ConsensusRecord(Record):
    """The token-level analysis of a run's branches and students, on at most `traces` held-out traces a teacher.

    `basis` identifies the rounds it was measured on: the sha256 of each round's record.
    """

    basis: tuple[str, ...]
    traces: int
    questions: int
    threshold: float = THRESHOLD
    branches: tuple[str, ...]
    confidence: tuple[StudentConfidence, ...]
    rounds: tuple[ConsensusRound, ...]
    examples: tuple[ExampleRecord, ...]
    landscape: LandscapeRecord


def classes_of(gains: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """The class of each token, as an index into KINDS, from the branches' gains [k, n] in nats.

    >>> classes_of(torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])).tolist()
    [0, 1, 2, 3]
    """
    count = (gains > threshold).sum(0)
    return torch.where(count == len(gains), KINDS.index("all"), count.clamp(max=KINDS.index("several")))


def consensus_of(
    number: int,
    start: Tensor,
    branches: Tensor,
    merged: Tensor,
    base: Tensor,
    questions: Tensor,
    threshold: float = THRESHOLD,
) -> ConsensusRound:
    """Group a round's tokens by how many branches gained on them, and measure the merged student on each group.

    start, merged, base: log p of each of n tokens by the student at the start of the round, the merged student and the
    base, each [n]; branches: by the k branches, [k, n]; questions: [n] int64, the question of a token's trace. Tokens
    of one question are not independent, so intervals come from the spread between questions.

    >>> zero, up = torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 0.0])
    >>> c = consensus_of(1, zero, torch.stack([up, up]), up / 2, zero, torch.arange(4)).of("all")
    >>> c.share, c.gain, c.merged.value, c.kept.value
    (0.5, 1.0, 0.5, 0.5)
    """
    start, branches, merged, base = (x.double() for x in (start, branches, merged, base))
    gains, change = branches - start, merged - start
    gained = gains > threshold
    kinds = classes_of(gains, threshold)
    # the mean over the branches that gained
    gain = (gains * gained).sum(0) / gained.sum(0).clamp(min=1)
    classes: list[ClassRecord] = []
    kept: dict[Kind, _Ratio] = {}
    for kind in reversed(KINDS):
        at = kinds == KINDS.index(kind)
        tokens = int(at.sum())
        if not tokens:
            continue
        if kind != "none":
            kept[kind] = _Ratio.of(change[at], gain[at], questions[at])
        classes.append(
            ClassRecord(
                kind=kind,
                tokens=tokens,
                share=tokens / len(start),
                p_start=float(start[at].exp().mean()),
                gain=float(gain[at].mean()) if kind in kept else None,
                mean=float(gains[:, at].mean()),
                merged=_Ratio.of(change[at], torch.ones_like(change[at]), questions[at]).estimate,
                base=float((merged - base)[at].mean()),
                kept=kept[kind].estimate if kind in kept else None,
            )
        )
    difference = kept["all"].less(kept["one"]) if {"all", "one"} <= kept.keys() else None
    return ConsensusRound(round=number, classes=tuple(classes), difference=difference)


class _Ratio:
    """A ratio of sums, and each question's contribution to its error (the linearized, cluster-robust variance)."""

    def __init__(self, value: float, errors: dict[int, float]) -> None:
        self.value = value
        self.errors = errors

    @classmethod
    def of(cls, over: Tensor, under: Tensor, questions: Tensor) -> "_Ratio":
        value = float(over.sum() / under.sum())
        residuals = (over - value * under) / under.sum()
        return cls(value, {q: float(residuals[questions == q].sum()) for q in sorted(set(map(int, questions)))})

    @property
    def estimate(self) -> Estimate:
        return Estimate(value=self.value, half=_half_width(list(self.errors.values())))

    def less(self, other: "_Ratio") -> Estimate:
        both = {*self.errors, *other.errors}
        errors = [self.errors.get(q, 0.0) - other.errors.get(q, 0.0) for q in both]
        few = min(len(self.errors), len(other.errors)) < FEWEST
        return Estimate(value=self.value - other.value, half=None if few else _half_width(errors))


FEWEST = 3  # questions needed for an interval


def _half_width(errors: Sequence[float]) -> float | None:
    n = len(errors)
    if n < FEWEST:
        return None
    return _student_t(n - 1) * math.sqrt(n / (n - 1) * math.fsum(e * e for e in errors))


def _student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5); 3 % too small for 2 degrees of freedom."""
    z, n = 1.959964, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + math.fsum(term / n**i for i, term in enumerate(terms, 1))


def read_consensus(rundir: RunDir) -> ConsensusRecord | None:
    """The saved consensus of a run; None if there is none or the file is damaged, so that it is computed again."""
    try:
        return read_record(rundir.path / CONSENSUS, ConsensusRecord)
    except DamagedError:
        return None
