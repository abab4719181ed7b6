"""What a person reads when work is done: tables."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mot_lora.adapters.records import InspectRecord, SaveRecord
from mot_lora.analysis.comparison import Comparison
from mot_lora.checkpoints.records import ENOUGH, KeptRecord, VerifyRecord
from mot_lora.data.records import DataRecord, Segment
from mot_lora.records import RunRecord
from mot_lora.reports import run_tables
from mot_lora.reports.comparison_tables import grids
from mot_lora.reports.grid import Grid
from mot_lora.runs.records import ExportRecord
from mot_lora.text import clock_time, size

if TYPE_CHECKING:
    from mot_lora.analysis.harness import HarnessRecord
    from mot_lora.planning.fit import PlanRecord
    from mot_lora.planning.machine import MachineRecord

SHOWN = 8  # rows of a table that goes by the worst
SAMPLE = 600  # characters of a piece of a sample
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a trace could do to the terminal; tab and newline stay


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
    if not record.loaded:
        title += "; not loaded, its class is not transformers'"
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
        adapters.add_row(
            Text(a.name), Text(a.base or "-"), forms, ranks, f"{a.parameters:,}", f"{a.norm:.4g}", relative
        )
    cosines = _table("cosine of the updates", ("", *names))
    for name, row in zip(names, record.overall.cosine, strict=True):
        cosines.add_row(Text(name), *(f"{value:.3f}" for value in row))
    layers = _table("layers", ("layer", *(f"|D| {n}" for n in names), "mean cosine", "sign conflict"))
    for layer, r in [*record.layers.items(), ("all", record.overall)]:
        pairs = [r.cosine[i][j] for i in range(len(names)) for j in range(i)]
        mean = f"{sum(pairs) / len(pairs):.3f}" if pairs else "-"
        layers.add_row(layer, *(f"{n:.4g}" for n in r.norms), mean, f"{r.sign_conflict:.1%}")
    lost = _table("what a rank-r copy of the mean loses, |lost| / |D|", tuple(f"r {r}" for r in record.lost))
    lost.add_row(*(f"{value:.2%}" for value in record.lost.values()))
    return [adapters, cosines, layers, lost]


def table(record: RunRecord) -> Table:
    """The student before, each teacher's branch and the student after each round."""
    grid = run_tables.results(record)
    out = _table(grid.title, grid.columns)
    out.caption = run_tables.memory_note(record) or None
    for column in out.columns:
        column.no_wrap = True
    for name, cells, kind in grid.rows:
        merged = kind == "merged"
        out.add_row(
            Text(name if merged else f"  {name}"),
            *map(Text, cells),
            style="bold" if merged else "dim",
            end_section=merged,
        )
    return out


def kept_lines(kept: KeptRecord, as_adapter: str) -> list[str]:
    """How much of an update is in the weights that were written, and what keeps one that rounded away."""
    if not kept.faded:
        return [kept.text]
    return [f"{kept.text}: the rest rounded away; --dtype float32 keeps it, and so does {as_adapter}, as an adapter"]


def export_lines(record: ExportRecord, out: Path) -> list[str]:
    """What was exported, and how much of the update is in it."""
    if record.form == "lora":
        return [f"rounds 1 to {record.round} as an adapter of rank {record.rank}: {out}", record.text]
    return [f"round {record.round} in {record.dtype}: {out}", *kept_lines(record, "--as lora")]


def faded_line(record: RunRecord) -> str:
    """Of which rounds' updates too little survived in weights that are held in 16 bits; empty for none."""
    faded = [r for r in record.rounds if r.fold.survived is not None and r.fold.survived < ENOUGH]
    if not faded:
        return ""
    rounds = ", ".join(f"{r.fold.survived:.2f} of round {r.round}'s" for r in faded)
    return f"only {rounds} update survived rounding to 16 bits; quantization=nf4 keeps small updates"


def eval_table(record: "HarnessRecord") -> Table:
    """What lm-eval has measured of a round's student: a row for each metric, with W_0 beside it where it was asked."""
    compared = any(r.base for r in record.results)
    columns = ("task", "settings", "questions", "metric", "student", *(("base", "change") if compared else ()))
    out = _table(f"the student after round {record.round}, measured by lm-eval", columns)
    out.padding = (0, 1, 0, 0)  # it fits into 80 columns
    out.columns[1].justify = "left"
    out.columns[3].overflow = "fold"
    for column in out.columns[4:]:
        column.no_wrap = True
    for r in record.results:
        names = (r.task, r.settings, f"first {r.questions:,}" if r.limit else f"{r.questions:,}")
        for i, (metric, score) in enumerate(r.scores.items()):
            base = (r.base or {}).get(metric)
            change = (base.text, f"{score.value - base.value:+.3f}") if base else ("-", "-")
            cells = (
                *(("", "", "") if i else names),
                metric.replace(",", ", "),
                score.text,
                *(change if compared else ()),
            )
            out.add_row(*map(Text, cells), end_section=i == len(r.scores) - 1)
    return out


def data_tables(record: DataRecord) -> list[RenderableType]:
    """What became of each teacher's rows, and of each one trace as it is trained on, the trained part »marked«.

    >>> len(data_tables(DataRecord(teachers=())))
    1
    """
    out = _grid(run_tables.data(record))
    out.padding = (0, 1, 0, 0)  # it fits into 80 columns
    out.columns[4].no_wrap = False  # the reasons for which rows are left out are words
    shown: list[RenderableType] = [out, *map(Text, record.remarks)]
    for t in record.teachers:
        if t.sample:
            title = Text(f"{t.teacher}, one trace, trained between » and «", style="bold")
            shown += [title, Padding(_sample(t.sample), (0, 0, 1, 2))]
    return shown


WHILE: Mapping[str, str] = {
    "always": "",
    "loss": "training: loss",
    "layers": "training: layers",
    "losses": "measuring: losses",
    "answering": "measuring: answers",
}


def plan_tables(record: "PlanRecord") -> list[RenderableType]:
    """What a run needs: memory by part, and what each teacher's branch has to do.

    >>> len(plan_tables(plan(config, architecture, card)))  # doctest: +SKIP
    3
    """
    title = f"{record.student} on {record.card}, traces of at most {record.tokens:,} tokens"
    out = _table(title, ("part", "while", "memory"))
    place = "card"
    for part in sorted(record.parts, key=lambda p: ("card", "host", "disk").index(p.place)):
        if part.place != place:
            out.add_section()
            place = part.place
        when = WHILE.get(part.phase, part.phase)
        out.add_row(part.name, when if part.place == "card" else part.place, size(part.bytes))
    work = _table(f"one of {record.rounds} rounds", ("teacher", "traces", "longest", "steps", "tokens", "about"))
    for t in record.teachers:
        seconds = "-" if t.seconds is None else clock_time(t.seconds)
        traces = f"{t.traces:,}" if t.traces else "not read"
        work.add_row(Text(t.teacher), traces, *(f"{n:,}" for n in (t.longest, t.steps, t.tokens)), seconds)
    for column in (*out.columns[2:], *work.columns[1:]):
        column.justify = "right"
    return [out, work, *map(Text, record.remarks), Text(plan_line(record))]


def plan_line(record: "PlanRecord") -> str:
    """Whether a run fits, how long it takes, and what to change, in a few words."""
    fits = "fits" if record.fits else "does not fit"
    said = [f"{fits}: {size(record.peak)} of {size(record.capacity)} on {record.card}"]
    if record.longest is not None:
        said.append(f"the longest trace that fits has {record.longest:,} tokens")
    if record.seconds is not None:
        said.append(f"training takes about {clock_time(record.seconds)}")
    if record.losing is not None:
        said.append(f"held-out losses {clock_time(record.losing)}")
    if record.answering is not None:
        said.append(f"answers at most about {clock_time(record.answering)}")
    if record.change:
        said.append(f"to make it fit: {' '.join(record.change)}")
    return "; ".join(said)


def machine_table(machine: "MachineRecord") -> Table:
    """What a machine is."""
    out = Table(title="this machine", box=SIMPLE_HEAD, padding=(0, 1), show_header=False)
    rows = [("GPU", f"{g.name}, {size(g.free)} of {size(g.total)} free, {g.capability}") for g in machine.gpus]
    rows = rows or [("GPU", "none that torch can use")]
    rows += [("bf16", "yes" if all(g.bf16 for g in machine.gpus) else "no: fp16")] if machine.gpus else []
    library = "its CUDA library" if machine.bitsandbytes_cuda else "no CUDA library"
    rows += [
        ("driver", machine.driver or "none found"),
        ("torch's CUDA", machine.cuda or "none: a CPU build"),
        ("bitsandbytes", f"{machine.versions.get('bitsandbytes')}, {library}"),
        ("memory of the machine", f"{size(machine.host_free)} of {size(machine.host_limit)} free"),
        *((f"disk at {place}", f"{size(free)} free") for place, free in machine.disk.items()),
        ("system", machine.system),
        *((name, version or "not installed") for name, version in machine.versions.items() if name != "bitsandbytes"),
    ]
    for row in rows:
        out.add_row(*map(Text, row))
    return out


def comparison_tables(comparison: Comparison) -> list[Table]:
    """The arms of a comparison, budget by budget: scores, differences, rounds, forgetting, costs.

    >>> from mot_lora.analysis.comparison import ArmRun, summarize
    >>> len(comparison_tables(summarize([ArmRun(arm="base", budgets=("steps",), seed=0, accuracy=(0.3,))])))
    2
    """
    return [_grid(grid) for grid in grids(comparison)]


def _sample(segments: Sequence[Segment]) -> Text:
    out = Text()  # never markup: a trace may say [bold]
    for trained, pieces in groupby(segments, lambda s: s.trained):
        text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", "".join(s.text for s in pieces))
        out.append(f"»{_shorten(text)}«" if trained else _shorten(text), style="bold green" if trained else "dim")
    out.rstrip()
    return out


def _shorten(text: str) -> str:
    cut = len(text) - SAMPLE
    half = SAMPLE // 2
    return text if cut <= 0 else f"{text[:half]}\n… {cut:,} characters …\n{text[-half:]}"


def _table(title: str, columns: Sequence[str]) -> Table:
    out = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), min_width=len(title) + 2)
    for i, name in enumerate(columns):
        out.add_column(Text(name), justify="right" if i else "left")
    return out


def _grid(grid: Grid) -> Table:
    out = _table(grid.title, grid.columns)
    for column in out.columns[1:]:
        column.vertical = "bottom"
        column.no_wrap = True  # a name may wrap, numbers must not
    for name, cells, _ in grid.rows:
        out.add_row(Text(name), *map(Text, cells))
    return out


def _more(out: Table, rows: Sequence[str]) -> None:
    if len(rows) > SHOWN:
        out.add_row(f"and {len(rows) - SHOWN} more, none worse", style="dim")
