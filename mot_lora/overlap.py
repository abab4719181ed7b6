"""Whether a question was seen before: the same text, or a long run of the same words."""

import re
import unicodedata
from collections.abc import Iterable


def normalized(text: str) -> str:
    """A text without what does not tell questions apart: case, width of signs, white space.

    >>> normalized(" How\\nMUCH is 2 \uff0b 2? ")
    'how much is 2 + 2?'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    """Every run of n words of a text; signs of arithmetic are words, punctuation is not.

    >>> grams("2 + 2, then?", 3) == {("2", "+", "2"), ("+", "2", "then")}
    True
    """
    words = re.findall(r"\w+|[^\w\s.,;:!?'\"()]", normalized(text))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


class Overlap:
    """The questions that no trace may be about: those of the evaluation.

    A question overlaps when it is one of them, normalised, or shares a run of n words with one (n = 13 as in GPT-3's
    report, arXiv 2005.14165); n = 0 compares whole questions only.

    >>> "How much is 2+2?" in Overlap(["how much is  2+2?"], 13)
    True
    """

    def __init__(self, questions: Iterable[str], n: int) -> None:
        questions = list(questions)
        self.n = n
        self.whole = {normalized(q) for q in questions}
        self.runs = set[tuple[str, ...]]().union(*(grams(q, n) for q in questions)) if n else set[tuple[str, ...]]()

    def __contains__(self, question: object) -> bool:
        if not isinstance(question, str):
            return False
        return normalized(question) in self.whole or bool(self.n and not self.runs.isdisjoint(grams(question, self.n)))
