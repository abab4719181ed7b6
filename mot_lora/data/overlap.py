"""Whether a question was seen before: the same text, or a long run of the same words.

datasketch and the like estimate how much whole texts have in common; here a shared run of words is found exactly, also
in scripts without blanks.
"""

import re
import unicodedata
from collections.abc import Iterable


def normalized(text: str) -> str:
    """A text without differences that do not matter: case, width of signs, white space.

    >>> normalized(" How\\nMUCH is 2 \uff0b 2? ")
    'how much is 2 + 2?'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# scripts without blanks: two signs of Chinese or Japanese are as a word, three of Thai, Lao, Khmer or Burmese with
# the marks above and below them
HAN = "[\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
THAI = "[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff]"
WORDS = re.compile(
    rf"({HAN})|({THAI}[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ece\u102b-\u103e\u17b6-\u17d3]*)|"
    rf"(?:(?!{HAN}|{THAI})\w)+|[^\w\s.,;:!?'\"()\u3001\u3002]"
)


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    """Every run of n words of a text; signs of arithmetic are words, punctuation is not.

    Where words are not set apart by blanks, a run has as many signs as weigh n words.

    >>> grams("2 + 2, then?", 3) == {("2", "+", "2"), ("+", "2", "then")}
    True
    >>> grams("\u5c0f\u660e\u67093", 2) == {("\u5c0f", "\u660e", "\u6709", "3"), ("\u660e", "\u6709", "3")}
    True
    """
    found = [*WORDS.finditer(normalized(text))]
    words = [m[0] for m in found]
    sixths = [3 if m[1] else 2 if m[2] else 6 for m in found]
    runs: set[tuple[str, ...]] = set() if n else {()}
    end = weight = 0
    for begin, own in enumerate(sixths):
        while weight < 6 * n and end < len(words):
            weight, end = weight + sixths[end], end + 1
        if weight < 6 * n:
            break
        runs.add(tuple(words[begin:end]))
        weight -= own
    return runs


class Overlap:
    """The questions of the evaluation, which no trace may be about.

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
