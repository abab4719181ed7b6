r"""The world's spellings of an answer: where it stands in a text, and what it says in ASCII and LaTeX."""

import re
import unicodedata
from functools import lru_cache

from mot_lora.data.quantities import MOMENT, NUMBER, UNIT, moment, quantities, quantity

# --- signs and dress --------------------------------------------------------------------------------

_SIGNS = {
    **{chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)},  # full width
    **dict.fromkeys("\u2212\ufe63\u2010\u2011", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\ufe0f", ""),
    **dict.fromkeys("\u2018\u2019\u02bc\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u300c\u300d", '"'),
    **dict.fromkeys("\u3002\uff61", "."),
    **dict.fromkeys("\u2044\u2215\u00f7", "/"),
    **dict.fromkeys("\u00b7\u22c5\u2219", r"\cdot "),
    "\u3001": ",",
    "\u2236": ":",
    "\u00d7": r"\times ",
    "\u00b0": r"^\circ ",
    "\u00b1": r"\pm ",
    "\u03c0": r"\pi ",
    "\u211d": r"\mathbb{R}",
    "\u2205": r"\emptyset ",
    "\u2208": r"\in ",
    "\u221a": "sqrt",
    "\u221e": r"\infty ",
    "\u2229": r"\cap ",
    "\u222a": r"\cup ",
    "\u2248": r"\approx ",
    "\u2260": r"\ne ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
}
_SIGN_TABLE = str.maketrans(_SIGNS)
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a", "0123456789-+")
_STYLE = (
    r"\\(?:text(?:bf|rm|it|normal|sf|up|tt)?|[mh]box|math(?:rm|bf|it|sf|tt)|operatorname|emph|underline|bm|boldsymbol)"
)
_DRESS = [
    (re.compile(pattern), put)
    for pattern, put in (
        (r"\\\$", "\u00a4"),  # dollars, where $ stands around formulas
        (r"(?<![\w)*])(?:\*\*|__|`+)(?=\S)|(?<=\S)(?:\*\*|__|`+)(?![\w(])", ""),
        (r"\*\*", "^"),
        (r"(?s)<\|\w+\|>.*", ""),  # what a model goes on with after a turn
        (r"</?(?:b|strong|i|em|u|p|span|br)\s*/?>", ""),
        (r"\\langle", "("),
        (r"\\rangle", ")"),
        (r"(?<=\d)_(?=\d{3}(?!\d))", ""),
        (r"\\(?:left|right|[Bb]igg?[lr]?)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|rm|bf|it|boxed|fbox)(?![A-Za-z])\s*", ""),
        # spaces and commas of LaTeX in numbers: 1,\!234, 1{,}234, 3{,}5, 1\,234
        (r"(?<=,)\s*\\!\s*|\\!", ""),
        (r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ","),
        (r"(?<=\d)\{,\}(?=\d)", "."),
        (r"(?<!\\)\\(?:[,;: ]|q?quad|(?:thin|med|thick|en)?space(?![A-Za-z]))|~", " "),
        (r"(?<!\\)\\([%#&_])", r"\1"),
        (r"(?<=[\d}])\s*" + _STYLE + r"\s*\{\s*([^{}]*)\}", r" \1"),  # 5\text{cm}
        *[(_STYLE + r"\s*\{([^{}]*)\}", r"\1")] * 2,
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"(?<=[_^])(\d)(?=\s)", r"{\1}"),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])", r"^\\circ "),
        (r"(?<![A-Za-z])\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])sqrt\s*(\d+|[a-z](?![a-z]))", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])(?:infinity|infty|oo)(?![A-Za-z])", r"\\infty "),
        (r"<=|\\leq(?:slant)?(?![A-Za-z])", r"\\le "),
        (r">=|\\geq(?:slant)?(?![A-Za-z])", r"\\ge "),
        (r"[ \t]+", " "),
    )
]
_AROUND = re.compile(r"\$\$?([^$]*)\$\$?|\\\((.*)\\\)|\\\[(.*)\\\]|\"(.*)\"|'(.*)'|\*([^*]*)\*|_([^_]*)_", re.DOTALL)


def plain(text: str) -> str:
    r"""A text in ASCII and LaTeX, without what only dresses it.

    >>> plain("\u22127"), plain(r"**1\,234**"), plain("2\u00bd"), plain(r"50\text{ cm}^2"), plain("sqrt(17)")
    ('-7', '1 234', '2 1/2', '50 cm^2', '\\sqrt{17}')
    """
    if not text.isascii():
        text = re.sub("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)
        text = re.sub("[\u00bc-\u00be\u2150-\u215e]", lambda m: unicodedata.normalize("NFKC", m[0]), text)
        text = re.sub(r"\u221b\s*(\d+|[a-z]|\([^()]*\))", r"\\sqrt[3]{\1}", text)
        text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b\u207a]+", r"^{\g<0>}", text).translate(_RAISED)
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text.translate(_SIGN_TABLE))
    # \\ ends a row of a matrix; elsewhere it is a backslash written twice
    text = " ".join(text.split()) if r"\begin" in text else re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    for pattern, put in _DRESS:
        text = pattern.sub(put, text)
    return text.strip()


def bare(text: str) -> str:
    r"""A plain text without the marks of mathematics or quotation around it, and the punctuation behind it.

    >>> bare(r"\[ 5 \]."), bare("**73**!"), bare("$5!$")
    ('5', '73!', '5!')
    """
    text = plain(text)
    for _ in range(8):  # more layers than anybody writes
        before = text
        text = re.sub(r"(?<=[^\W\d_]{2})!+$", "", text.lstrip("# \n").rstrip(".,;:? \n")).strip()
        around = _AROUND.fullmatch(text)
        if around and not re.search(r"\\[)\]]", around[2] or around[3] or ""):
            text = next((g for g in around.groups() if g is not None), "").strip()
        if text == before:
            break
    # a dash of print is a minus where an answer begins with it
    return re.sub(r"^(?:[\u2012-\u2015]\s*|minus |negative )(?=[\d.\\])", "-", text)


# --- where it stands --------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(\{|[^\s{}$.,;]+)")
# between boxes of one answer: \boxed{2} and \boxed{3}, x = \boxed{2}, \text{ for part (a) and } y = \boxed{3}
_BETWEEN = r"(?:[\s$&;]|\\[()\[\]\\]|\\q?quad|\\text\s*\{|\}|for\b|part\b|\([a-z]\)|[A-Za-z](?:_\{?\w+\}?)?\s*=)*"
_JOINED = re.compile(rf"\.?(?:{_BETWEEN}(?:,|\band\b|\bor\b|\u548c|\u6216))+{_BETWEEN}")
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
_STATES = re.compile(
    rf"(?:(?:{_ANSWER})[\s*_`\"')\]]*(?:(?:{_IS}[\s*_`]*)+|(?=\$|\\[\[(]))|\u6545\u9009[:\uff1a]?|<answer>|####"
    r"|^[ \t]*#{1,6}[ \t]*\**(?:final[ \t]+)?answer\**[ \t]*\n)\s*"
    r"(?:(?:therefore|thus|simply|equal to|exactly|indeed|option|choice)\b[\s:*]*)*(?!(?:not|neither|never)\b)",
    re.IGNORECASE | re.MULTILINE,
)
_FINAL = re.compile(r"\bfinal answer\W*(?:is\b|[:\uff1a])", re.IGNORECASE)
_END = re.compile(r"(?<![ap]\.m)(?<!\b[a-zA-Z])\.(?=[\s*\"]|$)|\u3002|[!?](?=\s|$)|</answer>")


def boxed(text: str) -> str | None:
    r"""What the last \boxed of a text holds, or the last ones where only a comma or an "and" stands between them.

    >>> boxed(r"First \boxed{3}. No: \boxed{\frac{1}{2}}"), boxed(r"\boxed{2} and $\boxed{3}$")
    ('\\frac{1}{2}', '2, 3')
    """
    found = _boxes(text)
    if not found:
        return None
    contents = [found[-1][2]]
    for (_, end, content), (start, _, _) in zip(found[-2::-1], found[:0:-1], strict=True):
        if not _JOINED.fullmatch(text[end:start]):
            break
        contents.insert(0, content)
    return ", ".join(dict.fromkeys(contents))


def _boxes(text: str) -> list[tuple[int, int, str]]:
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
    found = [m.end() for m in _STATES.finditer(text) if text[m.end() :].strip("*_` \n")]
    if not found:
        return None
    rest = text[found[-1] :].lstrip("*_` \t\n:")
    if m := re.match(r"\$\$.*?\$\$|\\\[.*?\\\]", rest, re.DOTALL):
        return m[0]
    line = rest.partition("\n")[0]
    end = _END.search(line)
    return line[: end.start()] if end else line


_FORMULA = re.compile(
    r"(?<![\\$\w])\$(?!\$)([^$\n]+)\$(?![\d$])|\$\$([^$]+)\$\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
FUNCTIONS = (
    *("and", "or", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "ln", "lg"),
    *("exp", "mod", "max", "min", "gcd", "lcm"),
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


def decided(text: str) -> str | None:
    r"""What a text marks as its answer: the last box, or what it states; a "final answer" after the box too.

    >>> decided(r"The answer is 4. \boxed{5}"), decided(r"\boxed{4}. Final answer: 5"), decided("It is 5.")
    ('5', '5', None)
    """
    boxes = _boxes(text)
    return stated(text) if not boxes or _FINAL.search(text, boxes[-1][1]) else boxed(text)


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
            if found and _JOINED.fullmatch(text[found[-1][1] : start]):
                start, formula = found[-1][0], f"{found.pop()[2]}, {formula}"
            found.append((start, m.end(), formula))
    # sign by sign, so that a number stands where its text does
    rest = "".join(put if len(put := _SIGNS.get(c, c)) == 1 else c for c in text).replace("*", " ")
    for start, end, _ in found:
        rest = rest[:start] + _HIDDEN * (end - start) + rest[end:]
    for m in _NUMBERS.finditer(rest):
        if not _REFUSED.search(rest[max(0, m.start() - 20) : m.start()]):
            found.append((m.start(), m.end(), _spaced(m[0])))
    return sorted(found)[which][2] if found else ""


# --- letters and words ------------------------------------------------------------------------------

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
            return None if _DOUBT.search(text) else m[1]
    lines = [text.strip().partition("\n")[0], text.strip().rpartition("\n")[2]] if part is None else [part]
    return next((label[0] for label in map(labelled, map(bare, lines)) if label), None)


def several_letters(text: str) -> list[str]:
    """The letters of several choices at once, glued or listed; none where a text is anything else.

    >>> several_letters("AC"), several_letters("C and A"), several_letters("AC, BD"), several_letters("B")
    (['A', 'C'], ['A', 'C'], [], [])
    """
    glued_or_listed = r"[A-H]{2,5}|[A-H](?:(?:\s*,\s*(?:and\s+)?|\s+and\s+|\s*&\s*)[A-H])+"
    return sorted(re.findall("[A-H]", text)) if re.fullmatch(glued_or_listed, text) else []


_TRUTH = {"yes": "yes", "true": "yes", "correct": "yes", "no": "no", "false": "no", "incorrect": "no"}
_DOUBT = re.compile(r"\b(?:not|never|neither|nor|or|if|whether|unless|than|hardly|cannot)\b|n't\b|\?", re.IGNORECASE)
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
    last = [s for s in _END.split(given.strip()) if s.strip(' \n*_"')][-1:] if part is None else []
    if not last or text.rstrip().endswith("?"):
        return False
    ends = [m for m in _COPULA.finditer(last[0].rpartition("\n")[2]) if _word(m[1]) == wanted]
    return any(not _DOUBT.search(m.string[: m.start()]) for m in ends)
