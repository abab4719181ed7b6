"""A run as one self-contained page: its scores, how its teachers agree, what the fold kept, answers, data, settings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal, cast

from mot_lora.analysis.confidence import ConsensusRecord
from mot_lora.records import Answer, DataRecord, EvaluationRecord, RoundRecord, RunRecord, TeacherDataRecord
from mot_lora.reports import charts
from mot_lora.reports.consensus_page import consensus_sections
from mot_lora.reports.html import details, facts, figure, generated, grid, note, section, standing_open, table
from mot_lora.reports.html import page as whole_page

SHOWN = 2  # answers of each kind
RESULTS = (
    "Bold rows are the merged student; the others are each teacher's own branch of that round, before the merge. "
    "|D|/|W| is the size of the round's update beside the weights. Survived is the share of it that is in the weights "
    "after rounding: near 1 is good."
)


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
    record = page.record
    parts = (
        _overview(page),
        section("Results", _results(record)),
        section("Score by round", _scores(record)),
        section("Training loss", _losses(record)),
        section("Weights of the teachers", _weights(record)) if any(r.reasons for r in record.rounds) else "",
        section("Agreement of the teachers", _agreement(record)),
        consensus_sections(record, page.data, page.consensus),
        section("The update by layer", _layers(record)),
        section("Answers before and after", _answers(page.before, page.after, record.best or len(record.rounds))),
        section("Data", _data(page.data)),
        section("How it was done", _settings(page.config, page.environment)),
    )
    return whole_page(f"{page.name}: Merge of Thought", "".join(parts))


def columns(record: RunRecord) -> tuple[str, ...]:
    """The columns of the run's table; those of the sets to watch are accuracy in %."""
    watched = (f"{name}, %" for name in record.before.forgetting)
    return ("student", "accuracy, 95 % interval", "held-out loss", *watched, "|D|/|W|", "survived", "seconds")


def table_rows(record: RunRecord) -> list[tuple[str, str, tuple[str, ...]]]:
    """The lines of the run's table: (kind, name, the other columns); kind is `merged` or `branch`.

    >>> table_rows(RunRecord(before=EvaluationRecord(), metric="accuracy", best=0, stopped=""))
    [('merged', 'before', ('-', '-', '', '', '0'))]
    """

    def cells(e: EvaluationRecord | None, *rest: str) -> tuple[str, ...]:
        e = e or EvaluationRecord()
        watched = (f"{e.forgetting[n] * 100:.1f}" if n in e.forgetting else "" for n in record.before.forgetting)
        return (e.accuracy_text, e.loss_text, *watched, *rest)

    rows = [("merged", "before", cells(record.before, "", "", f"{record.before.seconds:.0f}"))]
    for number in sorted({b.round for b in record.branches} | {r.round for r in record.rounds}):
        for b in (b for b in record.branches if b.round == number):
            seconds = b.train.seconds + (b.evaluation.seconds if b.evaluation else 0)
            rows.append(("branch", f"  {b.teacher} alone", cells(b.evaluation, "", "", f"{seconds:.0f}")))
        for r in (r for r in record.rounds if r.round == number):
            kept = "-" if r.fold.survived is None else f"{r.fold.survived:.3f}"
            seconds = f"{r.fold_seconds + r.evaluation.seconds:.0f}"
            label = f"after round {number}{' (best)' if number == record.best else ''}"
            rows.append(("merged", label, cells(r.evaluation, f"{r.fold.relative_norm:.4f}", kept, seconds)))
    if f := record.final:
        rows.append(("merged", f.label, cells(f.evaluation, "", "", f"{f.evaluation.seconds:.0f}")))
    return rows


def memory_note(record: RunRecord) -> str:
    """With how many answers or traces at once the student was measured in the end, where memory ran out.

    >>> memory_note(RunRecord(before=EvaluationRecord(at_once={"answers": 4}), metric="loss", best=0, stopped=""))
    'Memory ran out while the student was measured; it went on with 4 answers at once.'
    """
    least: dict[str, int] = {}
    for what, n in (item for e in record.evaluations for item in e.at_once.items()):
        least[what] = min(n, least.get(what, n))
    said = " and ".join(f"{n} {what}" for what, n in least.items())
    return f"Memory ran out while the student was measured; it went on with {said} at once." if least else ""


def _overview(page: Page) -> str:
    record = page.record
    best = next((r for r in record.rounds if r.round == record.best), None)
    none = "no round beats the student before" if record.rounds else "no round is finished"
    devices = dict.fromkeys(part.device.text for part in (*record.branches, *record.rounds) if part.device)
    return facts({
        f"Best by {record.metric}": f"round {record.best}" if best else none,
        "Student before": _score(record.before, record.metric),
        "Student of the best round": _score(best.evaluation, record.metric) if best else "",
        "In the end": f"{record.final.label.removeprefix('final: ')}: {record.final.evaluation.accuracy_text}"
        if record.final
        else "",
        "Questions": f"{record.before.questions:,} held out" if record.before.questions else "none asked",
        "Stopped because": record.stopped or "not stopped: rounds are left to do",
        "Device": ", then ".join(devices) or str(page.environment.get("device", "")),
    })  # fmt: skip


def _score(evaluation: EvaluationRecord, metric: str) -> str:
    return evaluation.accuracy_text if metric == "accuracy" else f"{evaluation.loss_text} nats a token"


def _results(record: RunRecord) -> str:
    rows = [(kind, label.strip(), cells) for kind, label, cells in table_rows(record)]
    first, *others = columns(record)
    shown = [i for i in range(len(others)) if any(cells[i] not in ("", "-") for _, _, cells in rows)]
    results = table(
        (first, *(others[i] for i in shown)),
        [(kind, name, [cells[i] for i in shown]) for kind, name, cells in rows],
        "Results",
    )
    memory = memory_note(record)
    return f"{results}{note(RESULTS)}{note(memory) if memory else ''}"


def _scores(record: RunRecord) -> str:
    out = ""
    metrics: tuple[Literal["accuracy", "loss"], ...] = ("accuracy", "loss")
    for metric in metrics:
        students = [("before", record.before), *((f"round {r.round}", r.evaluation) for r in record.rounds)]
        known = [f"{name} {_score(e, metric)}" for name, e in students if charts.measured(e, metric) is not None]
        if known:
            what, good = ("Accuracy", "Higher") if metric == "accuracy" else ("Held-out loss", "Lower")
            interval = " with its 95\N{NO-BREAK SPACE}% interval" if metric == "accuracy" else ""
            out += figure(
                charts.svg(charts.score_by_round(record, metric), metric, f"{what} by round: {', '.join(known)}."),
                f"{what}. {good} is better. The line is the merged student{interval}, the marks are each teacher's own "
                "branch. A merge that is worth it stands beyond its branches.",
            )
    return grid(out) or note("Nothing was measured.")


def _losses(record: RunRecord) -> str:
    branches = [b for b in record.branches if b.train.losses]
    if not branches:
        return note("No loss of single steps was recorded.")
    label = "Training loss: " + ", ".join(
        f"{b.teacher} in round {b.round} from {b.train.losses[0]:.2f} to {b.train.losses[-1]:.2f}" for b in branches
    )
    return grid(
        figure(
            charts.svg(charts.loss_curves(branches), "steps", label + "."),
            "Loss of each teacher's branch by training step, rounds one after another. A curve that falls and flattens "
            "is good; one that jumps or climbs asks for a lower learning rate. Long curves are smoothed; the faint "
            "lines are not.",
        )
    )


def _weights(record: RunRecord) -> str:
    rows = [
        ("", f"round {r.round}", (teacher, f"{weight:.2f}" if isinstance(weight, float) else str(weight), why))
        for r in record.rounds
        for teacher, weight, why in zip(r.teachers, r.weights, r.reasons, strict=False)
    ]
    return table(("", "teacher", "weight", "why"), rows, "Weights") + note(
        "Found by the questions of eval.validation, which are not those that are reported. Weight 0 is left out."
    )


def _agreement(record: RunRecord) -> str:
    rounds = [r for r in record.rounds if len(r.teachers) > 1]
    if not rounds:
        return note("There is nothing to compare: no round of two teachers or more is finished.")
    out = ""
    for r in rounds[:1] + rounds[1:][-1:]:  # the first and the last
        pairs = [(i, j) for i in range(len(r.teachers)) for j in range(i)]
        cosines = [f"{r.teachers[j]} and {r.teachers[i]} {r.fold.cosine[i][j]:.2f}" for i, j in pairs]
        shares = [f"{r.teachers[j]} and {r.teachers[i]} {r.fold.opposition[i][j]:.2f}" for i, j in pairs]
        label = f"Cosine of the updates in round {r.round}: {', '.join(cosines)}."
        out += figure(charts.svg(charts.teacher_pairs(r, "cosine"), f"cosine{r.round}", label))
        label = f"Sign conflict of the updates in round {r.round}: {', '.join(shares)}."
        out += figure(charts.svg(charts.teacher_pairs(r, "opposition"), f"conflict{r.round}", label))
    return grid(out) + note(
        "Cosine of two teachers' updates: 1 is the same direction, 0 is unrelated, below 0 they undo each other. Sign "
        "conflict is the share of entries that two teachers push in opposite directions: 0.5 is what chance gives, "
        f"less is agreement. {'The first and the last round are shown.' if len(rounds) > 2 else ''}"
    )


def _layers(record: RunRecord) -> str:
    done = next((r for r in record.rounds if r.round == record.best), record.rounds[-1] if record.rounds else None)
    if done is None or not done.modules:
        return note("No round is finished.")
    sizes = {m: f.relative_norm for m, f in done.modules.items()}
    kept = {m: f.survived for m, f in done.modules.items() if f.survived is not None}
    largest = max(sizes, key=lambda m: sizes[m])
    out = _layer_figure(
        done,
        "relative_norm",
        "|D|/|W| by layer and kind of module: where the round changed the student most. Even colours are good; one "
        f"bright cell is a module that takes most of the change. Largest: {sizes[largest]:.4f} in {largest}.",
    )
    if kept:
        least = min(kept, key=lambda m: kept[m])
        out += _layer_figure(
            done,
            "survived",
            "Share of the update that is in the weights after rounding. Near 1 is good; far below 1, rounding ate the "
            f"update. Least: {kept[least]:.3f} in {least}.",
        )
    return grid(out)


def _layer_figure(done: RoundRecord, what: Literal["relative_norm", "survived"], caption: str) -> str:
    return figure(charts.svg(charts.layer_kinds(done, what), what, f"Round {done.round}: {caption}"), caption)


def _answers(before: Sequence[Answer], after: Sequence[Answer], number: int) -> str:
    pairs = [(n, b, a) for n, (b, a) in enumerate(zip(before, after, strict=False), 1) if b.question == a.question]
    if not pairs:
        shown = "".join(_question("Question", n, a, _answer("Before", a)) for n, a in enumerate(before[:SHOWN], 1))
        return shown or note("No questions were asked.")
    pairs.sort(key=lambda p: -abs(p[2].score - p[1].score))  # the clearest first, then as they were asked
    kinds = {
        "Better": [p for p in pairs if p[2].score > p[1].score],
        "Worse": [p for p in pairs if p[2].score < p[1].score],
        "Still wrong": [p for p in pairs if p[2].score == p[1].score < 1],
        "Still right": [p for p in pairs if p[2].score == p[1].score >= 1],
    }
    counts = ", ".join(f"{len(found):,} {kind.lower()}" for kind, found in kinds.items())
    out = note(f"Of {len(pairs):,} questions: {counts}. A few of them, before and after round {number}:")
    return out + "".join(
        _question(f"{kind}: question", n, a, _answer("Before", b) + _answer(f"After round {number}", a))
        for kind, found in kinds.items()
        for n, b, a in found[: 1 if kind == "Still right" else SHOWN]
    )


def _question(title: str, number: int, asked: Answer, columns: str) -> str:
    return (
        f"<h3>{title} {number:,}</h3>{standing_open(asked.question, 'Question')}"
        f'<p class="note">Right answer: {escape(asked.answer)}</p><div class="two">{columns}</div>\n'
    )


def _answer(who: str, answer: Answer) -> str:
    count = len(answer.texts)
    right = round(answer.score * count)
    verdict = ("right" if right else "wrong") if count == 1 else f"{right} of {count} right"
    first, rest = answer.texts[:1], answer.texts[1:]
    more = (
        details(f"{len(rest)} more", "".join(f'<div class="piece">{generated(t)}</div>' for t in rest)) if rest else ""
    )
    texts = "".join(map(generated, first)) or note("no answer")
    return f'<div class="card"><p class="who">{escape(who)}: <strong>{verdict}</strong></p>{texts}{more}</div>'


def _data(data: DataRecord | None) -> str:
    if data is None or not data.teachers:
        return note("No summary of the data was recorded.")
    columns = ("teacher", "rows", "used", "held out", "left out", "without reasoning", "tokens", "median", "longest")
    rows = [
        ("", t.teacher, (*(f"{n:,}" for n in (t.rows, t.used, t.held_out, sum(t.left_out.values()))),
                         *(f"{n:,}" for n in (t.without_reasoning, t.tokens, t.median_tokens, t.longest_tokens))))
        for t in data.teachers
    ]  # fmt: skip
    reasons = "".join(
        f"<li>{escape(t.teacher)}: {escape(', '.join(f'{n:,} {why}' for why, n in t.left_out.items()))}</li>"
        for t in data.teachers
        if t.left_out
    )
    return (
        table(columns, rows, "Data of each teacher")
        + note("Tokens are of the traces used: all of them, then the median and the longest trace.")
        + (f"<p>Left out, and why:</p><ul>{reasons}</ul>" if reasons else "")
        + "".join(f"<p>{escape(line)}.</p>" for line in data.remarks)
        + "".join(map(_sample, data.teachers))
    )


def _sample(teacher: TeacherDataRecord) -> str:
    pieces = "".join(
        f'<div class="piece{" trained" if s.trained else ""}"><p class="who">{"" if s.trained else "not "}trained</p>'
        f'<div class="text" dir="auto">{escape(s.text)}</div></div>'
        for s in teacher.sample
    )
    files = note(f"From {', '.join(teacher.sources)}.") if teacher.sources else ""
    if not pieces:
        return files
    return details(f"A trace of {teacher.teacher}, as the student reads it", files + pieces)


def _settings(config: str, environment: Mapping[str, Any]) -> str:
    rows = [("", key, (value,)) for key, value in _flat(environment)]
    out = details("Settings", f"<pre>{escape(config)}</pre>") if config else ""
    out += details("Versions, device and inputs", table(("what", "value"), rows, "Versions")) if rows else ""
    return out or note("No settings were recorded.")


def _flat(values: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(cast("Mapping[str, Any]", value), f"{above}{key}: ")
        else:
            yield f"{above}{key}", str(value)
