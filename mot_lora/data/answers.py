"""Where a text says what its answer is: the last box, or what stands after "the answer is"."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(\{|[^\s{}$.,;]+)")
# between boxes of one answer: \boxed{2} and \boxed{3}, x = \boxed{2}, \text{ for part (a) and } y = \boxed{3}
_BETWEEN = r"(?:[\s$&;]|\\[()\[\]\\]|\\q?quad|\\text\s*\{|\}|for\b|part\b|\([a-z]\)|[A-Za-z](?:_\{?\w+\}?)?\s*=)*"
JOINED = re.compile(rf"\.?(?:{_BETWEEN}(?:,|\band\b|\bor\b|\u548c|\u6216))+{_BETWEEN}")
_DENIED = re.compile(r"\b(?:not|instead of|rather than)\s*[$\\(\[*]*\s*$|n't\s+[$\\(\[*]*$", re.IGNORECASE)
_IS = (
    r"(?:(?:is|are|was|were|will be|would be|should be|must be|equals|est|es|ist|lautet|\u00e9|\u00e8)(?![A-Za-z])"
    r"|[\u662f\u4e3a\u70ba\u306f\uc740\ub294:\uff1a=]|[\u2013\u2014-]\s+(?=\(?[A-Z]\b))"
)
_ANSWER = (
    r"\b(?:answers?|ans\.?|(?:correct|right|best) (?:option|choice)|respuesta|r\u00e9ponse|resposta|risposta|antwort"
    r"|\u043e\u0442\u0432\u0435\u0442)\b(?:\s+(?:to|for|of|choice|option|in)\b[^.:=\n]{0,80}?)?"
    r"|\u7b54\u6848|\u7b54(?=[:\uff1a])|\u7b54\u3048|\uc815\ub2f5"
)
_STATED = re.compile(
    rf"(?:(?:{_ANSWER})[\s*_`\"')\]]*(?:(?:{_IS}[\s*_`]*)+|(?=\$|\\[\[(]))|\u6545\u9009[:\uff1a]?|<answer>|####"
    r"|^[ \t]*#{1,6}[ \t]*\**(?:final[ \t]+)?answer\**[ \t]*\n)\s*"
    r"(?:(?:therefore|thus|simply|equal to|exactly|indeed|option|choice)\b[\s:*]*)*(?!(?:not|neither|never)\b)",
    re.IGNORECASE | re.MULTILINE,
)
_FINAL = re.compile(r"\bfinal answer\W*(?:is\b|[:\uff1a])", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<![ap]\.m)(?<!\b[a-zA-Z])\.(?=[\s*\"]|$)|\u3002|[!?](?=\s|$)|</answer>")


def boxed(text: str) -> str | None:
    r"""What the last \boxed of a text holds, or the last ones where only a comma or an "and" stands between them.

    >>> boxed(r"First \boxed{3}. No: \boxed{\frac{1}{2}}"), boxed(r"\boxed{2} and $\boxed{3}$")
    ('\\frac{1}{2}', '2, 3')
    """
    found = boxes(text)
    if not found:
        return None
    contents = [found[-1][2]]
    for (_, end, content), (start, _, _) in zip(found[-2::-1], found[:0:-1], strict=True):
        if not JOINED.fullmatch(text[end:start]):
            break
        contents.insert(0, content)
    return ", ".join(dict.fromkeys(contents))


def boxes(text: str) -> list[tuple[int, int, str]]:
    """Where each box begins and ends, and what it holds; empty ones, denied ones and those in others are left out."""
    found: list[tuple[int, int, str]] = []
    for m in _BOX.finditer(text):
        if found and m.start() < found[-1][1]:
            continue
        begin, end = (m.end(), _closed(text, m.end())) if m[1] == "{" else m.span(1)
        content = text[begin:end].strip()
        if content and not _DENIED.search(text[max(0, m.start() - 20) : m.start()]):
            found.append((m.start(), end + (m[1] == "{"), content))
    return found


def _closed(text: str, begin: int) -> int:
    """Where the brace opened before `begin` is closed; the end of the line or formula where it never is."""
    depth = 0
    for m in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(m[0], 0)
        if depth < 0:
            return m.start()
    end = re.compile(r"[$\n]|$").search(text, begin)
    return end.start() if end else len(text)


def stated(text: str) -> str | None:
    """What stands after the last "answer is", "Answer:", <answer> or ####, to the end of its sentence.

    >>> stated("So the **answer** is 5 cm. I checked."), stated("5 cm"), stated("\u7b54\u6848\u662f5\u3002")
    ('5 cm', None, '5')
    """
    found = [m.end() for m in _STATED.finditer(text) if text[m.end() :].strip("*_` \n")]
    if not found:
        return None
    rest = text[found[-1] :].lstrip("*_` \t\n:")
    if m := re.match(r"\$\$.*?\$\$|\\\[.*?\\\]", rest, re.DOTALL):
        return m[0]
    line = rest.partition("\n")[0]
    end = SENTENCE_END.search(line)
    return line[: end.start()] if end else line


def decided(text: str) -> str | None:
    r"""What a text marks as its answer: the last box, or what it states; a "final answer" after the box too.

    >>> decided(r"The answer is 4. \boxed{5}"), decided(r"\boxed{4}. Final answer: 5"), decided("It is 5.")
    ('5', '5', None)
    """
    found = boxes(text)
    return stated(text) if not found or _FINAL.search(text, found[-1][1]) else boxed(text)


DOUBT = re.compile(r"\b(?:not|never|neither|nor|or|if|whether|unless|than|hardly|cannot)\b|n't\b|\?", re.IGNORECASE)
