"""Display text of a comparison: names of arms, scores, differences, p."""

from typing import Any, Literal

Metric = Literal["accuracy", "loss"]

ARMS = {
    "base": "base",
    "std": "STD",
    "mtd": "MTD (union)",
    "one_shot": "one-shot merge",
    "linear": "MoT linear",
    "ties": "MoT ties",
    "dare_linear": "MoT dare_linear",
    "dare_ties": "MoT dare_ties",
    "validation": "MoT validation-weighted",
    "greedy": "MoT greedy",
    "vote": "vote of the STD students",
}
ADDED = {"noisy": "+ noisy teacher", "repeated": "+ repeated teacher"}
MERGES = ("linear", "ties", "dare_linear", "dare_ties", "validation", "greedy")
BUDGETS = {"steps": "the same steps per branch", "total": "the same total branch-steps"}


def parts(arm: str) -> tuple[str, str, str]:
    """An arm's name split into its kind, its teacher, and an added teacher.

    >>> parts("std:hasty"), parts("linear+noisy")
    (('std', 'hasty', ''), ('linear', '', 'noisy'))
    """
    name, _, added = arm.rpartition("+")
    if not name or added not in ADDED:
        name, added = arm, ""
    kind, colon, teacher = name.partition(":")
    return (kind, teacher, added) if colon and kind == "std" else (name, "", added)


def label(arm: str) -> str:
    """The display name of an arm; an unknown arm keeps its name.

    >>> label("std:steps"), label("mtd+noisy"), label("mine")
    ('STD steps', 'MTD (union) + noisy teacher', 'mine')
    """
    kind, teacher, added = parts(arm)
    return " ".join(filter(None, (ARMS.get(kind, kind), teacher, ADDED.get(added))))


def place(arm: str) -> tuple[Any, ...]:
    """The sort key of an arm: without an added teacher first, then in the order of ARMS, then by name.

    >>> sorted(["vote", "linear+noisy", "mine", "std:b", "base"], key=place)
    ['base', 'std:b', 'vote', 'mine', 'linear+noisy']
    """
    kind, teacher, added = parts(arm)
    known = list(ARMS)
    return (added, known.index(kind) if kind in known else len(known), kind, teacher)


def number(value: float, metric: Metric) -> str:
    """A score: accuracy in %, loss in nats.

    >>> number(0.3456, "accuracy"), number(1.2345, "loss")
    ('34.6', '1.234')
    """
    return f"{100 * value:z.1f}" if metric == "accuracy" else f"{value:z.3f}"


def signed(value: float, metric: Metric) -> str:
    """A difference: in points of accuracy, or in nats.

    >>> signed(0.0213, "accuracy"), signed(-0.00001, "loss")
    ('+2.1', '+0.000')
    """
    return f"{100 * value:+z.1f}" if metric == "accuracy" else f"{value:+z.3f}"


def p_value(p: float | None) -> str:
    """A p, or a dash for None; below a thousandth, `<0.001`.

    >>> p_value(0.0625), p_value(1e-7), p_value(None)
    ('0.062', '<0.001', '-')
    """
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def unit(metric: Metric) -> str:
    """The unit of a difference."""
    return "points" if metric == "accuracy" else "nats"


def listed(names: list[str]) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
