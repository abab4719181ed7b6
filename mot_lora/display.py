"""What a person sees of a run: a bar while it works, a table when it is done."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
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
from mot_lora.records import RunRecord
from mot_lora.report import COLUMNS, table_rows


def screen(as_json: bool) -> Console:
    """Where people read: standard output, or standard error beside JSON; a log is as wide as the table."""
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = 110
    return console


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
    current = ""
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None, note="")

        def watch(stage: str, done: int, total: int, note: str = "") -> None:
            nonlocal current
            if current != stage:
                current = stage
                bars.reset(task, description=stage, total=total, note=note)
                if not console.is_terminal:
                    console.print(stage, highlight=False)
            bars.update(task, completed=done, note=note)

        yield watch


def table(record: RunRecord) -> Table:
    """The student before, each teacher's branch and the student after each round."""
    out = Table(
        title=f"Merge of Thought, {record.before.questions} held-out questions", box=SIMPLE_HEAD, padding=(0, 1)
    )
    for i, name in enumerate(COLUMNS):
        out.add_column(name, justify="right" if i else "left", no_wrap=True)
    for kind, name, cells in table_rows(record):
        out.add_row(name, *cells, style="bold" if kind == "merged" else "dim", end_section=kind == "merged")
    return out
