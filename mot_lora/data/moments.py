"""Dates, times of day and ratios, as people write them, and when two of them are the same.

Not dateutil's parser, which finds a date in almost any number: a text here is a date as a whole, or is none.
"""

import re
from fractions import Fraction
from functools import lru_cache

_MONTHS: list[str] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec)[a-z]*\.?"
_DATES = (
    (r"(\d{4})-(\d{1,2})-(\d{1,2})", "date", (1, 2, 3)),
    (rf"{_MONTH}\s+(\d{{1,2}})(?:st|nd|rd|th)?(?:,?\s+(\d{{4}}))?", "date", (3, 1, 2)),
    (rf"(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH},?(?:\s+(\d{{4}}))?", "date", (3, 2, 1)),
    (r"(\d{1,2})[/.](\d{1,2})[/.](\d{4})", "slashed", (3, 1, 2)),  # a day or a month before the other
)
_READ = [(re.compile(pattern, re.IGNORECASE), kind, order) for pattern, kind, order in _DATES]
_CLOCK = re.compile(
    r"(\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+|\d{1,2}(?=\s*[ap]))\s*(?:([ap])\.?\s*m\b\.?)?", re.IGNORECASE
)
MOMENT = "|".join(re.sub(r"(?<!\\)\((?!\?)", "(?:", pattern) for pattern, *_ in _DATES) + (
    r"|\d{1,2}:\d\d(?:\s*[ap]\.?m\b\.?)?|\d{1,2}\s*(?:[ap]\.m\.|[ap]m\b)"
)
"""A date or a time of day, in a sentence."""

Moment = tuple[str, ...]


@lru_cache(maxsize=4096)
def moment(text: str) -> Moment | None:
    """A date, a time of day or a ratio in one spelling, after its kind; None when a text is none of them.

    >>> moment("July 4, 1776") == moment("1776-07-04"), moment("09:05"), moment("3 pm")
    (True, ('ratio', '9', '5'), ('clock', '15', '0'))
    """
    for pattern, kind, order in _READ:
        if m := pattern.fullmatch(text):
            parts = [(m[i] or "0").lower()[:4] for i in order]
            return kind, *(str(_MONTHS.index(p[:3]) + 1 if p[:3] in _MONTHS else int(p)) for p in parts)
    m = _CLOCK.fullmatch(re.sub(r"^(\d+) to (?=\d+$)", r"\1:", text))
    if not m:
        return None
    first, *others = (str(Fraction(p.strip())) for p in m[1].split(":"))
    if not m[2]:
        return "ratio", first, *others
    return "clock", str(int(first) % 12 + (12 if m[2] in "pP" else 0)), *(others or ["0"])


def same_moment(gold: Moment, answer: Moment) -> bool:
    """Whether two moments are the same; a time without am and pm may be either.

    >>> same_moment(moment("3:00"), moment("3 pm")), same_moment(moment("3 am"), moment("15:00"))
    (True, False)
    """
    if {gold[0], answer[0]} == {"clock", "ratio"}:
        clock, bare = (gold, answer) if gold[0] == "clock" else (answer, gold)
        return clock[2:] == bare[2:] and bare[1] in (clock[1], str((int(clock[1]) - 1) % 12 + 1))
    return gold == answer
