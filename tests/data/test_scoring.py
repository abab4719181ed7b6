"""Which answers count as right, and how sure a mean is."""

import logging
import threading

import pytest
import torch

from mot_lora.data.scoring import final_answer, is_right, mean_score, wilson
from mot_lora.errors import UserError

RIGHT = [
    ("42", "42"),
    ("The answer is 42.", "42"),
    ("<think>6 * 7</think> 42", "42"),
    ("<think>41? no</think>\n\nThe answer is \\boxed{42}.", "42"),
    ("<think>a</think> 41 <think>b</think> 42", "42"),
    ("6 * 7 = 42", "42"),
    ("42.0", "42"),
    ("answer: 3.50", "3.5"),
    ("-7", "-7"),
    ("\\boxed{-\\frac{3}{4}}", "-0.75"),
    ("\\boxed{\\frac{1}{2}}", "0.5"),
    ("$\\frac12$", "1/2"),
    ("1/2", "0.5"),
    ("0.5", "1/2"),
    ("0.5", "\\frac{1}{2}"),
    ("1,234", "1234"),
    ("1234", "1,234"),
    ("The total is $1,234.50", "1234.5"),
    ("5 apples", "5"),
    ("\\boxed{5\\text{ cm}}", "5"),
    ("5 cm", "5 cm"),
    ("$x = 3$", "3"),
    ("\\boxed{(1,2)}", "(1,2)"),
    ("$\\{2,1\\}$", "\\{1,2\\}"),
    ("$x^2+2x+1$", "$(x+1)^2$"),
    ("\\boxed{x^2+2x+1}", "(x+1)^2"),
    ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}"),
    # gold answers in bare LaTeX that begin with a number, as the MATH data set has them
    ("\\boxed{2\\sqrt{3}}", "2\\sqrt{3}"),
    ("\\boxed{3x+2}", "3x+2"),
    ("\\boxed{2\\pi}", "2\\pi"),
    ("\\boxed{1024}", "2^{10}"),
    ("\\boxed{A}", "A"),
    # GSM8K's mark
    ("12", "#### 12"),
    ("1/2", "#### 0.5"),
    # a worked solution, as NuminaMath and s1K have it beside the teacher's
    ("so 42\n</think>\n\nThe answer is 42.", "Since $6 \\cdot 7 = 42$, it is \\boxed{42}."),
    ("The answer is 128", "The answer is $128$."),
    # words, which are no mathematics
    ("<think>hm</think> YES", "yes"),
    ("Stra\u00dfe", "STRASSE"),
]
WRONG = [
    ("41", "42"),
    ("", "42"),
    ("   ", "42"),
    ("hello", "42"),
    ("<think>42", "42"),
    ("<think>so \\boxed{42}", "42"),
    ("</think>", "42"),
    ("<think>42</think>", "42"),
    ("<think>42</think> 41", "42"),
    ("7", "-7"),
    ("-7", "7"),
    ("12", "2"),
    ("2", "12"),
    ("1234", "1,235"),
    ("3 + 4 = 7", "3"),
    ("0.333", "1/3"),
    ("3.14", "\\pi"),
    ("\\boxed{(2,1)}", "(1,2)"),
    ("\\boxed{\\frac{2}{1}}", "0.5"),
    ("\\boxed{B}", "A"),
    ("41", "Since $6 \\cdot 7 = 42$, it is \\boxed{42}."),
    ("yes", "no"),
    # only the number that the gold answer begins with
    ("2", "2\\sqrt{3}"),
    ("3", "3x+2"),
    ("2", "2^{10}"),
]


@pytest.mark.parametrize(("text", "gold"), RIGHT)
def test_right_answers(text: str, gold: str) -> None:
    assert is_right(text, gold) is True


@pytest.mark.parametrize(("text", "gold"), WRONG)
def test_wrong_answers(text: str, gold: str) -> None:
    assert is_right(text, gold) is False


ODD = ["$", "$$", "####", "\\boxed{", "\\frac{1}{0}", "1/0", "nan", "9" * 50, "1e999", "\\sqrt{-1}", "\0", "(", "[1,2)"]
ODD += ["\\emptyset", "\u00bd", "\u0663", "<think>", "\ud800", "\n", "{}", "#", "\\"]


@pytest.mark.parametrize("text", ODD)
def test_what_is_no_answer_is_judged_too(text: str) -> None:
    for other in ("42", *ODD):
        assert is_right(text, other) in (True, False)
    assert not is_right(text, "42")
    assert not is_right("42", text)


def test_threads_judge_alike(caplog: pytest.LogCaptureFixture) -> None:
    table = RIGHT + WRONG
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.extend(is_right(t, g) for t, g in table))
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join()
    assert results == [is_right(t, g) for t, g in table]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think> 4 ", "4"),
        ("a</think>4", "4"),
        ("<think>a</think>b</think>c", "c"),
        (" 4\n", "4"),
        ("<think>4", None),
        ("<think>4</think>", ""),
    ],
)
def test_the_answer_stands_after_the_thoughts(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("right", "n", "z", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
        (81, 263, 1.959964, 0.2553, 0.3662),
        (15, 148, 1.959964, 0.0624, 0.1605),
        (0, 20, 1.959964, 0.0000, 0.1611),
        (1, 29, 1.959964, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_intervals(right: int, n: int, z: float, low: float, high: float) -> None:
    assert wilson(right / n, n, z) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize("n", [1, 7, 300])
def test_wilson_stays_within_0_and_1_and_is_symmetric(n: int) -> None:
    for k in range(n + 1):
        low, high = wilson(k / n, n)
        assert 0 <= low < high <= 1
        assert low - 1e-15 <= k / n <= high + 1e-15
        assert wilson(1 - k / n, n) == (pytest.approx(1 - high), pytest.approx(1 - low))


@pytest.mark.parametrize(("p", "n"), [(0.05, 100), (0.3, 50), (0.5, 300), (0.9, 200)])
def test_wilson_covers_as_often_as_it_says(p: float, n: int) -> None:
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    right = torch.binomial(torch.full((draws,), float(n)), torch.full((draws,), p), generator=generator)
    intervals = {k: wilson(k / n, n) for k in right.unique().tolist()}
    covered = sum(intervals[k][0] <= p <= intervals[k][1] for k in right.tolist()) / draws
    # counts are discrete, so coverage swings around 95 % by a point or two
    assert covered == pytest.approx(0.95, abs=0.02)


def test_a_narrower_z_makes_a_narrower_interval() -> None:
    wide, narrow = wilson(0.4, 50), wilson(0.4, 50, z=1.0)
    assert wide[0] < narrow[0] < 0.4 < narrow[1] < wide[1]


@pytest.mark.parametrize("n", [0, -1])
def test_no_scores_have_no_interval(n: int) -> None:
    with pytest.raises(UserError, match="at least one score"):
        wilson(0.5, n)
    with pytest.raises(UserError, match="at least one score"):
        mean_score([])


def test_mean_of_fractional_scores() -> None:
    mean, interval = mean_score([1, 0.5, 0, 0.5])
    assert mean == 0.5
    assert interval == wilson(0.5, 4)
