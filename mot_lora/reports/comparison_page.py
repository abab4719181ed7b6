"""A comparison as one self-contained page: how it was done, what was found, tables and figures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mot_lora.analysis.comparison import BudgetSummary, Comparison, Reference
from mot_lora.analysis.findings import findings
from mot_lora.analysis.statistics import Estimate
from mot_lora.analysis.wording import BUDGETS, label, listed, number, signed, unit
from mot_lora.reports import comparison_charts as draw
from mot_lora.reports.comparison_tables import costs, differences, forgetting, forgetting_sets, results, rounds
from mot_lora.reports.figures import svg
from mot_lora.reports.grid import Grid
from mot_lora.reports.html import Figure, render


def compare_page(comparison: Comparison, name: str = "comparison", settings: Mapping[str, str] | None = None) -> str:
    """The page, as HTML that asks nothing of the network; the same comparison gives the same bytes.

    settings: texts by title (the command, the config, the versions), folded away at the end.

    >>> from mot_lora.analysis.comparison import summarize
    >>> "No run is finished" in compare_page(summarize([]))
    True
    """
    seeds, budgets = len(comparison.seeds), comparison.budgets
    return render(
        "comparison.html",
        title=f"{name}: Merge of Thought compared",
        overview=_overview(comparison),
        metric=comparison.metric,
        branch_steps=" ".join(text for b in budgets if (text := _steps(b))),
        seeds=seeds,
        smallest_p=f"{2 / 2**seeds:.4g}" if seeds > 1 else "",
        missing=[text for b in budgets if (text := _missing(b))],
        findings=findings(comparison),
        parts={
            "Scores": _together(_scores(comparison, b) for b in budgets),
            "Differences to the best STD": _together(_differences(comparison, b, "std") for b in budgets),
            "Differences to MTD": _together(_differences(comparison, b, "mtd") for b in budgets),
            "By round": _together(_rounds(comparison, b) for b in budgets),
            "Forgetting": _together(_forgetting(comparison, b) for b in budgets),
            "Cost": Part(grids=[costs(b) for b in budgets]),
        },
        settings=settings or {},
    )


@dataclass(frozen=True)
class Part:
    """What a section has to show: its figures, then its tables."""

    figures: Sequence[Figure] = ()
    grids: Sequence[Grid | None] = ()


def _together(parts: Iterable[Part]) -> Part:
    """The budgets' figures beside each other, then their tables."""
    known = list(parts)
    return Part([f for p in known for f in p.figures], [g for p in known for g in p.grids if g])


def _overview(comparison: Comparison) -> Mapping[str, str]:
    arms = {a.arm for b in comparison.budgets for a in b.arms}
    return {
        "Arms": str(len(arms)),
        "Seeds": ", ".join(map(str, comparison.seeds)),
        "Rounds": str(comparison.rounds) if comparison.rounds else "",
        "Questions": f"{comparison.questions:,} held out" if comparison.questions else "",
        "Measured by": "accuracy" if comparison.metric == "accuracy" else "held-out loss, nats per token",
    }


def _steps(budget: BudgetSummary) -> str:
    steps = sorted({round(a.branch_steps) for a in budget.arms if a.branch_steps})
    if not steps:
        return ""
    size = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    return f"Branch-steps with {BUDGETS[budget.budget]}: {size} an arm."


def _missing(budget: BudgetSummary) -> str:
    if not budget.missing:
        return ""
    seeds = {arm: [str(s) for a, s in budget.missing if a == arm] for arm, _ in budget.missing}
    found = [f"{label(arm)} ({'seed' if len(s) == 1 else 'seeds'} {listed(s)})" for arm, s in seeds.items()]
    return f"Not finished, with {BUDGETS[budget.budget]}: {', '.join(found)}. All figures are of what was run."


def _scores(comparison: Comparison, budget: BudgetSummary) -> Part:
    metric = comparison.metric
    known = [(a, a.score) for a in budget.arms if a.score]
    if not known:
        return Part()
    found = ", ".join(f"{label(a.arm)} {number(s.mean, metric)}{_spoken(s, comparison)}" for a, s in known)
    picture = svg(draw.scores(comparison, budget), f"scores-{budget.budget}", f"Scores by arm: {found}.")
    caption = (
        f"With {BUDGETS[budget.budget]}: mean and 95 % interval over seeds, faint points are single seeds. "
        f"{'Right' if metric == 'accuracy' else 'Left'} is better. "
        "Hollow marks: a noisy teacher was added; half filled: one teacher is there twice."
    )
    return Part([Figure(picture, caption)], [results(budget, metric)])


def _differences(comparison: Comparison, budget: BudgetSummary, reference: Reference) -> Part:
    metric = comparison.metric
    found = [(a.arm, d.seeds) for a in budget.arms if (d := a.to(reference))]
    if not found:
        return Part()
    spoken = ", ".join(f"{label(a)} {signed(e.mean, metric)}{_spoken(e, comparison, signs=True)}" for a, e in found)
    to = label(budget.reference(reference) or "")
    picture = svg(
        draw.differences(comparison, budget, reference),
        f"to-{reference}-{budget.budget}",
        f"Differences to {to} in {unit(metric)}: {spoken}.",
    )
    chosen = ", the best STD, chosen afterwards" if reference == "std" else ""
    caption = (
        f"With {BUDGETS[budget.budget]}: each arm minus {to}{chosen}. "
        f"{'Right' if metric == 'accuracy' else 'Left'} of 0 is better than it. Thick: 95 % interval over seeds; thin, "
        "below: over questions. A line that crosses 0 leaves it open which of the two is better."
    )
    return Part([Figure(picture, caption)], [differences(budget, reference, metric)])


def _rounds(comparison: Comparison, budget: BudgetSummary) -> Part:
    metric = comparison.metric
    curves = [(a.arm, [number(e.mean, metric) for e in a.by_round]) for a in budget.arms if len(a.by_round) > 1]
    if not curves:
        return Part()
    found = ", ".join(f"{label(arm)} {' '.join(means)}" for arm, means in curves)
    picture = svg(draw.rounds(comparison, budget), f"rounds-{budget.budget}", f"Scores by round: {found}.")
    caption = (
        f"With {BUDGETS[budget.budget]}: mean over seeds with its 95 % interval. Faint lines are the other arms, the "
        "dotted line is the base. An arm of one round takes all of its steps in it."
    )
    return Part([Figure(picture, caption)], [rounds(budget, metric)])


def _forgetting(comparison: Comparison, budget: BudgetSummary) -> Part:
    gain = "right" if comparison.metric == "accuracy" else "left"
    pictures: list[Figure] = []
    for i, name in enumerate(forgetting_sets(budget.arms)):
        known = [(a.arm, e) for a in budget.arms if (e := a.forgetting.get(name))]
        found = ", ".join(f"{label(arm)} {signed(e.mean, 'accuracy')}" for arm, e in known)
        picture = svg(
            draw.forgetting(comparison, budget, name),
            f"forgetting{i}-{budget.budget}",
            f"Change on {name} in points: {found}.",
        )
        caption = (
            f"With {BUDGETS[budget.budget]}: change on {name} against the gain, each last minus before, with 95 % "
            f"intervals over seeds. Further {gain} means more was learned, further down more was forgotten."
        )
        pictures.append(Figure(picture, caption))
    return Part(pictures, forgetting(budget, comparison.metric))


def _spoken(found: Estimate, comparison: Comparison, signs: bool = False) -> str:
    if found.interval is None:
        return ""
    low, high = ((signed if signs else number)(x, comparison.metric) for x in found.interval)
    return f" ({low} to {high})"
