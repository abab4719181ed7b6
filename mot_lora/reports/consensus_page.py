"""The part of a run's page about its consensus: confidence, what branches agree on, by layer, and the loss around."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mot_lora.analysis.confidence import (
    KINDS,
    ClassRecord,
    ConsensusRecord,
    ConsensusRound,
    Estimate,
    ExampleRecord,
    Kind,
    LandscapeRecord,
    StudentConfidence,
    TokenRecord,
)
from mot_lora.data.records import DataRecord
from mot_lora.records import RoundRecord, RunRecord
from mot_lora.reports import consensus_charts as draw
from mot_lora.reports.figures import svg
from mot_lora.reports.grid import Grid, Row
from mot_lora.reports.html import Figure
from mot_lora.reports.passages import Passage, passage

LEADS = {
    "yes": "The claim holds here.",
    "in part": "The claim holds here in part: lone gains shrink, but stay.",
    "no": "The claim does not hold here.",
    "unclear": "These traces do not tell whether the claim holds here.",
}
CLASSES = ("gained on by", "tokens", "share", "p before", "gain", "branches", "merged", "kept", "from base")
NAMES: Mapping[Kind, str] = {"several": "several branches", "one": "one branch alone", "none": "no branch"}


@dataclass(frozen=True)
class RoundPart:
    """One round's classes of tokens, and what they say of the paper's claim."""

    number: int
    classes: Grid
    finding: str


@dataclass(frozen=True)
class Token:
    """A token of a trace; one that is trained on has a kind, and its numbers in words."""

    text: str
    kind: Kind | None = None
    numbers: str = ""


@dataclass(frozen=True)
class Example:
    """A held-out trace, token by token, and how many tokens more it has."""

    teacher: str
    prompt: Passage
    tokens: Sequence[Token]
    more: str


@dataclass(frozen=True)
class Found:
    """What a look with the student has found; `older` says so where the run has gone on since."""

    older: str
    traces: int
    questions: int
    threshold: str
    confidence_figures: Sequence[Figure]
    confidence: Grid
    rounds: Sequence[RoundPart]
    key: Mapping[Kind, str]
    examples: Sequence[Example]
    landscape: Sequence[Figure]


@dataclass(frozen=True)
class ConsensusPart:
    """What the page says of a run's consensus: by layer, with the conflict of signs that chance gives, and what was
    found with the student; `no_traces` where there were none to look at.
    """

    by_layer: Sequence[Figure] = ()
    chance: str = ""
    no_traces: bool = False
    found: Found | None = None


def consensus_part(record: RunRecord, data: DataRecord | None, found: ConsensusRecord | None) -> ConsensusPart:
    """What the page says of it; nothing for a run of one round or one teacher.

    >>> from mot_lora.records import EvaluationRecord
    >>> consensus_part(RunRecord(before=EvaluationRecord(), metric="loss", best=0, stopped=""), None, None).by_layer
    ()
    """
    rounds = [r for r in record.rounds if len(r.teachers) > 1]
    if len(rounds) < 2:
        return ConsensusPart()
    traces = [t.held_out for t in data.teachers] if data else []
    return ConsensusPart(
        by_layer=_by_layer([r for r in rounds if r.layers]),
        chance=f"{1 - 0.5 ** (len(rounds[-1].teachers) - 1):.2f}",
        no_traces=found is None and bool(traces) and not any(traces),
        found=_found(found, len(record.rounds)) if found else None,
    )


def _by_layer(rounds: Sequence[RoundRecord]) -> list[Figure]:
    if len(rounds) < 2:
        return []
    first, last = rounds[0], rounds[-1]
    out: list[Figure] = []
    for what in ("cosine", "sign conflict"):
        ends = [(r.round, draw.mean_agreement(r.fold, what)) for r in (first, last)]
        said = " and ".join(f"{value:.2f} in round {n}" for n, value in ends if value is not None)
        label = f"{'Mean cosine' if what == 'cosine' else 'Sign conflict'} by layer and round; over all layers {said}."
        drawn = svg(draw.agreement_by_layer(rounds, what), f"{what.replace(' ', '-')}-layers", label)
        out.append(Figure(drawn, label))
    return out


def _found(found: ConsensusRecord, rounds: int) -> Found:
    looked, count = len(found.basis), len(found.branches)
    return Found(
        older=f"Measured after round {looked}; run mot-lora report to measure it again." if looked < rounds else "",
        traces=found.traces,
        questions=found.questions,
        threshold=f"{found.threshold:g}",
        confidence_figures=_confidence_figures(found),
        confidence=_confidence(found),
        rounds=[RoundPart(r.round, _classes(r, count), finding(r)) for r in found.rounds],
        key={kind: _class(kind, count) for kind in reversed(KINDS) if kind != "several" or count > 2},
        examples=[_example(e, found.branches) for e in found.examples],
        landscape=_landscape(found.landscape),
    )


def _confidence_figures(found: ConsensusRecord) -> list[Figure]:
    merged = [c for c in found.confidence if c.branch is None]
    path = ", ".join(f"{_student(c)} {c.mean:.3f}" for c in merged)
    apart = ", ".join(f"{t} from {merged[0].p[t]:.3f} to {merged[-1].p[t]:.3f}" for t in found.confidence[0].p)
    return [
        Figure(
            svg(draw.confidence_of_students(found), "confidence", f"Mean p of a token: {path}."),
            "Mean probability of the traces' own tokens, over all teachers' traces. Each mark is a branch.",
        ),
        Figure(
            svg(draw.confidence_by_traces(found), "confidence-traces", f"Mean p of a token, by traces: {apart}."),
            "The merged student on each teacher's traces. Where all lines rise, the student learns from all of "
            "them; a line that falls is a teacher that it moves away from.",
        ),
    ]


def _confidence(found: ConsensusRecord) -> Grid:
    teachers = list(found.confidence[0].p)
    rows = (
        Row(
            _student(c),
            (f"{c.mean:.3f}", *(f"{c.p[t]:.3f} ({c.log_p[t]:z.2f})" for t in teachers)),
            "branch" if c.branch else "merged",
        )
        for c in found.confidence
    )
    return Grid("confidence", ("student", "mean p", *(f"traces of {t}" for t in teachers)), tuple(rows))


def _student(c: StudentConfidence) -> str:
    if c.branch:
        return f"{c.branch} alone, round {c.round}"
    return f"after round {c.round}" if c.round else "base"


def _classes(r: ConsensusRound, branches: int) -> Grid:
    rows = (Row(_class(c.kind, branches), _cells(c)) for c in r.classes)
    return Grid(f"consensus of round {r.round}", CLASSES, tuple(rows))


def _class(kind: Kind, branches: int) -> str:
    return f"all {branches} branches" if kind == "all" else NAMES[kind]


def _cells(c: ClassRecord) -> tuple[str, ...]:
    return (
        f"{c.tokens:,}",
        f"{c.share:.1%}",
        f"{c.p_start:.2f}",
        "" if c.gain is None else f"{c.gain:+z.2f}",
        f"{c.mean:+z.2f}",
        f"{c.merged.value:+z.3f}{_interval(c.merged, 1, 'z.3f')}",
        "" if c.kept is None else f"{c.kept.value:z.0%}{_interval(c.kept, 100, 'z.0f')}",
        f"{c.base:+z.3f}",
    )


def _interval(e: Estimate, times: float, form: str) -> str:
    return "" if e.half is None else f" ({e.low * times:{form}} to {e.high * times:{form}})"


def finding(r: ConsensusRound) -> str:
    """What a round says of the paper's claim, in words that follow the numbers.

    >>> finding(ConsensusRound(round=1, classes=(), difference=None))  # doctest: +ELLIPSIS
    'These traces do not tell whether ... No token was gained on by all branches. No token was gained on by one ...'
    """
    agreed, lone, difference = r.of("all"), r.of("one"), r.difference
    said = [LEADS[r.outcome]]
    for what, c in (("all branches", agreed), ("one branch alone", lone)):
        moved = f"Where {what} gained, the merged student {_moved(c)}." if c else f"No token was gained on by {what}."
        said.append(moved)
    if difference and agreed and lone and agreed.kept and lone.kept:
        less = "less than" if difference.low > 0 else "more than" if difference.high < 0 else "not clearly less than"
        if difference.half is None:
            less = "on too few questions to compare it with"
        said.append(
            f"Of lone gains it kept {lone.kept.value:z.0%}, {less} the {agreed.kept.value:z.0%} of agreed ones."
        )
    return " ".join(said)


def _moved(c: ClassRecord) -> str:
    e, size = c.merged, f"{abs(c.merged.value):.3f} nats per token"
    if e.low > 0 or e.high < 0:
        return f"{'gained' if e.value > 0 else 'lost'} {size}"
    why = "on too few questions to tell" if e.half is None else "which may be chance"
    return f"moved by {e.value:+z.3f} nats per token, {why}"


def _example(e: ExampleRecord, branches: Sequence[str]) -> Example:
    more = f"{e.more:,} more tokens follow." if e.more else ""
    return Example(e.teacher, passage(e.prompt, "Prompt"), [_token(t, branches) for t in e.tokens], more)


def _token(t: TokenRecord, branches: Sequence[str]) -> Token:
    if t.kind is None or not t.text:
        return Token(t.text)
    each = ", ".join(f"{name} {change:+z.2f}" for name, change in zip(branches, t.branches, strict=True))
    return Token(t.text, t.kind, f"log p {t.start:z.2f} before; {each}; merged {t.merged:+z.2f}")


def _landscape(around: LandscapeRecord) -> list[Figure]:
    between, nearby = _between(around), _around(around)
    return [
        Figure(
            svg(draw.loss_between(around), "loss-between", f"Held-out loss between branches: {between}"),
            f"The mean held-out loss on the lines between branches. {between}",
        ),
        Figure(
            svg(draw.loss_around(around), "loss-around", f"Held-out loss around the student: {nearby}"),
            f"The mean held-out loss around the merged student. {nearby}",
        ),
    ]


def _between(around: LandscapeRecord) -> str:
    worst = max(around.between, key=lambda line: line.barrier)
    if worst.barrier > 0:
        return f"The highest barrier over the straight line is {worst.barrier:.3f} nats, {worst.name}."
    return f"No line has a barrier; the one nearest to it stays {-worst.barrier:.3f} nats below, {worst.name}."


def _around(around: LandscapeRecord) -> str:
    along = dict(zip(around.update.at, around.update.losses, strict=True))
    best = min(along, key=lambda at: along[at])
    places = {-1.0: "where the round began", 0.0: "at the merged student"}
    where = places.get(best, f"at {best + 1:g} times D")
    steps = [
        y - along[0.0] for line in around.random for at, y in zip(line.at, line.losses, strict=True) if abs(at) == 1
    ]
    rise = sum(steps) / len(steps)
    return (
        f"Along D the loss is lowest {where} ({along[best]:.3f}; merged {along[0.0]:.3f}). A random step as large as D "
        f"{'raises' if rise >= 0 else 'lowers'} it by {abs(rise):.3f} on average; D itself "
        f"{'lowered' if along[0.0] <= along[-1.0] else 'raised'} it by {abs(along[0.0] - along[-1.0]):.3f}."
    )
