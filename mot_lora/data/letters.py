"""The letters of options: which one an answer chooses."""

import re

from mot_lora.data.answers import DOUBT, decided
from mot_lora.data.notation import bare, plain

_LABEL = re.compile(
    r"(?:(?:the )?(?:option|choice|answer)\s+)?"
    r"(?:[(\[]{1,2}([A-Za-z])[)\]]{1,2}|([A-Za-z])(?![A-Za-z0-9_^=+*/<>'(-]))\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_ANOTHER = re.compile(r"[\W_]*(?:,|\band\b|\bor\b|/|&)\W*[A-Za-z]\b")
_GOES_ON = re.compile(
    r"$|[).:,;\u2013\u2014-]|(?:because|since|as|for|is (?:the |my )?(?:correct|right|best|true|final|answer))\b"
)
_CHOOSES = re.compile(
    r"\b(?i:option|choice|choose|select|pick|go with)\s*(?:is\s+|:\s*)?\(?([A-Z])\b"
    r"|(?<![A-Za-z])\(?([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best|true)\b|\u9009\u62e9?\s*([A-Z])"
)


def labelled(text: str) -> tuple[str, str] | None:
    """The letter of a choice that a bare text begins with, and what it stands for.

    >>> labelled("(B)"), labelled("B) 12 cm"), labelled("A triangle has three sides"), labelled("B or C")
    (('B', ''), ('B', '12 cm'), None, None)
    """
    m = _LABEL.fullmatch(text)
    if not m or _ANOTHER.match(m[3]):
        return None
    letter, rest = m[1] or m[2], m[3]
    if m[2] and (not _GOES_ON.match(rest) or (letter.islower() and rest not in ("", ")"))):
        return None
    return letter.upper(), rest.lstrip(").:,;- \u2013\u2014").strip()


def chosen(text: str) -> str | None:
    """The letter of the choice that a text decides for; None where that is not plain.

    >>> chosen("B because it is prime"), chosen("Option A fails, so the answer is (C)."), chosen("A triangle")
    ('B', 'C', None)
    """
    part = decided(text)
    if part is None:
        named = {a or b or c for a, b, c in _CHOOSES.findall(plain(text))}
        if named:
            return named.pop() if len(named) == 1 else None
        if m := re.search(r"\b(?:is|be|it's)\s+\(?([B-HJ-Z])\)?$", bare(text)):
            return None if DOUBT.search(text) else m[1]
    lines = [text.strip().partition("\n")[0], text.strip().rpartition("\n")[2]] if part is None else [part]
    return next((label[0] for label in map(labelled, map(bare, lines)) if label), None)


def several_letters(text: str) -> list[str]:
    """The letters of several choices at once, glued or listed; none where a text is anything else.

    >>> several_letters("AC"), several_letters("C and A"), several_letters("AC, BD"), several_letters("B")
    (['A', 'C'], ['A', 'C'], [], [])
    """
    glued_or_listed = r"[A-H]{2,5}|[A-H](?:(?:\s*,\s*(?:and\s+)?|\s+and\s+|\s*&\s*)[A-H])+"
    return sorted(re.findall("[A-H]", text)) if re.fullmatch(glued_or_listed, text) else []
