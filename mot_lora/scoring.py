"""Whether an answer is right, and how sure a mean of right answers is."""

import logging
import math
import re
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from mot_lora.errors import UserError
from mot_lora.thought import THINK_END


def final_answer(text: str) -> str | None:
    """What stands after the chain of thought; None when the chain was never closed.

    A text that opens no <think> is an answer as a whole.

    >>> final_answer("<think>2 + 2 = 4</think> 4")
    '4'
    """
    if THINK_END in text:
        return text.rsplit(THINK_END, 1)[1].strip()
    return None if "<think>" in text else text.strip()


def is_right(text: str, gold: str) -> bool:
    r"""Whether a generated text ends in an answer that equals `gold`, judged by math-verify.

    Numbers, fractions, sets, intervals and LaTeX compare by value: 0.5 equals \frac{1}{2}.

    >>> is_right("<think>half of one</think> \\boxed{\\frac{1}{2}}", "0.5")
    True
    """
    answer = final_answer(text)
    if not answer:
        return False
    if _plain(answer) == _plain(gold):
        return True  # a word, say, which is no mathematics
    import math_verify  # pyright: ignore[reportMissingTypeStubs]  # sympy behind it takes a second to load

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it prints the whole of a text that takes too long

    # its timeouts rest on SIGALRM, which only a main thread has
    limit = 3 if threading.current_thread() is threading.main_thread() else None
    parse = partial(cast("Any", math_verify.parse), parsing_timeout=limit)
    return bool(math_verify.verify(parse(f"${gold}$") or parse(gold), parse(answer), timeout_seconds=limit))


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


def _plain(answer: str) -> str:
    """An answer to compare as a word; of a choice, (B) or B., its letter."""
    choice = re.fullmatch(r"\(?([A-Za-z])[).]?", answer.strip())
    return (choice[1] if choice else answer.strip()).casefold()


def wilson(mean: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a mean of n scores in [0, 1]; z = 1.96 gives 95 %.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). For fractional scores (avg@n) it is conservative.

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
