"""What a person sees of a run: a bar while it works, a table when it is done."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from mot_lora.progress import Progress
from mot_lora.records import EvaluationRecord, RunRecord


@contextmanager
def live(console: Console) -> Iterator[Progress]:
    """A bar for the stage at work, with time left; off a terminal, one line when a stage begins."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        TimeElapsedColumn(),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(),
    )
    current: list[str] = []
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None, note="")

        def watch(stage: str, done: int, total: int, note: str = "") -> None:
            if current != [stage]:
                current[:] = [stage]
                bars.reset(task, description=stage, total=total)
                if not console.is_terminal:
                    console.print(stage, highlight=False)
            bars.update(task, completed=done, note=note)

        yield watch


def table(record: RunRecord) -> Table:
    """The student before, each teacher's branch and the student after each round."""
    out = Table(title=f"Merge of Thought, {record.before.questions} held-out questions")
    for name, justify in (("", "left"), ("accuracy, 95 % interval", "right"), ("held-out loss", "right")):
        out.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("|D|/|W|", "survived", "seconds"):
        out.add_column(name, justify="right")

    def row(name: str, e: EvaluationRecord | None, *rest: str, style: str = "") -> None:
        e = e or EvaluationRecord()
        out.add_row(name, e.accuracy_text, e.loss_text, *rest, style=style)

    row("student before", record.before, "", "", f"{record.before.seconds:.0f}")
    numbers = sorted({b.round for b in record.branches} | {r.round for r in record.rounds})
    for number in numbers:
        out.add_section()
        for b in (b for b in record.branches if b.round == number):
            seconds = b.train.seconds + (b.evaluation.seconds if b.evaluation else 0)
            row(f"  round {number}, {b.teacher} alone", b.evaluation, "", "", f"{seconds:.0f}", style="dim")
        for r in (r for r in record.rounds if r.round == number):
            kept = "-" if r.fold.survived is None else f"{r.fold.survived:.3f}"
            seconds = f"{r.fold_seconds + r.evaluation.seconds:.0f}"
            best = "  (best)" if number == record.best else ""
            row(f"after round {number}{best}", r.evaluation, f"{r.fold.relative_norm:.4f}", kept, seconds, style="bold")
    return out
