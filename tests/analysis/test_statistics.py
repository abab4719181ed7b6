"""Intervals and tests against scipy's, adjustments against one worked by hand, and what few values cannot say."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mot_lora.analysis.statistics import FLIPS, estimate, holm, over_questions, paired, sign_flip

# shares of right answers of 400, with some spread
SCORES = st.lists(st.integers(0, 400), min_size=2, max_size=8).filter(lambda xs: len(set(xs)) > 1)
PAIRS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=2, max_size=8)


def shares(counts: list[int]) -> list[float]:
    return [c / 400 for c in counts]


@given(SCORES)
def test_the_estimate_is_scipy_s(counts: list[int]) -> None:
    values = shares(counts)
    found = estimate(values)
    assert found is not None
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    assert found.interval == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.95))


@given(PAIRS.filter(lambda pairs: len({a - b for a, b in pairs}) > 1))
def test_the_paired_test_is_scipy_s(pairs: list[tuple[int, int]]) -> None:
    a, b = (shares(list(side)) for side in zip(*pairs, strict=True))
    found, expected = paired(a, b), stats.ttest_rel(a, b)
    assert found is not None
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b), abs=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.interval == pytest.approx(expected.confidence_interval(0.95), abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("shift", [0.0, 0.01, 0.1])
def test_the_sign_flips_are_scipy_s_permutations(n: int, shift: float) -> None:
    draw = random.Random(n)
    a = [round(draw.gauss(0.3 + shift, 0.03), 2) for _ in range(n)]  # rounded, so that there are ties
    b = [round(draw.gauss(0.3, 0.03), 2) for _ in range(n)]

    def mean_difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(x - y, axis=axis)

    expected = stats.permutation_test((a, b), mean_difference, permutation_type="samples", n_resamples=np.inf)
    found = paired(a, b)
    assert found is not None
    assert found.sign_flip == pytest.approx(expected.pvalue)


def test_sign_flips_have_a_floor_and_a_limit() -> None:
    assert sign_flip([0.1, 0.2, 0.3, 0.4, 0.5]) == 0.0625
    assert sign_flip([0.1] * FLIPS) == 2 / 2**FLIPS
    assert sign_flip([0.1] * (FLIPS + 1)) is None
    assert sign_flip([]) is None
    assert sign_flip([0.3, -0.1, -0.2]) == 1  # 0.3 - 0.1 - 0.2 is 5e-17 in floating point


def test_one_value_has_no_spread_and_none_is_nothing() -> None:
    one, pair = estimate([0.3]), paired([0.5], [0.2])
    assert one is not None
    assert (one.n, one.mean, one.sd, one.interval) == (1, 0.3, None, None)
    assert pair is not None
    assert (pair.mean, pair.interval, pair.p, pair.sign_flip) == (0.3, None, None, None)
    assert estimate([]) is None
    assert paired([], []) is None


def test_values_all_alike_promise_no_certainty() -> None:
    alike = estimate([0.1 + 0.2, 0.3, 0.3])  # the first is 5e-17 more
    assert alike is not None
    assert (alike.sd, alike.interval) == (0, None)
    shifted = paired([0.35, 0.37, 0.40], [0.33, 0.35, 0.38])
    assert shifted is not None
    assert shifted.mean == pytest.approx(0.02)
    assert (shifted.interval, shifted.p, shifted.sign_flip) == (None, None, 0.25)


def test_identical_arms_differ_by_nothing() -> None:
    same = paired([0.1 + 0.2, 0.5, 0.7], [0.3, 0.5, 0.7])
    assert same is not None
    assert (same.mean, same.sd, same.interval, same.p, same.sign_flip) == (0, 0, None, 1, 1)


def test_what_is_not_finite_has_no_interval() -> None:
    astray = paired([math.inf, 2.0, 2.1], [1.0, 1.9, 1.8])
    assert astray is not None
    assert (astray.mean, astray.interval, astray.p, astray.sign_flip) == (math.inf, None, None, None)


def test_pairs_come_in_twos() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired([0.1, 0.2], [0.1])


def test_over_questions_seeds_are_averaged_first() -> None:
    draw = random.Random(1)
    a = [[float(draw.random() < 0.6) for _ in range(50)] for _ in range(3)]
    b = [[float(draw.random() < 0.4) for _ in range(50)] for _ in range(2)]
    expected = stats.ttest_rel(np.mean(a, axis=0), np.mean(b, axis=0))
    found = over_questions(a, b)
    assert found is not None
    assert found.n == 50
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert found.interval == pytest.approx(expected.confidence_interval(0.95))


def test_over_questions_only_the_same_questions_are_compared() -> None:
    assert over_questions([[1, 0]], [[1, 0, 1]]) is None
    assert over_questions([[1, 0], [1]], [[1, 0]]) is None
    assert over_questions([], [[1, 0]]) is None
    assert over_questions([[]], [[]]) is None


def test_holm_by_hand() -> None:
    # 4 * .005, 3 * .01, 2 * .03, then .04 lifted to what came before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, None, 0.5]) == (1, None, 1)
    assert holm([]) == ()


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_lifts_and_keeps_the_order(ps: list[float]) -> None:
    adjusted = [p for p in holm(ps) if p is not None]
    assert len(adjusted) == len(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, adjusted, strict=True))
    ordered = [q for _, q in sorted(zip(ps, adjusted, strict=True))]
    assert ordered == sorted(ordered)
    if ps:
        assert min(adjusted) == pytest.approx(min(1, len(ps) * min(ps)))


@given(PAIRS, st.integers(-50, 50))
def test_a_shift_of_both_leaves_the_difference(pairs: list[tuple[int, int]], shift: int) -> None:
    (a, b), moved = zip(*pairs, strict=True), [(x + shift, y + shift) for x, y in pairs]
    c, d = zip(*moved, strict=True)
    before, after = paired(a, b), paired(c, d)
    assert before == after


@given(PAIRS)
def test_swapped_arms_flip_the_sign(pairs: list[tuple[int, int]]) -> None:
    a, b = zip(*pairs, strict=True)
    there, back = paired(a, b), paired(b, a)
    assert there is not None
    assert back is not None
    assert there.mean == -back.mean
    assert (there.sd, there.p, there.sign_flip) == (back.sd, back.p, back.sign_flip)
    if there.interval and back.interval:
        assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]))
