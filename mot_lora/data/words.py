"""Answers in words: whether a text gives them, and when two are the same."""

import re

from mot_lora.data.answers import DOUBT, SENTENCE_END, decided
from mot_lora.data.moments import moment
from mot_lora.data.notation import FUNCTIONS, bare
from mot_lora.data.quantities import quantity

_TRUTH = {"yes": "yes", "true": "yes", "correct": "yes", "no": "no", "false": "no", "incorrect": "no"}
_COPULA = re.compile(r"(?:\b(?:is|are|was|were|be|equals|called|named|in|on|at|by)\b|'s\b|[:=])(?=([^:=]*)$)")


def worded(text: str) -> bool:
    """Whether an answer is words, and numbers only as a part of a name.

    >>> worded("isosceles triangle"), worded("Apollo 11"), worded("x"), worded("3x"), worded("five")
    (True, True, False, False, False)
    """
    return bool(
        re.fullmatch(r"[^\W\d_](?:[^\W_]|[ .,'&-])*", text)
        and not all(w.lower() in FUNCTIONS for w in re.findall(r"[^\W\d_]{2,}", text))
        and (len(text.split()) < 5 or not re.search(r"\d", text))
        and not re.match(
            r"(?:about|approximately|around|roughly|exactly|nearly|almost|only|just)\b", text, re.IGNORECASE
        )
        and not (quantity(text) or moment(text))
    )


def _word(text: str) -> str:
    """Words to compare: without case, article, punctuation and plural; yes and true are one, as no and false are."""
    said = re.sub(r"[^\w\s]+", " ", bare(text)).casefold().split()
    said = " ".join(said[1:] if said[:1] in (["the"], ["a"], ["an"]) else said)
    return _TRUTH.get(said, said.removesuffix("s"))


def says(text: str, words: str) -> bool:
    """Whether a text gives these words as its answer: alone, boxed, as what "the answer is", or at its last end.

    >>> says("The capital is Paris.", "Paris"), says("It is not Paris.", "Paris"), says("Yes, it is.", "true")
    (True, False, True)
    """
    part, wanted = decided(text), _word(words)
    given = text if part is None else part
    if _word(given) == wanted:
        return True
    first = re.match(r"\W*(\w+)\W*(?:[.,;:!*\n\u2013\u2014-]|because\b|since\b)", given)
    if first and first[1].lower() in _TRUTH and wanted in _TRUTH.values():
        return _word(first[1]) == wanted
    last = [s for s in SENTENCE_END.split(given.strip()) if s.strip(' \n*_"')][-1:] if part is None else []
    if not last or text.rstrip().endswith("?"):
        return False
    ends = [m for m in _COPULA.finditer(last[0].rpartition("\n")[2]) if _word(m[1]) == wanted]
    return any(not DOUBT.search(m.string[: m.start()]) for m in ends)
