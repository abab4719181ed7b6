"""What a person sees of a run: a bar while it works, a table when it is done."""

from collections.abc import Iterator, Sequence
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
from mot_lora.records import InspectRecord, RunRecord, SaveRecord, VerifyRecord
from mot_lora.report import COLUMNS, table_rows

SHOWN = 8  # rows of a table that goes by the worst


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


def save_table(record: SaveRecord) -> Table:
    """What a merge lost as an adapter: the modules that lost most."""
    out = _table(f"{record.method} merge as an adapter of rank {record.rank}", ("module", "rank", "lost"))
    worst = sorted(record.modules, key=lambda m: -record.modules[m])
    for module in worst[:SHOWN]:
        out.add_row(module, str(record.ranks.get(module, "whole")), f"{record.modules[module]:.2%}")
    _more(out, worst)
    return out


def verify_table(record: VerifyRecord) -> Table:
    """What was read back of a folded checkpoint: the tensors with the largest errors."""
    title = f"read back: {len(record.tensors)} tensors updated, {record.untouched} the base's own"
    out = _table(title, ("tensor", "|D|", "survived", "largest error, in units of rounding"))
    worst = sorted(record.tensors, key=lambda t: -record.tensors[t].error)
    for name in worst[:SHOWN]:
        t = record.tensors[name]
        survived = "-" if t.survived is None else f"{t.survived:.4f}"
        out.add_row(name, f"{t.update_norm:.4g}", survived, f"{t.error:.3f}")
    _more(out, worst)
    return out


def inspect_tables(record: InspectRecord) -> list[Table]:
    """The adapters, how far each two agree, the layers, and what a smaller copy of the mean loses."""
    names = [a.name for a in record.adapters]
    adapters = _table("adapters", ("adapter", "base", "updates", "rank", "parameters", "|D|", "|D|/|W|"))
    for a in record.adapters:
        forms = ", ".join(f"{n} {form}" for form, n in a.forms.items())
        relative = "-" if a.relative_norm is None else f"{a.relative_norm:.4f}"
        ranks = f"{a.ranks[0]} to {a.ranks[-1]}" if len(a.ranks) > 1 else "".join(map(str, a.ranks))
        adapters.add_row(a.name, a.base or "-", forms, ranks, f"{a.parameters:,}", f"{a.norm:.4g}", relative)
    cosines = _table("cosine of the updates", ("", *names))
    for name, row in zip(names, record.overall.cosine, strict=True):
        cosines.add_row(name, *(f"{value:.3f}" for value in row))
    layers = _table("layers", ("layer", *(f"|D| {n}" for n in names), "mean cosine", "sign conflict"))
    for layer, r in [*record.layers.items(), ("all", record.overall)]:
        pairs = [r.cosine[i][j] for i in range(len(names)) for j in range(i)]
        mean = f"{sum(pairs) / len(pairs):.3f}" if pairs else "-"
        layers.add_row(layer, *(f"{n:.4g}" for n in r.norms), mean, f"{r.sign_conflict:.1%}")
    lost = _table("what a rank-r copy of the mean loses, |lost| / |D|", tuple(f"r {r}" for r in record.lost))
    lost.add_row(*(f"{value:.2%}" for value in record.lost.values()))
    return [adapters, cosines, layers, lost]


def _table(title: str, columns: Sequence[str]) -> Table:
    out = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), min_width=len(title) + 2)
    for i, name in enumerate(columns):
        out.add_column(name, justify="right" if i else "left")
    return out


def _more(out: Table, rows: Sequence[str]) -> None:
    if len(rows) > SHOWN:
        out.add_row(f"and {len(rows) - SHOWN} more, none worse", style="dim")


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
