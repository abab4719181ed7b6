"""The figures of a run: records become matplotlib figures, and a figure becomes SVG for a page."""

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from mot_lora.records import BranchRecord, EvaluationRecord, RoundRecord, RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1b1b1f"  # axes and text; on a page it becomes the page's own colour
# apart for colour-blind eyes, with a contrast of 3 or more on white and on near-black; the first three: Okabe and Ito
COLORS = ("#0072b2", "#d55e00", "#009e73", "#8a3ffc", "#be7daa", "#e1004b")
MARKS = "os^DvPX*"
WIDTH = 4.8  # inches: text of 10 points is then 10 pixels or more on a phone
STEPS = 300  # a longer curve is drawn by means of several steps
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 5,
    "text.parse_math": False,  # a $ in a teacher's name is a $
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
Metric = Literal["accuracy", "loss"]
P = ParamSpec("P")


def styled(draw: "Callable[P, Figure]") -> "Callable[P, Figure]":
    """A drawing function in the style of the page's figures."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        from matplotlib import rc_context  # half a second to load, only where something is drawn

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@styled
def score_by_round(record: RunRecord, metric: Metric) -> "Figure":
    """Accuracy in % or held-out loss in nats a token: the merged student as a line, each teacher's branches as marks.

    >>> run = RunRecord(before=EvaluationRecord(losses={"a": 2.0}), metric="loss", best=0, stopped="")
    >>> score_by_round(run, "loss").axes[0].get_ylabel()
    'held-out loss, nats a token'
    """
    students = [(0, record.before), *((r.round, r.evaluation) for r in record.rounds)]
    merged = [(at, value, e) for at, e in students if (value := measured(e, metric)) is not None]
    teachers = list(dict.fromkeys(b.teacher for b in record.branches))
    figure, axes = blank(2.8)
    axes.set_ylabel("accuracy, %" if metric == "accuracy" else "held-out loss, nats a token")
    axes.plot([at for at, _, _ in merged], [y for _, y, _ in merged], "o-", color=INK, label="merged student", zorder=3)
    if metric == "accuracy":
        for at, y, e in merged:
            low, high = e.interval or (y / 100, y / 100)
            axes.errorbar(at, 50 * (low + high), 50 * (high - low), fmt="none", ecolor=INK, capsize=3, elinewidth=1)
    for i, (teacher, label) in enumerate(zip(teachers, short_names(teachers), strict=True)):
        values = [(b.round, measured(b.evaluation, metric)) for b in record.branches if b.teacher == teacher]
        at_left = 0.45 - 0.35 * i / max(1, len(teachers) - 1)  # a branch comes before its merge
        points = [(at - at_left, y) for at, y in values if y is not None]
        if points:
            look: Any = {"ls": "", "marker": MARKS[i % len(MARKS)], "ms": 5 if len(points) < 10 else 3.5}
            axes.plot(*zip(*points, strict=True), **look, color=color_of(i), label=label)
    last = max([at for at, _ in students] + [b.round for b in record.branches])
    every = math.ceil((last + 1) / 8)
    ticks = [t for t in range(0, last + 1, every) if t == 0 or t == record.best or abs(t - record.best) >= every]
    ticks = sorted({*ticks, record.best})
    names = ["before" if t == 0 else f"{t}\nbest" if t == record.best else str(t) for t in ticks]
    axes.set_xticks(ticks, names)
    axes.set_xlim(-0.5, last + 0.5)
    axes.set_xlabel("round")
    legend(figure)
    return figure


@styled
def loss_curves(branches: Sequence[BranchRecord]) -> "Figure":
    """Training loss in nats a token by step, rounds one after another: a moving mean over each step's own, faint.

    >>> from mot_lora.records import TrainRecord
    >>> train = TrainRecord(steps=2, tokens=9, loss=1.5, losses=(2.0, 1.0))
    >>> figure = loss_curves([BranchRecord(round=1, teacher="a", learning_rate=1e-4, train=train)])
    >>> [float(y) for y in figure.axes[0].lines[0].get_ydata()]
    [2.0, 1.0]
    """
    teachers = list(dict.fromkeys(b.teacher for b in branches))
    starts: dict[int, int] = {}
    total = 0
    for n in sorted({b.round for b in branches}):
        starts[n] = total
        total += max(len(b.train.losses) for b in branches if b.round == n)
    each = max(1, math.ceil(total / STEPS))
    figure, axes = blank(2.8)
    for i, (teacher, label) in enumerate(zip(teachers, short_names(teachers), strict=True)):
        look: dict[str, Any] = {"color": color_of(i), "marker": MARKS[i % len(MARKS)], "lw": 1.4}
        for b in (b for b in branches if b.teacher == teacher):
            points = _means(b.train.losses, each)
            xs, ys = [starts[b.round] + x for x, _ in points], [y for _, y in points]
            smooth = _moving_mean(ys, 1 if len(ys) < 20 else max(5, len(ys) // 10))
            if smooth != ys:
                axes.plot(xs, ys, color=color_of(i), lw=0.8, alpha=0.3)
            if xs:
                axes.plot(xs, smooth, **look, markevery=[-1], label=label)
                label = None  # once in the legend
    for n, start in starts.items():
        if start:
            axes.axvline(start + 0.5, color=INK, lw=0.8, ls=":", alpha=0.6)
        if (n - 1) % math.ceil(len(starts) / 6) == 0 and len(starts) > 1:
            text = f"round {n}" if len(starts) < 5 or n == 1 else str(n)
            axes.text(start + 0.5, 1.02, text, transform=axes.get_xaxis_transform())
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a token")
    legend(figure)
    return figure


@styled
def teacher_pairs(done: RoundRecord, what: Literal["cosine", "opposition"]) -> "Figure":
    """One round's updates of every two teachers: their cosine, or the share of entries on which their signs differ.

    >>> teacher_pairs(record.rounds[-1], "cosine")  # doctest: +SKIP
    <Figure size 480x174 with 2 Axes>
    """
    values = done.fold.cosine if what == "cosine" else done.fold.opposition
    names = short_names(done.teachers)
    count = len(values)
    figure, axes = blank(0.9 + 0.42 * count)
    top = max(0.5, *(x for row in values for x in row))
    title = "cosine" if what == "cosine" else "sign conflict"
    heat(figure, axes, values, *(("coolwarm", -1, 1) if what == "cosine" else ("cividis", 0, top)), numbers=count <= 6)
    axes.set_title(f"{title}, round {done.round}")
    tilted = sum(map(len, names)) > 30
    axes.set_xticks(range(count), names, **({"rotation": 30, "ha": "right"} if tilted else {}))
    axes.set_yticks(range(count), names)
    return figure


@styled
def layer_kinds(done: RoundRecord, what: Literal["relative_norm", "survived"]) -> "Figure":
    """One round's |D|/|W|, or the share of D that survived the fold, by layer and kind of module (see `by_layer`).

    >>> layer_kinds(record.rounds[-1], "survived")  # doctest: +SKIP
    <Figure size 480x292 with 2 Axes>
    """
    layers, kinds, values = by_layer({m: getattr(f, what) for m, f in done.modules.items()})
    figure, axes = blank(1.1 + 0.26 * len(kinds))
    known = [x for row in values for x in row if x is not None]
    top = max(known, default=0.0)
    low, high = (0, top or 1) if what == "relative_norm" else (min(0, *known, 0), max(1, top))
    heat(figure, axes, values, "viridis", low, high)
    axes.set_title(f"{'|D|/|W|' if what == 'relative_norm' else 'survived'}, round {done.round}")
    every = math.ceil(len(layers) / 10)
    stacks = list(dict.fromkeys(stack for stack, number in layers if number is not None))
    others = [i for i, (_, number) in enumerate(layers) if number is None]
    ticks = [i for i in range(0, len(layers) - len(others), every) if not others or others[0] - i >= every]
    ticks += others
    axes.set_xticks(ticks, ["none" if layers[t][1] is None else str(layers[t][1]) for t in ticks])
    axes.set_xlabel("layer" + (f" of {', then of '.join(stacks)}" if len(stacks) > 1 else ""))
    axes.set_yticks(range(len(kinds)), short_names(kinds))
    return figure


Layer = tuple[str, int | None]


def by_layer(modules: Mapping[str, float | None]) -> tuple[list[Layer], list[str], list[list[float | None]]]:
    """The layers as (stack, number), the kinds of modules, and the values as kinds x layers.

    A kind is the end of the module's name, as much of it as tells it from other kinds. What is in no layer has the
    layer ("", None). Experts of a layer share a cell, which is then their mean; a cell of nothing finite is None.

    >>> by_layer({"m.h.0.mlp.up": 1.0, "m.h.1.mlp.up": 3.0, "head": 2.0})
    ([('m.h', 0), ('m.h', 1), ('', None)], ['up', 'head'], [[1.0, 3.0, None], [None, None, 2.0]])
    """
    cells: dict[tuple[Layer, str], list[float]] = {}
    for module, value in modules.items():
        found = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", module)
        layer: Layer = (found[1], int(found[2])) if found else ("", None)
        kind = re.sub(r"\.\d+(?=\.|$)", "", found[3]) if found else module
        cells.setdefault((layer, kind), []).extend([] if value is None or not math.isfinite(value) else [value])
    stacks = list(dict.fromkeys(layer[0] for layer, _ in cells))
    layers = sorted({layer for layer, _ in cells}, key=lambda x: (x[1] is None, stacks.index(x[0]), x[1] or 0))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    ends = [kind.rpartition(".")[2] for kind in kinds]
    rows = [[_mean(cells.get((layer, kind), [])) for layer in layers] for kind in kinds]
    return layers, [kind if ends.count(end) > 1 else end for kind, end in zip(kinds, ends, strict=True)], rows


def measured(evaluation: EvaluationRecord | None, metric: Metric) -> float | None:
    """The accuracy in % or the held-out loss; None where it was not measured or is not finite.

    >>> measured(EvaluationRecord(accuracy=0.25), "accuracy")
    25.0
    """
    value = None if evaluation is None else evaluation.accuracy if metric == "accuracy" else evaluation.loss
    return None if value is None or not math.isfinite(value) else value * (100 if metric == "accuracy" else 1)


def short_names(names: Sequence[str], longest: int = 17) -> list[str]:
    """Names that fit a figure: the middle of a long one is left out, and where two then look alike all get numbers.

    >>> short_names(["gains_first", "a-teacher-with-a-very-long-name"])
    ['gains_first', 'a-teache\N{HORIZONTAL ELLIPSIS}ong-name']
    """
    half = longest // 2
    short = [n if len(n) <= longest else f"{n[:half]}\N{HORIZONTAL ELLIPSIS}{n[-half:]}" for n in names]
    if len(set(short)) < len(set(names)):
        short = [f"{i} {n[: longest - 3]}" for i, n in enumerate(names, 1)]
    return short


def svg(figure: "Figure", name: str, label: str) -> str:
    """A figure as one inline <svg>: text stays text in the page's font, and INK becomes `currentColor`.

    name: begins every id, so that several figures share a page; label: what a screen reader says. The same figure
    gives the same bytes.

    >>> from matplotlib.figure import Figure
    >>> svg(Figure((1, 1)), "empty", "an empty figure")[:59]
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"'
    """
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a browser has its own fonts
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", out.getvalue(), flags=re.DOTALL)
    size = re.search(r'viewBox="([^"]*)"', text)
    body = re.sub(r"<[^>]+>", lambda tag: _for_page(tag[0], name), text[text.index(">", text.index("<svg")) + 1 :])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size[1] if size else ""}" role="img" '
        f'stroke-linejoin="round" aria-label="{html.escape(label)}">{body}'
    )


def _for_page(tag: str, name: str) -> str:
    tag = tag.replace(' id="QuadMesh', ' shape-rendering="crispEdges" id="QuadMesh')  # no seams between cells
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag).replace("xlink:href", "href")
    tag = re.sub(r"font: (?:\w+ )*([\d.]+px)[^;\"]*", r"font-size: \1", tag)  # as matplotlib 3.9 writes it
    return re.sub(r"font-family: [^;\"]*;? ?", "", tag).replace(INK, "currentColor")


def blank(height: float) -> tuple["Figure", Any]:
    """A figure as wide as all of them, and its axes; height in inches."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def legend(figure: "Figure") -> None:
    """Name the marks above the axes, in as many columns as fit."""
    labels = [str(label) for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    if labels:
        columns = max(1, 52 // (max(map(len, labels)) + 6))
        rows = math.ceil(len(labels) / columns)
        figure.set_figheight(figure.get_figheight() + 0.2 * rows)
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.5, columnspacing=1.2, borderpad=0)


def heat(
    figure: "Figure",
    axes: Any,
    values: Sequence[Sequence[float | None]],
    colors: str,
    low: float,
    high: float,
    numbers: bool = False,
) -> None:
    """Values as coloured cells with their bar, None as a hole; `numbers` also writes them into the cells."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    shades = colormaps[colors].resampled(41)  # few enough that the bar is drawn in vectors too
    cells = [[math.nan if x is None else x for x in row] for row in values]
    edges = [[at - 0.5 for at in range(n + 1)] for n in (len(cells[0]) if cells else 0, len(cells))]
    mesh = axes.pcolormesh(*edges, cells, cmap=shades, vmin=low, vmax=high)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar: Any = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=12)
    bar.locator = MaxNLocator(4)
    bar.outline.set_visible(False)
    for y, row in enumerate(values if numbers else ()):
        for x, value in enumerate(row):
            if value is not None:
                color = _readable(mesh.to_rgba(value))
                axes.text(x, y, f"{value:z.2f}", ha="center", va="center", color=color)


def _readable(color: Sequence[float]) -> str:
    """Black or white, whichever has more contrast on a colour (WCAG's relative luminance)."""
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in color[:3])
    return "black" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 else "white"


def color_of(i: int) -> str:
    """The colour of the i-th teacher."""
    return COLORS[i % len(COLORS)]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _means(losses: Sequence[float], each: int) -> list[tuple[float, float]]:
    """(step, loss) of a branch, `each` steps at a time by their mean; what is not finite is left out."""
    parts = [(i, [x for x in losses[i : i + each] if math.isfinite(x)]) for i in range(0, len(losses), each)]
    return [(i + (min(each, len(losses) - i) + 1) / 2, math.fsum(part) / len(part)) for i, part in parts if part]


def _moving_mean(values: Sequence[float], width: int) -> list[float]:
    half = width // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(w) / len(w) for w in windows]
