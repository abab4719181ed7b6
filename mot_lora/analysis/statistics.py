"""Means and paired differences with intervals and tests: Student's t, exact sign flips, Holm's adjustment.

Student's t is scipy.special's. scipy.stats would take a second longer to load, warns if all values are equal, takes
fifty times as long for an exact permutation test, and has no Holm adjustment.
"""

import math
from collections.abc import Sequence

from mot_lora.records import Record

FLIPS = 20  # the most values for an exact test: half a million sums
ROUNDING = 1e-12  # relative; smaller differences are rounding errors


class Estimate(Record):
    """The mean of n values, their sample standard deviation, and the 95 % interval of the mean by Student's t.

    Undefined values are None: the deviation of one value, and the interval of one value or of equal values, whose zero
    width would suggest certainty.
    """

    n: int
    mean: float
    sd: float | None = None
    interval: tuple[float, float] | None = None


class Paired(Estimate):
    """A mean of paired differences, with the two-sided p of the paired t-test and of the exact sign-flip test."""

    p: float | None = None
    sign_flip: float | None = None


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean, sample standard deviation s, and mean +- t(0.975, n - 1) s / sqrt(n); None of nothing.

    >>> estimate([1.0, 2.0, 3.0]).sd
    1.0
    >>> [round(x, 3) for x in estimate([1.0, 2.0, 3.0]).interval]
    [-0.484, 4.484]
    """
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n if all(map(math.isfinite, values)) else sum(values) / n
    if n == 1 or not math.isfinite(mean):
        return Estimate(n=n, mean=mean)
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    if _alike(values):
        return Estimate(n=n, mean=mean, sd=0.0)
    half = _t_quantile(0.975, n - 1) * sd / math.sqrt(n)
    return Estimate(n=n, mean=mean, sd=sd, interval=(mean - half, mean + half))


def paired(a: Sequence[float], b: Sequence[float]) -> Paired | None:
    """The differences a - b, pair by pair: their estimate, the paired t-test and the exact sign-flip test.

    If all differences are 0, p = 1; if they are equal and not 0, the t-test is undefined.

    Errors: ValueError if a and b differ in length.

    >>> d = paired([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])
    >>> round(d.mean, 3), round(d.p, 3), d.sign_flip
    (0.2, 0.074, 0.25)
    """
    differences = [_difference(x, y) for x, y in zip(a, b, strict=True)]
    found = estimate(differences)
    if found is None:
        return None
    p = None
    if found.n > 1 and not any(differences):
        p = 1.0
    elif found.sd:
        p = 2 * _t_below(-abs(found.mean) / (found.sd / math.sqrt(found.n)), found.n - 1)
    flip = sign_flip(differences) if found.n > 1 and math.isfinite(found.mean) else None
    return Paired(**found.model_dump(), p=p, sign_flip=flip)


def sign_flip(differences: Sequence[float]) -> float | None:
    """The exact two-sided p of the sign-flip test: the share of all 2^n sign patterns whose |sum| is at least as large.

    It cannot be below 2 / 2^n: 0.0625 for five pairs. None without differences, or for more than 20.

    >>> sign_flip([1.0, 2.0, 3.0])
    0.25
    """
    if not 0 < len(differences) <= FLIPS:
        return None
    sums = [differences[0]]  # the first keeps its sign: the other half mirrors this one
    for d in differences[1:]:
        sums = [s + d for s in sums] + [s - d for s in sums]
    reach = abs(math.fsum(differences)) - ROUNDING * math.fsum(map(abs, differences))
    return sum(abs(s) >= reach for s in sums) / len(sums)


def over_questions(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Estimate | None:
    """The difference a - b over questions: scores (seeds x questions) are averaged over seeds, then paired.

    `paired` over seeds generalizes to other seeds, this to other questions. None if the numbers of questions differ.

    >>> over_questions([[1, 1, 0], [1, 0, 0]], [[0, 1, 0]]).mean
    0.16666666666666666
    """
    if not a or not b or len({len(scores) for scores in (*a, *b)}) > 1:
        return None
    means = ([math.fsum(question) / len(arm) for question in zip(*arm, strict=True)] for arm in (a, b))
    return estimate([_difference(x, y) for x, y in zip(*means, strict=True)])


def holm(ps: Sequence[float | None]) -> tuple[float | None, ...]:
    """Holm's step-down adjustment (1979): the i-th smallest of m values times m - i + 1, non-decreasing, at most 1.

    None stays None and does not count.

    >>> holm([0.01, 0.04, 0.03, None])
    (0.03, 0.06, 0.06, None)
    """
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    out: list[float | None] = [None] * len(ps)
    highest = 0.0
    for step, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - step) * p))
        out[i] = highest
    return tuple(out)


def _difference(x: float, y: float) -> float:
    return 0.0 if math.isclose(x, y, rel_tol=ROUNDING) else x - y


def _alike(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= 1e-9 * max(map(abs, values))


def _t_quantile(p: float, df: int) -> float:
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]  # a tenth of the time of scipy.stats

    return float(special.stdtrit(df, p))


def _t_below(t: float, df: int) -> float:
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]

    return float(special.stdtr(df, t))
