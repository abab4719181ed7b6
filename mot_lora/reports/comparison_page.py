"""A comparison as one self-contained page: how it was done, what was found, tables and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from mot_lora.analysis.comparison import BudgetSummary, Comparison, Reference
from mot_lora.analysis.findings import findings
from mot_lora.analysis.statistics import Estimate
from mot_lora.analysis.wording import BUDGETS, label, listed, number, signed, unit
from mot_lora.reports import comparison_charts as charts
from mot_lora.reports.charts import svg
from mot_lora.reports.comparison_tables import Grid, costs, differences, forgetting, forgetting_sets, results, rounds
from mot_lora.reports.html import details, facts, figure, grid, note, page, section, table


def compare_page(comparison: Comparison, name: str = "comparison", settings: Mapping[str, str] | None = None) -> str:
    """The page, as HTML that asks nothing of the network; the same comparison gives the same bytes.

    settings: texts by title (the command, the config, the versions), folded away at the end.

    >>> from mot_lora.analysis.comparison import summarize
    >>> "No run is finished" in compare_page(summarize([]))
    True
    """
    parts = [
        _overview(comparison),
        section("How it was compared", _protocol(comparison)),
        section("What was found", "".join(f"<p>{escape(text)}</p>\n" for text in findings(comparison))
                or note("No run is finished.")),
        section("Scores", _both([_scores(comparison, b) for b in comparison.budgets])),
        section("Differences to the best STD", _both([_differences(comparison, b, "std") for b in comparison.budgets])),
        section("Differences to MTD", _both([_differences(comparison, b, "mtd") for b in comparison.budgets])),
        section("By round", _both([_rounds(comparison, b) for b in comparison.budgets])),
        section("Forgetting", _both([_forgetting(comparison, b) for b in comparison.budgets])),
        section("Cost", _both([Part("", [costs(b)]) for b in comparison.budgets])),
        section("Settings", _settings(settings or {})),
    ]  # fmt: skip
    return page(f"{name}: Merge of Thought compared", "".join(parts))


@dataclass(frozen=True)
class Part:
    """What a section has of one budget: its figures and its tables."""

    figures: str
    grids: Sequence[Grid | None]


def _both(parts: Sequence[Part]) -> str:
    """The budgets' figures beside each other, then their tables."""
    tables = [
        f"<h3>{escape(g.title[:1].upper() + g.title[1:])}</h3>\n"
        + table(g.columns, [("", name, cells) for name, cells in g.rows], g.title)
        for p in parts
        for g in p.grids
        if g
    ]
    return grid("".join(p.figures for p in parts)) + "".join(tables) or note("There is nothing to show.")


def _overview(comparison: Comparison) -> str:
    arms = {a.arm for b in comparison.budgets for a in b.arms}
    return facts({
        "Arms": str(len(arms)),
        "Seeds": ", ".join(map(str, comparison.seeds)),
        "Rounds": str(comparison.rounds) if comparison.rounds else "",
        "Questions": f"{comparison.questions:,} held out" if comparison.questions else "",
        "Measured by": "accuracy" if comparison.metric == "accuracy" else "held-out loss, nats a token",
    })  # fmt: skip


def _protocol(comparison: Comparison) -> str:
    loss = comparison.metric == "loss"
    points = [
        "The stopping rule was fixed beforehand: every arm runs all of its rounds, and the student after the last one "
        "counts. No round is picked as the best of several.",
        "Budgets: with the same steps a branch, an arm of more branches trains more in all; with the same total "
        "branch-steps, no arm trains more than another. " + " ".join(map(_steps, comparison.budgets)),
        "The best STD is the single teacher with the best mean, chosen afterwards on the same questions. That favours "
        "STD: nobody knows beforehand which teacher it is. MTD is one student trained on the union of all teachers.",
        "Scores are means over seeds with the sample standard deviation (sd) and the 95 % interval of Student's t. "
        "Differences are paired: the same seed on both sides, only seeds that both arms have. Their interval and p "
        "over seeds (paired t-test) answer what another seed would give; the interval over questions, of scores "
        "averaged over seeds, answers what other questions of the same kind would give.",
        "p, Holm is adjusted by Holm's step-down method (1979) for the arms of one table. Sign flip is the exact "
        "two-sided permutation test"
        + (f", which cannot go below {2 / 2 ** len(comparison.seeds):.4g} with {len(comparison.seeds)} seeds."
           if len(comparison.seeds) > 1 else "."),
        "A dash is what cannot be said: the interval of one seed, or of seeds that are all alike.",
    ]  # fmt: skip
    if loss:
        points.insert(0, "No accuracy was measured: arms are compared by the held-out loss, and lower is better.")
    points += [text for b in comparison.budgets if (text := _missing(b))]
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in points)}</ul>\n"


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
    return f"Not finished, with {BUDGETS[budget.budget]}: {', '.join(found)}. All figures are of what is there."


def _scores(comparison: Comparison, budget: BudgetSummary) -> Part:
    metric = comparison.metric
    known = [(a, a.score) for a in budget.arms if a.score]
    if not known:
        return Part("", ())
    found = ", ".join(f"{label(a.arm)} {number(s.mean, metric)}{_spoken(s, comparison)}" for a, s in known)
    picture = svg(charts.scores(comparison, budget), f"scores-{budget.budget}", f"Scores by arm: {found}.")
    caption = (
        f"With {BUDGETS[budget.budget]}: mean and 95 % interval over seeds, faint points are single seeds. "
        f"{'Right' if metric == 'accuracy' else 'Left'} is better. "
        "Hollow marks: a noisy teacher was added; half filled: one teacher is there twice."
    )
    return Part(figure(picture, caption), [results(budget, metric)])


def _differences(comparison: Comparison, budget: BudgetSummary, reference: Reference) -> Part:
    metric = comparison.metric
    found = [(a.arm, d.seeds) for a in budget.arms if (d := a.to(reference))]
    if not found:
        return Part("", ())
    told = ", ".join(f"{label(a)} {signed(e.mean, metric)}{_spoken(e, comparison, signs=True)}" for a, e in found)
    to = label(budget.reference(reference) or "")
    picture = svg(
        charts.differences(comparison, budget, reference),
        f"to-{reference}-{budget.budget}",
        f"Differences to {to} in {unit(metric)}: {told}.",
    )
    chosen = ", the best STD, chosen afterwards" if reference == "std" else ""
    caption = (
        f"With {BUDGETS[budget.budget]}: each arm minus {to}{chosen}. "
        f"{'Right' if metric == 'accuracy' else 'Left'} of 0 is better than it. Thick: 95 % interval over seeds; thin, "
        "below: over questions. A line that crosses 0 leaves it open which of the two is better."
    )
    return Part(figure(picture, caption), [differences(budget, reference, metric)])


def _rounds(comparison: Comparison, budget: BudgetSummary) -> Part:
    metric = comparison.metric
    curves = [(a.arm, [number(e.mean, metric) for e in a.by_round]) for a in budget.arms if len(a.by_round) > 1]
    if not curves:
        return Part("", ())
    found = ", ".join(f"{label(arm)} {' '.join(means)}" for arm, means in curves)
    picture = svg(charts.rounds(comparison, budget), f"rounds-{budget.budget}", f"Scores by round: {found}.")
    caption = (
        f"With {BUDGETS[budget.budget]}: mean over seeds with its 95 % interval. Faint lines are the other arms, the "
        "dotted line is the base. An arm of one round takes all of its steps in it."
    )
    return Part(figure(picture, caption), [rounds(budget, metric)])


def _forgetting(comparison: Comparison, budget: BudgetSummary) -> Part:
    gain = "right" if comparison.metric == "accuracy" else "left"
    pictures = ""
    for i, name in enumerate(forgetting_sets(budget.arms)):
        known = [(a.arm, e) for a in budget.arms if (e := a.forgetting.get(name))]
        found = ", ".join(f"{label(arm)} {signed(e.mean, 'accuracy')}" for arm, e in known)
        pictures += figure(
            svg(
                charts.forgetting(comparison, budget, name),
                f"forgetting{i}-{budget.budget}",
                f"Change on {name} in points: {found}.",
            ),
            f"With {BUDGETS[budget.budget]}: change on {name} against the gain, each last minus before, with 95 % "
            f"intervals over seeds. Further {gain} is learnt more, further down is forgotten more.",
        )
    return Part(pictures, forgetting(budget, comparison.metric))


def _spoken(found: Estimate, comparison: Comparison, signs: bool = False) -> str:
    if found.interval is None:
        return ""
    low, high = ((signed if signs else number)(x, comparison.metric) for x in found.interval)
    return f" ({low} to {high})"


def _settings(settings: Mapping[str, str]) -> str:
    return "".join(details(title, f"<pre>{escape(text)}</pre>") for title, text in settings.items()) or note(
        "No settings were recorded."
    )
