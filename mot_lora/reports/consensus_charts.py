"""The figures of a run's consensus: confidence and agreement over its rounds, and the loss around the last one."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mot_lora.analysis.confidence import ConsensusRecord, LandscapeRecord, LossLine
from mot_lora.records import FoldRecord, RoundRecord
from mot_lora.reports.figures import INK, MARKS, blank, color_of, heat, legend, short_names, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.")


@styled
def confidence_of_students(found: ConsensusRecord) -> "Figure":
    """Mean p over all teachers' traces by round: the merged student as a line, each teacher's branches as marks.

    >>> confidence_of_students(consensus("runs/quickstart"))  # doctest: +SKIP
    <Figure size 480x319 with 1 Axes>
    """
    figure, axes = blank(2.8)
    merged = [c for c in found.confidence if c.branch is None]
    axes.plot([c.round for c in merged], [c.mean for c in merged], "o-", color=INK, label="merged student", zorder=3)
    for i, (name, label) in enumerate(zip(found.branches, short_names(found.branches), strict=True)):
        at_left = 0.45 - 0.35 * i / max(1, len(found.branches) - 1)  # a branch comes before its merge
        points = [(c.round - at_left, c.mean) for c in found.confidence if c.branch == name]
        axes.plot(*zip(*points, strict=True), ls="", marker=MARKS[i % len(MARKS)], color=color_of(i), label=label)
    _rounds(axes, merged[-1].round)
    axes.set_ylabel("mean p(token), all traces")
    legend(figure)
    return figure


@styled
def confidence_by_traces(found: ConsensusRecord) -> "Figure":
    """The merged student's mean p by round, a line for each teacher's traces.

    >>> confidence_by_traces(consensus("runs/quickstart"))  # doctest: +SKIP
    <Figure size 480x319 with 1 Axes>
    """
    figure, axes = blank(2.8)
    merged = [c for c in found.confidence if c.branch is None]
    names = list(merged[0].p)
    for i, (name, label) in enumerate(zip(names, short_names(names), strict=True)):
        axes.plot([c.round for c in merged], [c.p[name] for c in merged], label=f"traces of {label}", **_look(i))
    _rounds(axes, merged[-1].round)
    axes.set_ylabel("mean p(token), merged")
    legend(figure)
    return figure


@styled
def agreement_by_layer(rounds: Sequence[RoundRecord], what: Literal["cosine", "sign conflict"]) -> "Figure":
    """Rounds x layers: the mean cosine of every two branches' updates, or the share of entries in conflict of sign.

    >>> agreement_by_layer(record.rounds, "cosine")  # doctest: +SKIP
    <Figure size 480x187 with 2 Axes>
    """
    layers = layers_in_order(rounds)
    values = [[mean_agreement(r.layers.get(layer), what) for layer in layers] for r in rounds]
    figure, axes = blank(1.3 + 0.3 * min(len(rounds), 12))
    known = [x for row in values for x in row if x is not None and math.isfinite(x)]
    look = ("coolwarm", -1, 1) if what == "cosine" else ("cividis", 0, max(0.5, *known, 0.0))
    heat(figure, axes, values, *look, numbers=len(layers) <= 6 and len(rounds) <= 12)
    axes.set_title(f"{what} by layer and round")
    names = [end if (end := layer.rpartition(".")[2]).isdigit() else end[:8] for layer in layers]
    axes.set_xticks(at := range(0, len(layers), math.ceil(len(layers) / 10)), [names[i] for i in at])
    axes.set_yticks(at := range(0, len(rounds), math.ceil(len(rounds) / 12)), [str(rounds[i].round) for i in at])
    axes.set_xlabel("layer")
    axes.set_ylabel("round")
    return figure


@styled
def loss_between(landscape: LandscapeRecord) -> "Figure":
    """The held-out loss on the lines between every two branches.

    >>> loss_between(consensus("runs/quickstart").landscape)  # doctest: +SKIP
    <Figure size 480x319 with 1 Axes>
    """
    names = short_names([line.name for line in landscape.between], 40)
    ticks = {0: "one", 0.25: "0.25", 0.5: "0.5", 0.75: "0.75", 1: "the other"}
    return _losses(landscape.between, names, ticks, "from one branch to the other")


@styled
def loss_around(landscape: LandscapeRecord) -> "Figure":
    """The held-out loss by the distance from the merged student: along the round's update D and in random directions.

    >>> loss_around(consensus("runs/quickstart").landscape)  # doctest: +SKIP
    <Figure size 480x319 with 1 Axes>
    """
    lines = (landscape.update, *landscape.random)
    ticks = {-1: "-1\nround's start", -0.5: "-0.5", 0: "0\nmerged", 0.5: "0.5", 1: "1\ntwice D"}
    return _losses(lines, [line.name for line in lines], ticks, "distance from the merged student in |D|")


def layers_in_order(rounds: Sequence[RoundRecord]) -> list[str]:
    """The layers of all rounds, by number where they have one: 2 before 10."""
    names = {layer for r in rounds for layer in r.layers}
    return sorted(names, key=lambda n: [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in n.split(".")])


def mean_agreement(fold: FoldRecord | None, what: Literal["cosine", "sign conflict"]) -> float | None:
    """The mean cosine of every two updates, or the share of entries in conflict of sign; None where there are none."""
    if fold is None:
        return None
    if what == "sign conflict":
        return fold.sign_conflict
    pairs = [fold.cosine[i][j] for i in range(len(fold.cosine)) for j in range(i)]
    return math.fsum(pairs) / len(pairs) if pairs else None


def _losses(lines: Sequence[LossLine], names: Sequence[str], ticks: Mapping[float, str], across: str) -> "Figure":
    figure, axes = blank(2.8)
    for i, (line, name) in enumerate(zip(lines, names, strict=True)):
        axes.plot(line.at, line.losses, label=name, **_look(i))
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_xticks([*ticks], [*ticks.values()])
    axes.set_xlabel(across)
    legend(figure)
    return figure


def _look(i: int) -> dict[str, Any]:
    return {"marker": MARKS[i % len(MARKS)], "ls": DASHES[i % len(DASHES)], "color": color_of(i)}


def _rounds(axes: Any, last: int) -> None:
    ticks = range(0, last + 1, math.ceil((last + 1) / 8))
    axes.set_xticks(ticks, ["base" if t == 0 else str(t) for t in ticks])
    axes.set_xlim(-0.5, last + 0.5)
    axes.set_xlabel("round")
