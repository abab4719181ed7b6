"""The figures of a comparison: arms beside each other, by round, and gain against forgetting."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mot_lora.analysis.comparison import ArmSummary, BudgetSummary, Comparison, Reference
from mot_lora.analysis.statistics import Estimate
from mot_lora.analysis.wording import ADDED, MERGES, Metric, label, parts
from mot_lora.reports.figures import COLORS, INK, MARKS, WIDTH, blank, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW = 0.34  # inches of an arm's row: two lines of text
ACROSS = 3  # panels side by side
FILLS = {"": "full", "noisy": "none", "repeated": "left"}  # of a mark, by what was added to the arm


@styled
def scores(comparison: Comparison, budget: BudgetSummary) -> "Figure":
    """The last students' scores: mean and 95 % interval over seeds by arm, and a point for each seed.

    All budgets have the same axis.

    >>> scores(comparison, comparison.budgets[0])  # doctest: +SKIP
    <Figure size 480x612 with 1 Axes>
    """
    metric = comparison.metric
    arms = [a for a in budget.arms if a.score]
    figure, axes = _rows(arms)
    for y, arm in enumerate(arms):
        style = look(arm.arm, budget.arms)
        points = [_scale(metric) * x for x in arm.last]
        axes.plot(points, [y] * len(points), "o", ms=4, color=style["color"], alpha=0.45, mew=0)
        _mark(axes, arm.score, y, metric, **style)
    everything = [x for b in comparison.budgets for a in b.arms for x in (*a.last, *_ends(a.score))]
    _limits(axes, [_scale(metric) * x for x in everything])
    axes.set_xlabel(_axis(metric))
    return figure


@styled
def differences(comparison: Comparison, budget: BudgetSummary, reference: Reference) -> "Figure":
    """Each arm minus the best STD or MTD, around 0: the interval over seeds, and below it that over questions.

    All budgets have the same axis.

    >>> differences(comparison, comparison.budgets[0], "mtd")  # doctest: +SKIP
    <Figure size 480x612 with 1 Axes>
    """
    metric = comparison.metric
    arms = [a for a in budget.arms if a.to(reference)]
    figure, axes = _rows(arms)
    axes.axvline(0, color=INK, lw=1, ls="--")
    for y, arm in enumerate(arms):
        style = look(arm.arm, budget.arms)
        if found := arm.to(reference):
            _mark(axes, found.seeds, y - 0.12, metric, **style)
            _mark(axes, found.questions, y + 0.2, metric, lw=0.9, color=style["color"], marker="|")
    found = [d for b in comparison.budgets for a in b.arms if (d := a.to(reference))]
    ends = [x for d in found for x in (d.seeds.mean, *_ends(d.seeds), *_ends(d.questions))]
    _limits(axes, [0, *(_scale(metric) * x for x in ends)])
    to = budget.reference(reference)
    axes.set_xlabel(f"minus {label(to) if to else ''}, {'points' if metric == 'accuracy' else 'nats'}")
    return figure


@styled
def rounds(comparison: Comparison, budget: BudgetSummary) -> "Figure":
    """Mean scores by round with the 95 % interval over seeds: a panel an arm, the others faint behind it.

    >>> rounds(comparison, comparison.budgets[0])  # doctest: +SKIP
    <Figure size 480x700 with 12 Axes>
    """
    from matplotlib.figure import Figure

    metric = comparison.metric
    scale = _scale(metric)
    arms = [a for a in budget.arms if len(a.by_round) > 1]
    down = max(1, math.ceil(len(arms) / ACROSS))
    figure = Figure((WIDTH, 0.5 + 1.45 * down), layout="constrained")
    grid: Any = figure.subplots(down, ACROSS, sharex=True, sharey=True, squeeze=False)
    last = max((len(a.by_round) - 1 for a in arms), default=1)
    base = next((a.score for a in budget.arms if a.arm == "base"), None)
    behind = [[x for curve in (_curve(a, scale) for a in arms) for x in (*curve[side], math.nan)] for side in (0, 1)]
    for i, axes in enumerate(grid.flat):
        if i >= len(arms):
            axes.set_visible(False)
            continue
        arm = arms[i]
        axes.plot(*behind, color=INK, lw=0.7, alpha=0.2)
        if base:
            axes.axhline(scale * base.mean, color=INK, lw=0.8, ls=":")
        style = look(arm.arm, budget.arms)
        ends = [e.interval or (e.mean, e.mean) for e in arm.by_round]
        low, high = ([scale * end[side] for end in ends] for side in (0, 1))
        axes.fill_between(range(len(ends)), low, high, color=style["color"], alpha=0.25, lw=0)
        axes.plot(*_curve(arm, scale), **style, ms=4, lw=1.4)
        axes.set_title(_wrapped(label(arm.arm), 19), fontsize=9)
        axes.set_xticks(range(0, last + 1, math.ceil(last / 4)))
        axes.tick_params(labelbottom=i + ACROSS >= len(arms))
    figure.supxlabel("round", fontsize=10)
    figure.supylabel(_axis(metric), fontsize=10)
    return figure


@styled
def forgetting(comparison: Comparison, budget: BudgetSummary, name: str) -> "Figure":
    """The change on another set of tasks against the gain, by arm, each with its 95 % interval over seeds.

    >>> forgetting(comparison, comparison.budgets[0], "copying")  # doctest: +SKIP
    <Figure size 480x700 with 1 Axes>
    """
    metric = comparison.metric
    figure, axes = blank(2.9)
    axes.axhline(0, color=INK, lw=0.8, ls="--")
    axes.axvline(0, color=INK, lw=0.8, ls="--")
    drawn: list[str] = []
    for arm in budget.arms:
        change = arm.forgetting.get(name)
        if arm.gain is None or change is None:
            continue
        style = look(arm.arm, budget.arms)
        x, y = _scale(metric) * arm.gain.mean, 100 * change.mean
        across, along = _reach(arm.gain, _scale(metric)), _reach(change, 100)
        bars = {"ecolor": style["color"], "elinewidth": 0.8, "alpha": 0.5}
        axes.errorbar(x, y, yerr=along, xerr=across, fmt="none", **bars)
        axes.plot(x, y, ls="", ms=6, **style)
        drawn.append(arm.arm)
    axes.set_xlabel("change of accuracy, points" if metric == "accuracy" else "change of held-out loss, nats")
    axes.set_ylabel("change on the other\ntasks, points")
    axes.set_title(textwrap.shorten(name, 50, placeholder="..."))
    _key(figure, drawn, budget.arms)
    return figure


def look(arm: str, arms: Sequence[ArmSummary]) -> dict[str, Any]:
    """How an arm is drawn: its family's colour, its mark within the family, and how far that is filled.

    >>> look("base", ()), look("linear+noisy", ())["fillstyle"]
    ({'color': '#1b1b1f', 'marker': 'o', 'fillstyle': 'full'}, 'none')
    """
    color = _color(arm)
    plain = list(dict.fromkeys(_plain(a.arm) for a in arms if _color(a.arm) == color))
    marker = MARKS[plain.index(_plain(arm)) % len(MARKS)] if _plain(arm) in plain else MARKS[0]
    return {"color": color, "marker": marker, "fillstyle": FILLS[parts(arm)[2]]}


def _key(figure: "Figure", drawn: Sequence[str], arms: Sequence[ArmSummary]) -> None:
    """What the marks mean, in two columns: arms without what was added, then what that does to a mark."""
    from matplotlib.lines import Line2D

    plain, added = (list(dict.fromkeys(names)) for names in (map(_plain, drawn), (parts(a)[2] for a in drawn)))
    marks = [(textwrap.shorten(label(a), 28, placeholder="..."), look(a, arms)) for a in plain]
    marks += [(ADDED[a], {"color": INK, "marker": "o", "fillstyle": FILLS[a]}) for a in added if a]
    figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(marks) / 2))
    handles = [Line2D([], [], ls="", ms=6, label=text, **style) for text, style in marks]
    place: dict[str, Any] = {"loc": "outside upper left", "ncols": 2, "fontsize": 9}
    figure.legend(handles=handles, **place, handlelength=1, columnspacing=1.2, borderpad=0, labelspacing=0.35)


def _plain(arm: str) -> str:
    return arm.removesuffix(f"+{parts(arm)[2]}")


def _color(arm: str) -> str:
    kind = parts(arm)[0]
    kind = "mot" if kind in MERGES else kind
    families = ("std", "mtd", "mot", "one_shot", "vote")
    return INK if kind == "base" else COLORS[families.index(kind) if kind in families else len(families)]


def _rows(arms: Sequence[ArmSummary]) -> tuple["Figure", Any]:
    figure, axes = blank(0.7 + ROW * max(1, len(arms)))
    axes.set_yticks(range(len(arms)), [_wrapped(label(a.arm), 27) for a in arms], fontsize=9)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=INK, alpha=0.12, lw=0.6)
    return figure, axes


def _mark(axes: Any, found: Estimate | None, y: float, metric: Metric, lw: float = 1.6, **style: Any) -> None:
    if found is not None and math.isfinite(found.mean):
        x = _scale(metric) * found.mean
        axes.errorbar(x, y, xerr=_reach(found, _scale(metric)), elinewidth=lw, ms=6, ls="", **style)


def _reach(found: Estimate, scale: float) -> float:
    return scale * (found.interval[1] - found.interval[0]) / 2 if found.interval else 0.0


def _ends(found: Estimate | None) -> tuple[float, ...]:
    return found.interval or () if found else ()


def _limits(axes: Any, values: Sequence[float]) -> None:
    known = [x for x in values if math.isfinite(x)]
    if known:
        margin = 0.04 * (max(known) - min(known)) or 1
        axes.set_xlim(min(known) - margin, max(known) + margin)


def _curve(arm: ArmSummary, scale: float) -> tuple[range, list[float]]:
    return range(len(arm.by_round)), [scale * e.mean for e in arm.by_round]


def _scale(metric: Metric) -> Literal[1, 100]:
    return 100 if metric == "accuracy" else 1


def _axis(metric: Metric) -> str:
    return "accuracy, %" if metric == "accuracy" else "held-out loss, nats per token"


def _wrapped(text: str, width: int) -> str:
    lines = textwrap.wrap(text, width, max_lines=2, placeholder="\N{HORIZONTAL ELLIPSIS}")
    return "\n".join(lines)
