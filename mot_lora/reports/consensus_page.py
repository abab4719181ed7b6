"""The part of a run's page about its consensus: confidence, what branches agree on, by layer, and the loss around."""

from collections.abc import Sequence
from html import escape

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
from mot_lora.records import DataRecord, RoundRecord, RunRecord
from mot_lora.reports import consensus_charts as draw
from mot_lora.reports.charts import svg
from mot_lora.reports.html import details, figure, grid, note, section, standing_open, table

LEADS = {
    "yes": "The claim holds here.",
    "in part": "The claim holds here in part: lone gains shrink, but stay.",
    "no": "The claim does not hold here.",
    "unclear": "These traces do not tell whether the claim holds here.",
}


def consensus_sections(record: RunRecord, data: DataRecord | None, found: ConsensusRecord | None) -> str:
    """The sections, as HTML; none for a run of one round or one teacher.

    >>> from mot_lora.records import EvaluationRecord
    >>> consensus_sections(RunRecord(before=EvaluationRecord(), metric="loss", best=0, stopped=""), None, None)
    ''
    """
    rounds = [r for r in record.rounds if len(r.teachers) > 1]
    if len(rounds) < 2:
        return ""
    out = _by_layer([r for r in rounds if r.layers])
    if found is None:
        if data and data.teachers and not any(t.held_out for t in data.teachers):
            out += section(
                "Consensus", note("No traces were held out (eval.holdout), so there are none to look at it on.")
            )
        return out
    older = ""
    if len(found.basis) < len(record.rounds):
        older = note(f"Looked at after round {len(found.basis)}; mot-lora report looks again.")
    return (
        out
        + section("Confidence", older + _confidence(found))
        + section("Consensus", older + _consensus(found))
        + section("The loss around the last round", older + _landscape(found))
    )


def _by_layer(rounds: Sequence[RoundRecord]) -> str:
    if len(rounds) < 2:
        return ""
    first, last = rounds[0], rounds[-1]
    out = ""
    for what in ("cosine", "sign conflict"):
        ends = [(r.round, draw.mean_agreement(r.fold, what)) for r in (first, last)]
        said = " and ".join(f"{value:.2f} in round {n}" for n, value in ends if value is not None)
        label = f"{'Mean cosine' if what == 'cosine' else 'Sign conflict'} by layer and round; over all layers {said}."
        out += figure(svg(draw.agreement_by_layer(rounds, what), f"{what.replace(' ', '-')}-layers", label), label)
    return section(
        "Agreement by layer and round",
        grid(out)
        + note(
            "The mean cosine of every two branches' updates, and the share of entries on which any two of them differ "
            f"in sign, for each layer: {1 - 0.5 ** (len(last.teachers) - 1):.2f} is what chance gives. Layers where "
            "branches agree are where a merge keeps most of what each learned."
        ),
    )


# --- confidence --------------------------------------------------------------------------------------------


def _confidence(found: ConsensusRecord) -> str:
    teachers = list(found.confidence[0].p)
    rows = [
        (
            "branch" if c.branch else "merged",
            _student(c),
            [f"{c.mean:.3f}", *(f"{c.p[t]:.3f} ({c.log_p[t]:z.2f})" for t in teachers)],
        )
        for c in found.confidence
    ]
    merged = [c for c in found.confidence if c.branch is None]
    path = ", ".join(f"{_student(c)} {c.mean:.3f}" for c in merged)
    apart = ", ".join(f"{t} from {merged[0].p[t]:.3f} to {merged[-1].p[t]:.3f}" for t in teachers)
    return (
        grid(
            figure(
                svg(draw.confidence_of_students(found), "confidence", f"Mean p of a token: {path}."),
                "Mean probability of the traces' own tokens, over all teachers' traces. Each mark is a branch.",
            )
            + figure(
                svg(draw.confidence_by_traces(found), "confidence-traces", f"Mean p of a token, by traces: {apart}."),
                "The merged student on each teacher's traces. Lines that rise together are a student that learns from "
                "all of them; one that falls is a teacher whose way it leaves.",
            )
        )
        + table(("student", "mean p", *(f"traces of {t}" for t in teachers)), rows, "Confidence")
        + note(
            f"How sure each student is of the trained tokens of at most {found.traces} held-out traces of each "
            "teacher: mean p(token), and in brackets mean log p in nats. Bold rows are the base and the merged student."
        )
    )


def _student(c: StudentConfidence) -> str:
    if c.branch:
        return f"{c.branch} alone, round {c.round}"
    return f"after round {c.round}" if c.round else "base"


# --- consensus ---------------------------------------------------------------------------------------------


def _consensus(found: ConsensusRecord) -> str:
    count = len(found.branches)
    out = note(
        f"A branch gains on a token where its log p of it rises by more than {found.threshold:g} nats over the student "
        "that the round began with. The claim of the paper (arXiv 2509.08814): what the teachers agree on is "
        "reinforced, what is one teacher's habit washes out. It would be false if agreed gains were lost, or if lone "
        "ones were kept just as well."
    )
    for r in found.rounds:
        rows = [("", _class(c.kind, count), _cells(c)) for c in r.classes]
        out += f"<h3>Round {r.round}</h3>" + table(COLUMNS, rows, f"Consensus of round {r.round}")
        out += f"<p>{escape(finding(r))}</p>\n"
    out += note(
        "Changes are of log p in nats a token, against the student that the round began with. Gain: of the branches "
        "that gained. Branches: the mean of all of them, what averaging log p would give. Merged: of the merged "
        "student, with its 95\N{NO-BREAK SPACE}% interval. Kept: merged / gain. Intervals are from the spread between "
        f"the {found.questions} questions; p before is the mean p at the round's start."
    )
    shown = "".join(_example(e, found) for e in found.examples)
    last = found.rounds[-1].round
    key = ", ".join(
        f'<span class="k-{kind}">{escape(_class(kind, count))}</span>'
        for kind in reversed(KINDS)
        if kind != "several" or count > 2
    )
    return (
        out + f"<h3>Tokens of round {last}</h3><p>Gained on by {key}. Point at a token for its numbers.</p>\n" + shown
    )


COLUMNS = ("gained on by", "tokens", "share", "p before", "gain", "branches", "merged", "kept", "from base")
NAMES: dict[Kind, str] = {"several": "several branches", "one": "one branch alone", "none": "no branch"}


def _class(kind: Kind, branches: int) -> str:
    return f"all {branches} branches" if kind == "all" else NAMES[kind]


def _cells(c: ClassRecord) -> list[str]:
    return [
        f"{c.tokens:,}",
        f"{c.share:.1%}",
        f"{c.p_start:.2f}",
        "" if c.gain is None else f"{c.gain:+z.2f}",
        f"{c.mean:+z.2f}",
        f"{c.merged.value:+z.3f}{_interval(c.merged, 1, 'z.3f')}",
        "" if c.kept is None else f"{c.kept.value:z.0%}{_interval(c.kept, 100, 'z.0f')}",
        f"{c.base:+z.3f}",
    ]


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
        moved = (
            f"On what {what} gained on, the merged student {_moved(c)}." if c else f"No token was gained on by {what}."
        )
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
    e, size = c.merged, f"{abs(c.merged.value):.3f} nats a token"
    if e.low > 0 or e.high < 0:
        return f"{'gained' if e.value > 0 else 'lost'} {size}"
    why = "on too few questions to tell" if e.half is None else "which can be chance"
    return f"moved by {e.value:+z.3f} nats a token, {why}"


def _example(e: ExampleRecord, found: ConsensusRecord) -> str:
    tokens = "".join(_token(t, found.branches) for t in e.tokens)
    more = note(f"{e.more:,} more tokens follow.") if e.more else ""
    return (
        f"<h3>A held-out trace of {escape(e.teacher)}</h3>"
        + details("Before it", standing_open(e.prompt, "Prompt"))
        + f'<div class="card"><div class="text tokens" dir="auto">{tokens}</div></div>\n{more}'
    )


def _token(t: TokenRecord, branches: Sequence[str]) -> str:
    if t.kind is None or not t.text:
        return escape(t.text)
    each = ", ".join(f"{name} {change:+z.2f}" for name, change in zip(branches, t.branches, strict=True))
    title = f"log p {t.start:z.2f} before; {each}; merged {t.merged:+z.2f}"
    return f'<span class="k-{t.kind}" title="{escape(title)}">{escape(t.text)}</span>'


# --- the loss around ---------------------------------------------------------------------------------------


def _landscape(found: ConsensusRecord) -> str:
    around = found.landscape
    return grid(
        figure(
            svg(draw.loss_between(around), "loss-between", f"Held-out loss between branches: {_between(around)}"),
            f"The mean held-out loss on the lines between branches. {_between(around)}",
        )
        + figure(
            svg(draw.loss_around(around), "loss-around", f"Held-out loss around the student: {_around(around)}"),
            f"The mean held-out loss around the merged student. {_around(around)}",
        )
    ) + note(
        f"On the same traces, at most {found.traces} a teacher. Every point is folded and rounded as the merged "
        "student is. Random directions are of low rank and in each module as large as the round's update D. A line "
        "that bulges far up has a barrier: the branches went to different valleys, and their mean lies on the ridge."
    )


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
