"""The notation of an answer: its signs in ASCII and LaTeX, without what only dresses them."""

import re
import unicodedata

SIGNS = {
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
_SIGN_TABLE = str.maketrans(SIGNS)
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


FUNCTIONS = (
    *("and", "or", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "ln", "lg"),
    *("exp", "mod", "max", "min", "gcd", "lcm"),
)
