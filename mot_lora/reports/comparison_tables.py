"""A comparison as rows of text, for a terminal and for a page alike."""

from collections.abc import Sequence
from typing import get_args

from mot_lora.analysis.comparison import ArmSummary, BudgetSummary, Comparison, Reference
from mot_lora.analysis.statistics import Estimate
from mot_lora.analysis.wording import BUDGETS, Metric, label, number, p_value, signed
from mot_lora.reports.grid import Grid, Row

ROUNDS = 8  # columns of a table by round
SETS = 3  # columns of a table of forgetting


def grids(comparison: Comparison) -> list[Grid]:
    """All tables of a comparison, budget by budget: results, differences, rounds, forgetting, costs.

    >>> from mot_lora.analysis.comparison import ArmRun, summarize
    >>> runs = [ArmRun(arm="mtd", budgets=("steps",), seed=s, accuracy=(0.2, 0.3)) for s in (0, 1)]
    >>> [grid.title for grid in grids(summarize(runs))][0]
    'accuracy, the same steps per branch'
    """
    out: list[Grid] = []
    for budget in comparison.budgets:
        out.append(results(budget, comparison.metric))
        out += [g for to in get_args(Reference) if (g := differences(budget, to, comparison.metric))]
        by_round = rounds(budget, comparison.metric)
        out += [*([by_round] if by_round else []), *forgetting(budget, comparison.metric), costs(budget)]
    return out


def results(budget: BudgetSummary, metric: Metric) -> Grid:
    """The last students' scores by arm: mean, deviation and interval over seeds, lowest point, held-out loss."""
    lost = metric == "accuracy" and any(a.loss for a in budget.arms)
    rows = [
        Row(
            label(a.arm) + (" (best STD)" if a.arm == budget.best_std else ""),
            (
                str(len(a.seeds)),
                _number(a.score, metric),
                "-" if a.score is None or a.score.sd is None else number(a.score.sd, metric),
                _interval(a.score, metric),
                _number(a.lowest, metric),
                *([_number(a.loss, "loss")] if lost else []),
            ),
        )
        for a in budget.arms
    ]
    score, low = ("accuracy, %", "lowest") if metric == "accuracy" else ("held-out loss", "highest")
    columns = (
        "arm",
        "seeds",
        score,
        "sd",
        "95 % interval",
        f"{low}\non the way",
        *(["held-out\nloss"] if lost else []),
    )
    return Grid(f"{_what(metric)}, {BUDGETS[budget.budget]}", columns, tuple(rows))


def differences(budget: BudgetSummary, reference: Reference, metric: Metric) -> Grid | None:
    """The arms minus the best STD, or minus MTD: intervals over seeds and over questions, p of the tests."""
    to = budget.reference(reference)
    found = [(a, d) for a in budget.arms if (d := a.to(reference))]
    if to is None or not found:
        return None
    rows = [
        Row(
            label(a.arm),
            (
                str(d.seeds.n),
                signed(d.seeds.mean, metric),
                _interval(d.seeds, metric, signs=True),
                _interval(d.questions, metric, signs=True),
                p_value(d.seeds.p),
                p_value(d.holm),
                p_value(d.seeds.sign_flip),
            ),
        )
        for a, d in found
    ]
    columns = ("arm minus it", "seeds", "mean", "95 %,\nseeds", "95 %,\nquestions", "p", "p,\nHolm", "sign\nflip")
    points = "points of accuracy" if metric == "accuracy" else "nats of held-out loss"
    best = "the best STD, " if reference == "std" else ""
    return Grid(f"difference to {best}{label(to)}: {points}, {BUDGETS[budget.budget]}", columns, tuple(rows))


def rounds(budget: BudgetSummary, metric: Metric) -> Grid | None:
    """Mean scores before training and after each round; of many rounds some, the last one always."""
    last = max((len(a.by_round) - 1 for a in budget.arms), default=0)
    if last < 1:
        return None
    every = -(-last // ROUNDS)
    shown = sorted({0, last, *range(last, 0, -every)})
    rows = [
        Row(label(a.arm), tuple(number(a.by_round[i].mean, metric) if i < len(a.by_round) else "" for i in shown))
        for a in budget.arms
        if a.by_round
    ]
    columns = ("arm", *("before" if i == 0 else f"round {i}" for i in shown))
    return Grid(f"{_what(metric)} by round, {BUDGETS[budget.budget]}", columns, tuple(rows))


def forgetting(budget: BudgetSummary, metric: Metric) -> list[Grid]:
    """The gain, and beside it the change of accuracy on other sets of tasks, last minus before; three sets a table."""
    sets = forgetting_sets(budget.arms)
    measured = [a for a in budget.arms if a.forgetting]
    title = f"gain, and change on other tasks in points, 95 % interval over seeds, {BUDGETS[budget.budget]}"
    out: list[Grid] = []
    for shown in (sets[i : i + SETS] for i in range(0, len(sets), SETS)):
        rows = [
            Row(label(a.arm), (_change(a.gain, metric), *(_change(a.forgetting.get(s), "accuracy") for s in shown)))
            for a in measured
        ]
        out.append(Grid(title, ("arm", "gain" if metric == "accuracy" else "gain in loss", *shown), tuple(rows)))
    return out


def forgetting_sets(arms: Sequence[ArmSummary]) -> list[str]:
    """The other sets that any arm was measured on."""
    return list(dict.fromkeys(name for a in arms for name in a.forgetting))


def costs(budget: BudgetSummary) -> Grid:
    """What one seed of each arm took."""
    rows = [Row(label(a.arm), (f"{a.branch_steps:,.0f}", f"{a.tokens:,.0f}", f"{a.seconds:,.0f}")) for a in budget.arms]
    columns = ("arm", "branch-steps in all", "tokens trained", "seconds")
    return Grid(f"cost of one seed, {BUDGETS[budget.budget]}", columns, tuple(rows))


def _what(metric: Metric) -> str:
    return "accuracy" if metric == "accuracy" else "held-out loss"


def _number(found: Estimate | None, metric: Metric) -> str:
    return "-" if found is None else number(found.mean, metric)


def _interval(found: Estimate | None, metric: Metric, signs: bool = False) -> str:
    if found is None or found.interval is None:
        return "-"
    low, high = ((signed if signs else number)(x, metric) for x in found.interval)
    return f"{low} to {high}"


def _change(found: Estimate | None, metric: Metric) -> str:
    if found is None:
        return "-"
    interval = _interval(found, metric, signs=True)
    return signed(found.mean, metric) + ("" if interval == "-" else f" ({interval})")
