"""A run as one self-contained page: accuracy or loss by round, and the table."""

import io
from collections.abc import Sequence
from html import escape
from typing import Any

from mot_lora.records import EvaluationRecord, RunRecord

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #6b6b76; --line: #d9d9e0; --page: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --soft: #9a9aa8; --line: #3a3a44; --page: #17171c } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--page) }
h1 { font-size: 1.4rem } p, figcaption { color: var(--soft) } figure { margin: 1.5rem 0 }
svg { width: 100%; height: auto } .scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } tr.merged { font-weight: 600 }
"""


def report(record: RunRecord, name: str) -> str:
    """The page, as HTML that asks nothing of the network.

    >>> "<svg" in report(RunRecord(before=EvaluationRecord(), metric="accuracy", best=0, stopped=""), "demo")
    True
    """
    best = f"Best by {record.metric}: round {record.best}." if record.best else "No round beats the student before."
    rows = "".join(
        f'<tr class="{kind}"><td>{escape(label)}</td>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for kind, label, cells in table_rows(record)
    )
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}: Merge of Thought</title><style>{STYLE}</style>
<h1>{escape(name)}: Merge of Thought</h1>
<p>{record.before.questions} held-out questions. {escape(best)} {escape(record.stopped.capitalize())}.</p>
<figure>{_chart(record)}<figcaption>The line is the merged student with its 95 % interval, the marks are each teacher's
own branch of that round.</figcaption></figure>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>
</html>
"""


COLUMNS = ("student", "accuracy, 95 % interval", "held-out loss", "|D|/|W|", "survived", "seconds")


def table_rows(record: RunRecord) -> list[tuple[str, str, tuple[str, ...]]]:
    """The lines of the run's table: (kind, name, the other columns); kind is `merged` or `branch`.

    >>> table_rows(RunRecord(before=EvaluationRecord(), metric="accuracy", best=0, stopped=""))
    [('merged', 'before', ('-', '-', '', '', '0'))]
    """

    def cells(e: EvaluationRecord | None, *rest: str) -> tuple[str, ...]:
        e = e or EvaluationRecord()
        return (e.accuracy_text, e.loss_text, *rest)

    rows = [("merged", "before", cells(record.before, "", "", f"{record.before.seconds:.0f}"))]
    for number in range(1, 1 + max([b.round for b in record.branches], default=0)):
        for b in (b for b in record.branches if b.round == number):
            seconds = b.train.seconds + (b.evaluation.seconds if b.evaluation else 0)
            rows.append(("branch", f"  {b.teacher} alone", cells(b.evaluation, "", "", f"{seconds:.0f}")))
        for r in (r for r in record.rounds if r.round == number):
            kept = "-" if r.fold.survived is None else f"{r.fold.survived:.3f}"
            seconds = f"{r.fold_seconds + r.evaluation.seconds:.0f}"
            label = f"after round {number}{' (best)' if number == record.best else ''}"
            rows.append(("merged", label, cells(r.evaluation, f"{r.fold.relative_norm:.4f}", kept, seconds)))
    return rows


def _chart(record: RunRecord) -> str:
    from matplotlib.figure import Figure  # half a second to load, only where a page is drawn

    merged = [record.before, *(r.evaluation for r in record.rounds)]
    by_accuracy = record.before.accuracy is not None

    def values(evaluations: Sequence[EvaluationRecord | None]) -> list[float]:
        read = [(e.accuracy if by_accuracy else e.loss) if e else None for e in evaluations]
        return [float("nan") if v is None else v * (100 if by_accuracy else 1) for v in read]

    figure: Any = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    teachers = list(dict.fromkeys(b.teacher for b in record.branches))
    for i, (teacher, mark) in enumerate(zip(teachers, "os^Dv<>pP*" * len(teachers), strict=False)):
        rows = [b for b in record.branches if b.teacher == teacher]
        at = [b.round + (i - (len(teachers) - 1) / 2) * 0.08 for b in rows]
        axes.plot(at, values([b.evaluation for b in rows]), mark, color=f"C{i + 1}", label=teacher)
    heights = values(merged)
    bars = None
    if by_accuracy:
        ends = [[100 * x for x in e.interval or (0, 0)] for e in merged]
        bars = [[h - low for h, (low, _) in zip(heights, ends, strict=True)]]
        bars.append([high - h for h, (_, high) in zip(heights, ends, strict=True)])
    axes.errorbar(range(len(merged)), heights, bars, color="C0", marker="o", capsize=4, lw=2, label="merged student")
    axes.set_xticks(range(len(merged)), ["before", *(f"round {r.round}" for r in record.rounds)])
    axes.set_ylabel("accuracy, %" if by_accuracy else "held-out loss, nats a token")
    figure.legend(loc="outside upper left", ncols=6, frameon=False, labelcolor="#80808c")
    axes.spines[["top", "right"]].set_visible(False)
    for part in (axes.xaxis.label, axes.yaxis.label, *axes.spines.values()):
        part.set_color("#80808c")  # readable on light and on dark
    axes.tick_params(colors="#80808c")
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True)
    return out.getvalue()[out.getvalue().index("<svg") :]
