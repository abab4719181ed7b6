"""How much each teacher's branch counts in a merge, found with questions held out for that."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mot_lora.patterns import PerModule

LEAST = 0.01  # a smaller weight counts as 0


class Weighting(NamedTuple):
    """One weight a branch, and in words why."""

    weights: tuple[PerModule, ...]
    reasons: tuple[str, ...]


def by_accuracy(accuracies: Sequence[float], questions: int) -> Weighting:
    """Weights that fall by e for each standard error that a branch is below the best.

    w_i = exp(-(max a - a_i) / s), s = sqrt(2 p (1 - p) / n) the standard error of a difference of two accuracies, at
    the best one's p = (n max a + 1) / (n + 2); below 0.01 a weight is 0. So branches that n questions cannot tell apart
    count about alike, and one that is clearly worse does not count.

    >>> [round(w, 2) for w in by_accuracy([0.70, 0.66, 0.30], 200).weights]
    [1.0, 0.42, 0.0]
    """
    best = max(accuracies)
    p = (questions * best + 1) / (questions + 2)
    s = math.sqrt(2 * p * (1 - p) / questions)
    weights = [math.exp(-(best - a) / s) for a in accuracies]
    return Weighting(
        tuple(w if w >= LEAST else 0.0 for w in weights),
        tuple(
            f"accuracy {a:.1%}, the best"
            if a == best
            else f"accuracy {a:.1%}, {(best - a) / s:.1f} errors below the best"
            for a in accuracies
        ),
    )


def greedily(accuracies: Sequence[float], measure: Callable[[tuple[int, ...]], float]) -> Weighting:
    """A branch joins the merge only if that does not hurt: greedy soups (arXiv 2203.05482).

    From the best branch down, each is tried beside those that have joined; `measure` gives the accuracy of the merge of
    the branches at these places.

    >>> greedily([0.5, 0.7, 0.1], lambda places: 0.2 if 2 in places else 0.8).weights
    (1.0, 1.0, 0.0)
    """
    first, *others = sorted(range(len(accuracies)), key=lambda i: -accuracies[i])
    joined, best = (first,), accuracies[first]
    reasons = {first: f"accuracy {best:.1%}, the best alone"}
    for i in others:
        tried = tuple(sorted((*joined, i)))
        score = measure(tried)
        if score >= best:
            reasons[i] = f"joined: the merge went from {best:.1%} to {score:.1%}"
            joined, best = tried, score
        else:
            reasons[i] = f"left out: the merge would go from {best:.1%} to {score:.1%}"
    everyone = range(len(accuracies))
    return Weighting(tuple(float(i in joined) for i in everyone), tuple(reasons[i] for i in everyone))
