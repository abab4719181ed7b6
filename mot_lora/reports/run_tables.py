"""A run as rows of text, for a terminal and for a page alike."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from mot_lora.data.records import DataRecord
from mot_lora.records import EvaluationRecord, RunRecord
from mot_lora.reports.grid import Grid, Row


def results(record: RunRecord) -> Grid:
    """The student before, each teacher's branch and the student after each round; sets to watch are accuracy in %.

    >>> results(RunRecord(before=EvaluationRecord(), metric="accuracy", best=0, stopped="")).rows
    (Row(name='before', cells=('-', '-', '', '', '0'), kind='merged'),)
    """
    watched = tuple(record.before.forgetting)

    def cells(e: EvaluationRecord | None, *rest: str) -> tuple[str, ...]:
        e = e or EvaluationRecord()
        others = (f"{e.forgetting[name] * 100:.1f}" if name in e.forgetting else "" for name in watched)
        return (e.accuracy_text, e.loss_text, *others, *rest)

    rows = [Row("before", cells(record.before, "", "", f"{record.before.seconds:.0f}"), "merged")]
    for number in sorted({b.round for b in record.branches} | {r.round for r in record.rounds}):
        for b in (b for b in record.branches if b.round == number):
            seconds = b.train.seconds + (b.evaluation.seconds if b.evaluation else 0)
            rows.append(Row(f"{b.teacher} alone", cells(b.evaluation, "", "", f"{seconds:.0f}"), "branch"))
        for r in (r for r in record.rounds if r.round == number):
            kept = "-" if r.fold.survived is None else f"{r.fold.survived:.3f}"
            seconds = f"{r.fold_seconds + r.evaluation.seconds:.0f}"
            name = f"after round {number}{' (best)' if number == record.best else ''}"
            rows.append(Row(name, cells(r.evaluation, f"{r.fold.relative_norm:.4f}", kept, seconds), "merged"))
    if f := record.final:
        rows.append(Row(f.label, cells(f.evaluation, "", "", f"{f.evaluation.seconds:.0f}"), "merged"))
    sets = (f"{name}, %" for name in watched)
    columns = ("student", "accuracy, 95 % interval", "held-out loss", *sets, "|D|/|W|", "survived", "seconds")
    return Grid(f"Merge of Thought, {record.before.questions} held-out questions", columns, tuple(rows))


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


def weights(record: RunRecord) -> Grid:
    """The weight of each teacher in each round, and why; no row where they were given and not found."""
    rows = (
        Row(f"round {r.round}", (teacher, f"{weight:.2f}" if isinstance(weight, float) else str(weight), why))
        for r in record.rounds
        for teacher, weight, why in zip(r.teachers, r.weights, r.reasons, strict=False)
    )
    return Grid("weights of the teachers", ("", "teacher", "weight", "why"), tuple(rows))


def data(record: DataRecord) -> Grid:
    """What became of each teacher's rows; tokens are those of the traces used."""
    rows = (
        Row(
            t.teacher,
            (
                *(f"{n:,}" for n in (t.rows, t.used, t.held_out)),
                "\n".join(f"{count:,} {reason}" for reason, count in t.left_out.items() if count) or "-",
                *(f"{n:,}" for n in (t.without_reasoning, t.median_tokens, t.longest_tokens, t.tokens)),
            ),
        )
        for t in record.teachers
    )
    counts = ("rows", "used", "held\nout", "left\nout", "answer\nonly")
    lengths = ("median\ntokens", "longest\ntrace", "tokens\nin all")
    title = f"traces by teacher; {record.questions:,} questions"
    return Grid(title, ("teacher", *counts, *lengths), tuple(rows))


def versions(environment: Mapping[str, Any]) -> Grid:
    """What a run was done with: versions, device, fingerprints of the inputs."""
    rows = tuple(Row(key, (value,)) for key, value in _flat(environment))
    return Grid("versions, device and inputs", ("what", "value"), rows)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(cast("Mapping[str, Any]", value), f"{above}{key}: ")
        else:
            yield f"{above}{key}", str(value)
