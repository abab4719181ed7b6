"""A run as one self-contained page: its scores, how its teachers agree, what the fold kept, answers, data, settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mot_lora.analysis.confidence import ConsensusRecord
from mot_lora.data.records import DataRecord
from mot_lora.records import Answer, EvaluationRecord, RoundRecord, RunRecord
from mot_lora.reports import run_charts as draw
from mot_lora.reports import run_tables
from mot_lora.reports.consensus_page import consensus_part
from mot_lora.reports.figures import svg
from mot_lora.reports.html import Figure, render
from mot_lora.reports.passages import Passage, generated, passage

SHOWN = 2  # answers of each kind


@dataclass(frozen=True)
class Page:
    """Everything that a run's page shows: the run, its data, answers before and of the best round, its settings as
    YAML, what it was done with (versions, device, fingerprints of the inputs), and its consensus, if looked at.
    """

    name: str
    record: RunRecord
    data: DataRecord | None = None
    before: Sequence[Answer] = ()
    after: Sequence[Answer] = ()
    config: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    consensus: ConsensusRecord | None = None


def report(page: Page) -> str:
    """The page, as HTML that asks nothing of the network; the same page gives the same bytes.

    >>> "<svg" in report(Page("demo", RunRecord(before=EvaluationRecord(), metric="loss", best=0, stopped="")))
    False
    """
    record, data = page.record, page.data if page.data and page.data.teachers else None
    questions = _questions(page)
    together = [r for r in record.rounds if len(r.teachers) > 1]
    return render(
        "run.html",
        title=f"{page.name}: Merge of Thought",
        overview=_overview(page),
        results=run_tables.results(record).filled(),
        memory=run_tables.memory_note(record),
        scores=_scores(record),
        losses=_losses(record),
        weights=run_tables.weights(record),
        agreement=[figure for r in together[:1] + together[1:][-1:] for figure in _agreement(r)],
        rounds_between=len(together) > 2,
        consensus=consensus_part(record, page.data, page.consensus),
        layers=_layers(record),
        questions=questions.shown,
        compared=questions.counts,
        data=run_tables.data(data) if data else None,
        remarks=data.remarks if data else (),
        samples=data.teachers if data else (),
        config=page.config,
        versions=run_tables.versions(page.environment),
    )


def _overview(page: Page) -> Mapping[str, str]:
    record = page.record
    best = next((r for r in record.rounds if r.round == record.best), None)
    none = "no round beats the student before training" if record.rounds else "no round is finished"
    final = record.final
    devices = dict.fromkeys(part.device.text for part in (*record.branches, *record.rounds) if part.device)
    return {
        f"Best by {record.metric}": f"round {record.best}" if best else none,
        "Student before training": _score(record.before, record.metric),
        "Student of the best round": _score(best.evaluation, record.metric) if best else "",
        "Final evaluation": f"{final.label.removeprefix('final: ')}: {final.evaluation.accuracy_text}" if final else "",
        "Questions": f"{record.before.questions:,} held out" if record.before.questions else "none asked",
        "Stopped because": record.stopped or "not stopped: rounds are still to come",
        "Device": ", then ".join(devices) or str(page.environment.get("device", "")),
    }


def _score(evaluation: EvaluationRecord, metric: str) -> str:
    return evaluation.accuracy_text if metric == "accuracy" else f"{evaluation.loss_text} nats per token"


def _scores(record: RunRecord) -> list[Figure]:
    out: list[Figure] = []
    metrics: tuple[Literal["accuracy", "loss"], ...] = ("accuracy", "loss")
    for metric in metrics:
        students = [("before", record.before), *((f"round {r.round}", r.evaluation) for r in record.rounds)]
        known = [f"{name} {_score(e, metric)}" for name, e in students if draw.measured(e, metric) is not None]
        if known:
            what, good = ("Accuracy", "Higher") if metric == "accuracy" else ("Held-out loss", "Lower")
            interval = " with its 95\N{NO-BREAK SPACE}% interval" if metric == "accuracy" else ""
            label = f"{what} by round: {', '.join(known)}."
            caption = (
                f"{what}. {good} is better. The line is the merged student{interval}, the marks are each teacher's own "
                "branch. A merge pays off where it beats its branches."
            )
            out.append(Figure(svg(draw.score_by_round(record, metric), metric, label), caption))
    return out


def _losses(record: RunRecord) -> list[Figure]:
    branches = [b for b in record.branches if b.train.losses]
    if not branches:
        return []
    label = "Training loss: " + ", ".join(
        f"{b.teacher} in round {b.round} from {b.train.losses[0]:.2f} to {b.train.losses[-1]:.2f}" for b in branches
    )
    caption = (
        "Loss of each teacher's branch by training step, rounds one after another. A curve that falls and flattens is "
        "good; one that jumps or climbs calls for a lower learning rate. Long curves are smoothed; the faint lines are "
        "not."
    )
    return [Figure(svg(draw.loss_curves(branches), "steps", label + "."), caption)]


def _agreement(r: RoundRecord) -> list[Figure]:
    def named(values: Sequence[Sequence[float]]) -> str:
        pairs = ((i, j) for i in range(len(r.teachers)) for j in range(i))
        return ", ".join(f"{r.teachers[j]} and {r.teachers[i]} {values[i][j]:.2f}" for i, j in pairs)

    cosine = f"Cosine of the updates in round {r.round}: {named(r.fold.cosine)}."
    conflict = f"Sign conflict of the updates in round {r.round}: {named(r.fold.opposition)}."
    return [
        Figure(svg(draw.teacher_pairs(r, "cosine"), f"cosine{r.round}", cosine)),
        Figure(svg(draw.teacher_pairs(r, "opposition"), f"conflict{r.round}", conflict)),
    ]


def _layers(record: RunRecord) -> list[Figure]:
    done = next((r for r in record.rounds if r.round == record.best), record.rounds[-1] if record.rounds else None)
    if done is None or not done.modules:
        return []
    sizes = {m: f.relative_norm for m, f in done.modules.items()}
    kept = {m: f.survived for m, f in done.modules.items() if f.survived is not None}
    largest = max(sizes, key=lambda m: sizes[m])
    size = (
        "|D|/|W| by layer and kind of module: where the round changed the student most. Even colours are good; one "
        f"bright cell is a module that took most of the change. Largest: {sizes[largest]:.4f} in {largest}."
    )
    if not kept:
        return [_layer_figure(done, "relative_norm", size)]
    least = min(kept, key=lambda m: kept[m])
    survived = (
        "Share of the update that is in the weights after rounding. Near 1 is good; far below 1, rounding has erased "
        f"it. Least: {kept[least]:.3f} in {least}."
    )
    return [_layer_figure(done, "relative_norm", size), _layer_figure(done, "survived", survived)]


def _layer_figure(done: RoundRecord, what: Literal["relative_norm", "survived"], caption: str) -> Figure:
    return Figure(svg(draw.layer_kinds(done, what), what, f"Round {done.round}: {caption}"), caption)


# --- answers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reply:
    """What one student said to a question, and whether it is right; of several texts all but the first are folded."""

    who: str
    verdict: str
    texts: Sequence[Passage]
    more: str


@dataclass(frozen=True)
class _Question:
    """A question, and the replies to it side by side."""

    title: str
    asked: Passage
    right: str
    answers: Sequence[_Reply]


@dataclass(frozen=True)
class _Questions:
    """How many answers became better or worse, in words, and a few of them."""

    counts: str
    shown: Sequence[_Question]


def _questions(page: Page) -> _Questions:
    pairs = zip(page.before, page.after, strict=False)
    both = [(n, b, a) for n, (b, a) in enumerate(pairs, 1) if b.question == a.question]
    if not both:
        asked = enumerate(page.before[:SHOWN], 1)
        return _Questions("", [_question(f"Question {n:,}", a, [_reply("Before", a)]) for n, a in asked])
    both.sort(key=lambda p: -abs(p[2].score - p[1].score))  # the clearest first, then as they were asked
    kinds = {
        "Better": [p for p in both if p[2].score > p[1].score],
        "Worse": [p for p in both if p[2].score < p[1].score],
        "Still wrong": [p for p in both if p[2].score == p[1].score < 1],
        "Still right": [p for p in both if p[2].score == p[1].score >= 1],
    }
    counts = ", ".join(f"{len(found):,} {kind.lower()}" for kind, found in kinds.items())
    number = page.record.best or len(page.record.rounds)
    return _Questions(
        f"Of {len(both):,} questions: {counts}. A few of them, before and after round {number}:",
        [
            _question(f"{kind}: question {n:,}", a, [_reply("Before", b), _reply(f"After round {number}", a)])
            for kind, found in kinds.items()
            for n, b, a in found[: 1 if kind == "Still right" else SHOWN]
        ],
    )


def _question(title: str, asked: Answer, answers: Sequence[_Reply]) -> _Question:
    return _Question(title, passage(asked.question, "Question"), asked.answer, answers)


def _reply(who: str, answer: Answer) -> _Reply:
    count = len(answer.texts)
    right = round(answer.score * count)
    verdict = ("right" if right else "wrong") if count == 1 else f"{right} of {count} right"
    return _Reply(who, verdict, [generated(text) for text in answer.texts], f"{count - 1} more")
