"""Whether an answer is right, and how certain a mean of scores is."""

import math
import re
from collections.abc import Sequence

from mot_lora.data.answers import boxed, decided
from mot_lora.data.expressions import expression
from mot_lora.data.judge import equal
from mot_lora.data.letters import chosen, labelled, several_letters
from mot_lora.data.moments import moment, same_moment
from mot_lora.data.notation import FUNCTIONS, bare
from mot_lora.data.quantities import Quantity, quantities, same_quantity
from mot_lora.data.reasoning import THINK, THINK_END, to_think
from mot_lora.data.units import Unit, unit
from mot_lora.data.words import says, worded
from mot_lora.errors import UserError


def final_answer(text: str) -> str | None:
    """What stands after the chain of thought; None when the chain was never closed.

    A text that opens no <think> is an answer as a whole.

    >>> final_answer("<think>2 + 2 = 4</think> 4")
    '4'
    """
    text = to_think(text)
    if THINK_END in text:
        return text.rsplit(THINK_END, 1)[1].strip()
    return None if THINK in text else text.strip()


def is_right(text: str, gold: str | Sequence[str]) -> bool:
    r"""Whether a generated text ends in an answer that equals `gold`, or one of several right ones.

    Numbers compare exactly, with their units; choices by their letter, words as words, all else by math-verify: 0.5
    equals \frac{1}{2}. What takes more than a few seconds to compare counts as wrong.

    Errors: UserError when math-verify is needed and cannot be loaded.

    >>> is_right("<think>half of one</think> \\boxed{\\frac{1}{2}}", "0.5")
    True
    """
    answer = final_answer(text)
    return bool(answer) and any(_gives(answer, right) for right in ([gold] if isinstance(gold, str) else gold))


def _gives(answer: str, gold: str) -> bool:
    if answer.strip().casefold() == gold.strip().casefold():
        return True
    right = bare(decided(gold) or gold)
    if letters := several_letters(right):
        return letters == several_letters(bare(decided(answer) or answer))
    if not worded(right):
        right = expression(gold)
    if label := labelled(right):
        letter = chosen(answer)
        if letter or not label[1]:
            return letter == label[0]
        right = label[1]
    if worded(right):
        return says(answer, right)
    given = expression(answer)
    if label := labelled(given):
        given = label[1] or given
    if "." in given:
        right = _ZERO_COMMA.sub(r"\1.", right)
    elif "." in right:
        given = (_ZERO_COMMA if boxed(answer) else _DECIMAL_COMMA).sub(r"\1.", given)
    return bool(given) and same(right, given)


_ZERO_COMMA = re.compile(r"^(-?0),(?=\d{2,}$)")
_DECIMAL_COMMA = re.compile(r"^([^\d,]*(?:0|\d+(?!,\d{3}(?!\d)))),(?=\d+[^\d,]*$)")
_EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)")
_IN_BASE = re.compile(r"[0-9A-Za-z]+_\{?([2-9]|[12]\d|3[0-6])\}?")


def same(gold: str, answer: str) -> bool:
    r"""Whether two expressions are the same: as texts, as quantities, dates or lists of them, or else by math-verify.

    >>> same("1,234", "1234.0"), same("x = 5", "5"), same("2, 3", "3 and 2"), same("12 cm", "12 m")
    (True, True, True, False)
    """
    ways = [re.split(r"\\approx(?![A-Za-z])", x) for x in (gold, answer)]  # 1/3 \approx 0.33 says both
    ways = [[x.strip() for x in way] for way in ways]
    if len(ways[0]) == len(ways[1]):
        return all(map(_same, *ways))
    return any(_same(g, a) for g in ways[0] for a in ways[1])


def _same(gold: str, answer: str) -> bool:
    if _tight(gold) == _tight(answer):
        return bool(gold)
    times = [m for m in (moment(gold), moment(answer)) if m]
    if len(times) == 2:
        return same_moment(*times)
    if any(m[0] != "ratio" for m in times) or worded(gold) or worded(answer):
        return False
    bases = [m[1] for m in map(_IN_BASE.fullmatch, (gold, answer)) if m]
    if bases:  # who leaves the base out leaves it to the question
        return len(set(bases)) == 1 and gold.partition("_")[0] == answer.partition("_")[0]
    names = {_EQUALS.split(x)[0].strip() for x in (gold, answer) if _EQUALS.search(x)}
    if len(names) < 2 and (right := _numbers(gold)) and (given := _numbers(answer)):
        return (not _is_condition(gold) or bool(_EQUALS.search(answer))) and _same_numbers(right, given)
    if len(names) == 2 and all(re.fullmatch(r"[A-Za-z]\w*\([^()]*\)", name) for name in names):
        return False  # f(2) and f(3) may both be 5
    (gold, measure), (answer, other) = _measured(gold), _measured(answer)
    if measure and other and measure != other:
        return False
    # of two numbers in a row LaTeX makes one
    return not any(re.search(r"\d\s+\d", x) for x in (gold, answer)) and equal(gold, answer)


def _is_condition(text: str) -> bool:
    """Whether an equation is a condition on its unknowns, as 2x + z = 1 is; m + n = 1 says what a sum comes to."""
    left = re.sub(r"_\{?\w+\}?", "", _EQUALS.split(text)[0]) if _EQUALS.search(text) else ""
    return bool(re.search(r"[A-Za-z]", left) and re.search(r"\d", left))


def _tight(text: str) -> str:
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)


def _numbers(text: str) -> list[Quantity]:
    """The quantities that a text lists, or what an equation comes to; none where it is anything else."""
    return quantities(text if re.search(r"[,;&]|\band\b|\bor\b", text) else _EQUALS.split(text)[-1].strip())


def _same_numbers(gold: Sequence[Quantity], answer: Sequence[Quantity]) -> bool:
    left = list(answer)
    for g in gold:
        # 3 red and 2 blue are not 2 red and 3 blue; one number's noun is the question's
        alike = (a for a in left if same_quantity(g, a) and (len(gold) == 1 or not g.noun or a.noun in ("", g.noun)))
        found = next(alike, None)
        if not found:
            return False
        left.remove(found)
    return not left


def _measured(text: str) -> tuple[str, Unit | None]:
    """A formula without the unit or the noun behind it, and the unit where it is known."""
    m = re.fullmatch(r"(.*[\d})\]]|.*\\pi)\s+((?:[a-z]+\s+)?[A-Za-z]{2,}(?:\s*\^\s*\{?\d\}?)?)", text, re.DOTALL)
    return (m[1], unit(m[2])) if m and m[2].split()[0] not in FUNCTIONS else (text, None)


def elected(texts: Sequence[str]) -> str:
    """The text whose final answer most of the texts share, compared as in `is_right`; of a tie, the first.

    A text without a final answer does not vote (self-consistency, arXiv 2203.11171).

    >>> elected(["7", "0.5", "1/2"])
    '0.5'
    """
    groups: list[list[str]] = []
    for text in texts:
        if final_answer(text):
            same = next((g for g in groups if is_right(text, final_answer(g[0]) or "")), None)
            if same:
                same.append(text)
            else:
                groups.append([text])
    return max(groups, key=len)[0] if groups else texts[0]


def wilson(mean: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a mean of n scores in [0, 1]; z = 1.96 gives 95 %.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). For fractional scores (avg@n), which
    scipy.stats.binomtest does not take, it is conservative.

    Errors: UserError for n < 1.

    >>> [round(x, 3) for x in wilson(0.5, 100)]
    [0.404, 0.596]
    """
    if n < 1:
        raise UserError("an interval needs at least one score")
    centre, half = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def mean_score(scores: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean of the questions' scores and its 95 % interval.

    >>> mean_score([1, 0, 1, 0])[0]
    0.5
    """
    mean = sum(scores) / len(scores) if scores else 0.0
    return mean, wilson(mean, len(scores))
