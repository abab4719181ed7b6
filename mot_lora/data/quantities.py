"""Numbers with their units, as people write them, and when two of them are the same.

pint knows units but not how answers write them: LaTeX degrees, money, clock times, a month that is no number of days.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from mot_lora.data.units import Unit, unit

_GROUPED = (
    r"\d{1,3}(?:[. ]\d{3})+,\d{1,2}(?![\d,])"
    r"|(?!0)\d{1,3}(?:(?:,\d{3})+|(?:[ ]\d{3})+|(?:'\d{3})+|(?:\.\d{3}){2,})(?![\d,])|\d{1,2}(?:,\d\d)+,\d{3}(?!\d)"
)
_DECIMAL = rf"(?:(?:{_GROUPED}|\d+)(?:\.\d*)?|\.\d+)"
_BRACED = rf"(?:\{{\s*-?\s*{_DECIMAL}\s*\}}|\d)"
NUMBER = rf"""(?:\d*\.\d*\\overline\s*\{{\d+\}}
    |(?:\d+(?:[ ]+|(?=\\)))?(?:{_DECIMAL}[ ]?/[ ]?\d+(?:\.\d+)?|\\frac\s*{_BRACED}\s*{_BRACED})
    |(?:{_DECIMAL}[ ]*(?:\\times|\\cdot|[x*])[ ]*)?10[ ]*\^[ ]*(?:\{{\s*[+-]?\d{{1,4}}\s*\}}|[+-]?\d{{1,4}})
    |{_DECIMAL}[eE][+-]?\d{{1,4}}(?![\w.])
    |{_DECIMAL})"""
"""A number without its sign, for re.VERBOSE: a mixed number, a fraction, a power of ten or a decimal."""

_QUANTITY = re.compile(
    r"(?P<less>-?)\s*(?P<currency>[$\u00a4\u20ac\u00a3\u00a5\u20b9]|Rs\.?|USD|EUR)?\s*"
    rf"(?P<number>[+-]?[ ]?{NUMBER})"
    r"(?:(?:st|nd|rd|th)\b)?(?:\s*(?P<percent>%|per\s?cent|pct|percentage(?:\ points?)?))?(?P<rest>.*)",
    re.VERBOSE | re.DOTALL,
)
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SPELLED = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
    "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
# what is counted: words, that is, which are no part of a formula
_NOUNS = re.compile(
    r"\(?(?!(?:and|or|to|plus|minus|over|squared|cubed|factorial|choose|mod|sin|cos|tan|log|ln|exp|sqrt|pi|than|if|for)\b)"
    r"[^\W\d_]{2,}(?:[- '.,]+(?:a|[^\W\d_]{2,}))*\.?\)?"
)


@dataclass(frozen=True)
class Quantity:
    """A number, exactly, and how it is written: its decimal places, a percent sign, its unit, or what it counts."""

    value: Fraction
    places: int = 0
    percent: bool = False
    unit: Unit | None = None
    noun: str = ""


@lru_cache(maxsize=4096)
def quantity(text: str) -> Quantity | None:
    r"""What a text says that is nothing but a number and what it counts or measures.

    >>> quantity("1,234.5").value, quantity(r"2\frac{1}{2} cm").value, quantity("50%").percent, quantity("3x")
    (Fraction(2469, 2), Fraction(5, 2), True, None)
    """
    return _spelled(text) or _single(text) or _sum(re.split(r"(?<=[a-z])[ ,]+(?:and )?(?=\d)", text))


def _spelled(text: str) -> Quantity | None:
    match [_SPELLED.get(w) for w in re.split(r"[ -]", text.lower())]:
        case [int(n)]:
            return Quantity(Fraction(n))
        case [int(tens), int(ones)] if tens >= 20 and 0 < ones < 10:
            return Quantity(Fraction(tens + ones))
        case _:
            return None


def _single(text: str) -> Quantity | None:
    m = _QUANTITY.fullmatch(text.strip())
    value = _value(m["number"]) if m else None
    if not m or value is None or (m["less"] and m["number"][0] in "+-"):
        return None
    rest, measure, noun = m["rest"], unit(m["currency"]) if m["currency"] else None, ""
    scale = re.match(r"\s*([a-z]+)\b", rest)
    if scale and (factor := _SCALES.get(scale[1].removesuffix("s"))):
        value, rest = value * factor, rest[scale.end() :]
    if rest.strip():
        named = unit(rest) or unit(f"{m['currency'] or ''}{rest}")
        # 5t may be tons, and it may be five times t
        if re.match(r"[A-Za-z]\b", rest) or not (named or _NOUNS.fullmatch(rest.strip())):
            return None
        measure = named or measure
        noun = "" if named else rest.strip(" ().").casefold()
    places = len(m["number"].partition(".")[2]) if re.fullmatch(r"[+-]?[ ]?[\d,' ]*\.\d+", m["number"]) else 0
    return Quantity(-value if m["less"] else value, places, bool(m["percent"]), measure, noun)


def _sum(texts: list[str]) -> Quantity | None:
    """One quantity in units that get smaller, as 3 hours 20 minutes is."""
    parts = [_single(text) for text in texts]
    units = [p.unit for p in parts if p and p.unit]
    if len(units) < len(parts) or len(units) < 2 or len({u.dimension for u in units}) > 1:
        return None
    if any(small.size >= big.size for big, small in pairwise(units)):
        return None
    total = sum((p.value * p.unit.size for p in parts if p and p.unit), Fraction(0))
    return Quantity(total, unit=Unit(units[0].dimension, Fraction(1)))


def _value(number: str) -> Fraction | None:
    sign, number = (-1 if number[0] == "-" else 1), re.sub(r"^[+-]? *", "", number)
    number = re.sub(r"\\frac\s*(\d|\{[^{}]*\})\s*(\d|\{[^{}]*\})", r" \1/\2", number).lstrip()
    try:
        if m := re.fullmatch(r"(?:(.*?)\s*(?:\\times|\\cdot|[x*]))?\s*10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?", number):
            return sign * _decimal(m[1] or "1") * Fraction(10) ** int(m[2])
        if m := re.fullmatch(r"(?:(\d+) +)?([^/]+)/([^/]+)", number):
            part = _decimal(m[2].strip("{}")) / _decimal(m[3].strip("{}"))
            return None if m[1] and not 0 < part < 1 else sign * (int(m[1] or 0) + part)
        return sign * _decimal(number)
    except (ValueError, ZeroDivisionError):
        return None


def _decimal(text: str) -> Fraction:
    if m := re.fullmatch(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", text):
        whole, places, endless = m.groups()
        return Fraction(f"{whole or 0}.{places or 0}") + Fraction(
            int(endless), (10 ** len(endless) - 1) * 10 ** len(places)
        )
    if re.fullmatch(r"[\d. ]+,\d\d?", text):  # a decimal comma
        text = re.sub(r"[. ]", "", text).replace(",", ".")
    text = re.sub(r"[,' ]", "", text)
    return Fraction(text.replace(".", "") if text.count(".") > 1 else text)


def quantities(text: str) -> list[Quantity]:
    """The quantities that a text is a list of; none where it is anything else.

    >>> [q.value for q in quantities("1,234 and 5")], quantities("2, x")
    ([Fraction(1234, 1), Fraction(5, 1)], [])
    """
    if one := quantity(text):
        return [one]
    loose = re.search(r"[;&]|\band\b|\bor\b|,\s", text)
    parts = re.split(r"\s*[;&]\s*|,?\s+(?:and|or)\s+|,\s+" if loose else ",", text.strip())
    found = [q for q in map(quantity, parts) if q]
    return found if len(found) == len(parts) else []


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Whether two quantities are the same, exactly, or as a decimal of six places and digits or more is rounded.

    50 % is 50 and 0.5. A unit may be left out; two that are known must agree, as 90 minutes and 1.5 hours do. What is
    counted, apples or pears, is not compared.

    >>> same_quantity(quantity("1 m"), quantity("100 cm")), same_quantity(quantity("1e-9"), quantity("2e-9"))
    (True, False)
    """
    if gold.percent != answer.percent:
        if gold.unit or answer.unit:
            return False
        share, other = (gold, answer) if gold.percent else (answer, gold)
        return other.value in (share.value, share.value / 100)
    if gold.unit and answer.unit:
        same_kind = gold.unit.dimension == answer.unit.dimension
        return same_kind and gold.value * gold.unit.size == answer.value * answer.unit.size
    return gold.value == answer.value or _rounded(gold, answer) or _rounded(answer, gold)


def _rounded(short: Quantity, long: Quantity) -> bool:
    """Whether a decimal is a number with more places, rounded to its own."""
    enough = short.places >= 6 and abs(short.value) * 10**short.places >= 10**5
    return enough and not 0 < long.places <= short.places and round(long.value, short.places) == short.value
