"""Answers in numbers and formulas: the one that a text gives."""

import re
from functools import lru_cache

from mot_lora.data.answers import JOINED, boxed, decided
from mot_lora.data.letters import labelled
from mot_lora.data.moments import MOMENT, moment
from mot_lora.data.notation import FUNCTIONS, SIGNS, bare
from mot_lora.data.quantities import NUMBER, quantities
from mot_lora.data.units import UNIT

_FORMULA = re.compile(
    r"(?<![\\$\w])\$(?!\$)([^$\n]+)\$(?![\d$])|\$\$([^$]+)\$\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_PROSE = re.compile(r"(?<![^\s(])[A-Za-z]{2,}(?=[\s.,;:!?)]|$)")
_ITEM = rf"[$\u00a4\u20ac\u00a3\u00a5]?{NUMBER}(?:\s*%|\s*(?:per\s?cent\b|{UNIT}))?"
_MARKS = "\u221a\u221b\u03c0\u00d7\u00f7\u00b7\u22c5\u221e"  # of a formula that a number is a part of
_NUMBERS = re.compile(
    rf"(?<![\w:.])(?:{MOMENT})(?![\w:])"
    rf"|(?<![A-Za-z0-9_.:^/*+{_MARKS}\\{{-])-?{_ITEM}"
    rf"(?:(?:\s*,\s*(?:and\ |or\ )?|\s+(?:and|or)\s+|(?<=[a-z])\ ){_ITEM})*"
    rf"(?![A-Za-z0-9_{_MARKS}\u00b2\u00b3^\\({{/*]|[.,:]\d|\s*[+*/^=<>\\-]\s*[\d\w\\])",
    re.VERBOSE | re.IGNORECASE,
)
# 7, not 5; more than 5; 3x + 5
_REFUSED = re.compile(
    r"(?:\b(?:not|nor|neither|than|instead of|without|plus|minus|times|over)|n't)(?: equal to)?[ $]*$"
    r"|\u4e0d\u662f\s*$|[+*/^<>-]\s*$"
)
_HIDDEN = "\u2588"


@lru_cache(maxsize=4096)
def expression(text: str) -> str:
    r"""What a text gives as its answer: what it marks so, or what it comes to last.

    >>> expression("The answer is **73**."), expression("He has 3 pears and buys 2, so $3 + 2 = 5$ in all.")
    ('73', '3 + 2 = 5')
    """
    part = decided(text)
    if part is None:
        whole, last = bare(text), bare(text.strip().rpartition("\n")[2])
        read = (x for x in (whole, last, _after_is(last)) if _is_answer(x))
        return next(read, bare(_in_prose(text, -1)) or whole)
    whole = bare(part)
    if _is_answer(whole):
        return whole
    if re.match(r"[A-Za-z]{2,}\b", whole) and _is_answer(end := _after_is(whole)):  # the largest $n$ is 34
        return end
    return whole if boxed(text) is not None else bare(_in_prose(part, 0)) or whole


def _after_is(sentence: str) -> str:
    return _spaced(bare(re.split(r"\b(?:is|are|equals)\b", sentence)[-1]))


def _spaced(text: str) -> str:
    """In a sentence 5m is a length, in a formula it may be five times m."""
    return re.sub(rf"(?<=\d)(?={UNIT}$)", " ", text)


def _is_answer(text: str) -> bool:
    """Whether a text is nothing but an answer."""
    if "\n" in text or "$" in text.lstrip("-$") or not re.search(r"\w", text) or text.startswith(r"\end"):
        return False
    return bool(_is_formula(text) or quantities(text) or moment(text) or labelled(text))


def _is_formula(text: str) -> bool:
    words = _PROSE.findall(re.sub(r"\\[A-Za-z]+", " ", text))
    return text.isascii() and all(w.lower() in FUNCTIONS for w in words)


def _in_prose(text: str, which: int) -> str:
    """The first (0) or the last (-1) formula or number of a text; nothing where there is none."""
    text = re.sub(r"\bnegative (?=\d)|(?<=\bis )minus (?=\d)", "-", text)
    found: list[tuple[int, int, str]] = []
    for m in _FORMULA.finditer(text):
        start, formula = m.start(), next(g for g in m.groups() if g is not None)
        if _is_formula(formula):
            if found and JOINED.fullmatch(text[found[-1][1] : start]):
                start, formula = found[-1][0], f"{found.pop()[2]}, {formula}"
            found.append((start, m.end(), formula))
    # sign by sign, so that a number stands where its text does
    rest = "".join(put if len(put := SIGNS.get(c, c)) == 1 else c for c in text).replace("*", " ")
    for start, end, _ in found:
        rest = rest[:start] + _HIDDEN * (end - start) + rest[end:]
    for m in _NUMBERS.finditer(rest):
        if not _REFUSED.search(rest[max(0, m.start() - 20) : m.start()]):
            found.append((m.start(), m.end(), _spaced(m[0])))
    return sorted(found)[which][2] if found else ""
