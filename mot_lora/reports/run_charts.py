"""The figures of a run: its records become matplotlib figures."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mot_lora.records import BranchRecord, EvaluationRecord, RoundRecord, RunRecord
from mot_lora.reports.figures import INK, MARKS, blank, color_of, heat, legend, short_names, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 300  # a longer curve is drawn by means of several steps
Metric = Literal["accuracy", "loss"]


@styled
def score_by_round(record: RunRecord, metric: Metric) -> "Figure":
    """Accuracy in % or held-out loss in nats per token: the merged student as a line, each teacher's branches as marks.

    >>> run = RunRecord(before=EvaluationRecord(losses={"a": 2.0}), metric="loss", best=0, stopped="")
    >>> score_by_round(run, "loss").axes[0].get_ylabel()
    'held-out loss, nats per token'
    """
    students = [(0, record.before), *((r.round, r.evaluation) for r in record.rounds)]
    merged = [(at, value, e) for at, e in students if (value := measured(e, metric)) is not None]
    teachers = list(dict.fromkeys(b.teacher for b in record.branches))
    figure, axes = blank(2.8)
    axes.set_ylabel("accuracy, %" if metric == "accuracy" else "held-out loss, nats per token")
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
    """Training loss in nats per token by step, rounds one after another: a moving mean over each step's own, faint.

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
    axes.set_ylabel("training loss, nats per token")
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
