"""The findings of a comparison as sentences, made from its numbers whatever they show."""

from collections.abc import Sequence
from typing import Literal, get_args

from mot_lora.analysis.comparison import BudgetSummary, Comparison, Difference, Reference
from mot_lora.analysis.wording import BUDGETS, Metric, label, listed, number, signed, unit

Verdict = Literal["better", "worse", "open"]


def verdict(difference: Difference, metric: Metric) -> Verdict:
    """Whether the 95 % interval over seeds excludes 0, and on which side; `open` too where there is none.

    >>> from mot_lora.analysis.statistics import Paired
    >>> verdict(Difference(to="mtd", seeds=Paired(n=3, mean=0.2, interval=(0.1, 0.3))), "loss")
    'worse'
    """
    if difference.seeds.interval is None:
        return "open"
    low, high = difference.seeds.interval
    if low <= 0 <= high:
        return "open"
    return "better" if (low > 0) == (metric == "accuracy") else "worse"


def findings(comparison: Comparison) -> list[str]:
    """Three paragraphs a budget: the range of scores; then, against the best STD and against MTD, which arms are
    better, worse or indistinguishable, and how wide the intervals are.

    >>> from mot_lora.analysis.comparison import summarize
    >>> findings(summarize([]))
    []
    """
    return [text for budget in comparison.budgets for text in _paragraphs(budget, comparison.metric)]


def _paragraphs(budget: BudgetSummary, metric: Metric) -> list[str]:
    known = [(a, a.score) for a in budget.arms if a.score]
    lead = f"With {BUDGETS[budget.budget]}"
    if not known:
        return [f"{lead}, nothing was measured."]
    ranked = sorted(known, key=lambda k: k[1].mean)
    of = "\N{NO-BREAK SPACE}%" if metric == "accuracy" else " nats"
    ends = [f"{number(s.mean, metric)}{of} ({label(a.arm)})" for a, s in (ranked[0], ranked[-1])]
    spread = f"the means over seeds go from {ends[0]} to {ends[1]}" if len(known) > 1 else f"there is {ends[0]} alone"
    return [f"{lead}, {spread}.", *(f"{lead}, {_against(budget, to, metric)}" for to in get_args(Reference))]


def _against(budget: BudgetSummary, reference: Reference, metric: Metric) -> str:
    to = budget.reference(reference)
    if to is None:
        return f"no {'single teacher' if reference == 'std' else 'union (MTD)'} was run to compare with."
    name = f"the best STD ({label(to)})" if reference == "std" else label(to)
    differences = [(label(a.arm), d) for a in budget.arms if (d := a.to(reference))]
    if not differences:
        return f"no other arm shares a seed with {name}."
    better, worse, unclear = (
        [pair for pair in differences if verdict(pair[1], metric) == v] for v in ("better", "worse", "open")
    )
    texts = [f"judged by 95 % intervals over seeds that exclude 0, better than {name}: {_changes(better, metric)}; "
             f"worse: {_changes(worse, metric)}."]  # fmt: skip
    if clear := better + worse:
        kept = [arm for arm, d in clear if d.holm is not None and d.holm < 0.05]
        tests = sum(d.holm is not None for _, d in differences)
        texts.append(f"After Holm's adjustment for {tests} arms p is below 0.05 for {_which(kept, clear)}.")
        if any(d.questions and d.questions.interval for _, d in clear):
            held = [arm for arm, d in clear if _holds(d)]
            texts.append(f"The interval over questions says the same for {_which(held, clear)}.")
    if open_ := [arm for arm, d in unclear if d.seeds.interval]:
        texts.append(f"Not distinguishable from {name}: {listed(open_)}.")
    if silent := [arm for arm, d in unclear if not d.seeds.interval]:
        texts.append(f"Without an interval (one seed, or differences all alike): {listed(silent)}.")
    return " ".join(filter(None, [*texts, _widths([d for _, d in differences], metric)]))


def _changes(arms: Sequence[tuple[str, Difference]], metric: Metric) -> str:
    changes = [f"{arm} {signed(d.seeds.mean, metric)}" for arm, d in arms]
    return f"{listed(changes)} {unit(metric)}" if changes else "none"


def _which(arms: list[str], of: Sequence[tuple[str, Difference]]) -> str:
    if len(arms) == len(of):
        return "all of these" if len(of) > 1 else "it too"
    return listed(arms) or "none of these"


def _holds(difference: Difference) -> bool:
    low, high = (difference.questions and difference.questions.interval) or (0.0, 0.0)
    return low > 0 if difference.seeds.mean > 0 else high < 0


def _widths(differences: Sequence[Difference], metric: Metric) -> str:
    halves = sorted((d.seeds.interval[1] - d.seeds.interval[0]) / 2 for d in differences if d.seeds.interval)
    if not halves:
        return ""
    least, most = (number(x, metric) for x in (halves[0], halves[-1]))
    size = least if least == most else f"{least} to {most}"
    return f"The intervals reach {size} {unit(metric)} to either side: a smaller difference could not be seen here."
