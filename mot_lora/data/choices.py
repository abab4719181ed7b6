"""Multiple-choice questions: their options, as data sets write them, and the right one."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

from mot_lora.data.cells import as_list, as_object, as_text, first_filled, is_empty
from mot_lora.errors import RowError

# columns of options: lists, {label, text}, {A: ..., B: ...}, or a text of lettered lines
OPTIONS = (
    "choices",
    "options",
    "endings",
    "answer_choices",
    "answer_options",
    "possible_answers",
    "alternatives",
    "mc1_targets",
    "multiple_choice_targets",
)
# a column each: A, B, ...; option_a, option1, opa, choice1, ending0, answerA, sol1
COLUMNS = re.compile(r"(?:(options?|op|opt|choices?|endings?|answer|sol|alternative)[ _]?)?([a-j]|\d)")
# the right one and the wrong ones in columns of their own: GPQA, SciQ, TruthfulQA
CORRECT = ("correct answer", "correct_answer", "best_answer")
INCORRECT = re.compile(r"(?:incorrect|wrong)[ _]answers?(?:[ _]?\d+)?|distractors?(?:[ _]?\d+)?")
# the columns that may say which option is right, by label, place or text
SAID = (
    "answerkey",
    "answer_key",
    "answer_letter",
    "answer_label",
    "answer_index",
    "answer_idx",
    "answer_id",
    "correct",
    "correct_option",
    "correct_choice",
    "correct_index",
    "correct_idx",
    "correct_answer_index",
    "correct_answer",
    "gold",
    "gold_index",
    "gold_label",
    "cop",
    "label",
    "target",
    "answer",
    "final_answer",
    "ground_truth",
    "expected_answer",
)
MARKED = r"[\s(\[]*{0}\s?[).:\]、．]\s*(.+)"  # noqa: RUF001
UNCLEAR = "with unclear options"


@dataclass(frozen=True)
class Choices:
    """The options of a question: labels and texts, the row's names for them (`keys`), the number of the first, and the
    place of the right one.
    """

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    keys: tuple[str, ...] = ()
    first: int = 0
    right: int | None = None

    def asked(self, question: str) -> str:
        r"""The question with its options in lines below it, where it does not hold them already.

        >>> Choices(("A", "B"), ("4", "7")).asked("Which is a prime?")
        'Which is a prime?\n\nA. 4\nB. 7'
        """
        pairs = [*zip(self.labels, self.texts, strict=True)]
        if all(text in question and re.search(rf"\b{re.escape(label)}\W", question) for label, text in pairs):
            return question
        return "\n".join((f"{question}\n", *(f"{label}. {text}" for label, text in pairs)))

    @property
    def answers(self) -> tuple[str, ...]:
        """The right answers: the label, and the text where it identifies the option."""
        if self.right is None:
            return ()
        label, text = self.labels[self.right], self.texts[self.right]
        mixed = re.search(r"\d", text) and re.search(r"(?<![\\\w])[^\W\d]{3,}", text)
        return (label,) if mixed or text.upper() in self.labels else (label, text)

    def place(self, said: Any, where: str = "") -> int | None:
        """Where the option stands that is named by its label, its column, its text or its number.

        Errors: RowError where a number is the text of one option and the place of another.

        >>> Choices(("A", "B"), ("4", "7")).place("(b)"), Choices(("A", "B"), ("x", "y")).place(1)
        (1, 1)
        """
        if len(one := as_list(said) or ()) == 1:
            said = one[0]
        if isinstance(said, float) and said.is_integer():
            said = int(said)
        if isinstance(said, int) and not isinstance(said, bool):
            by_label = _index(self.labels, str(said))
            return self._counted(said) if by_label is None else by_label
        if not isinstance(said, str) or not (text := " ".join(said.split())):
            return None
        bare = text.strip("()[]. :").casefold()
        for names in (self.labels, self.keys):
            if (place := _index(names, bare)) is not None:
                return place
        by_text = _index([" ".join(t.split()) for t in self.texts], text.casefold())
        by_place = self._counted(int(text)) if text.isdecimal() and len(text) < 4 else None
        if by_text is not None and by_place not in (None, by_text):
            raise RowError(
                where, f"`{text}` is the text of one option and the place of another; give the option's letter", UNCLEAR
            )
        return by_place if by_text is None else by_text

    def _counted(self, number: int) -> int | None:
        return number - self.first if 0 <= number - self.first < len(self.texts) else None


def find_choices(row: Mapping[str, Any], where: str, given: Any = None, said: Any = None) -> Choices | None:
    """The options of a row, by the names in use, or `given`; the right one too where the row, or `said`, names one.

    Names are in lower case. None where the row has no options.

    Errors: RowError for options that are not understood, and for columns that call different ones right.

    >>> find_choices({"choices": {"text": ["4", "7"], "label": ["A", "B"]}, "answerkey": "B"}, "row 1").answers
    ('B', '7')
    """
    found = _listed(row, where, given) or _columns(row) or _right_and_wrong(row)
    if found is None or found.right is not None:
        return found
    named = {"": said} if not is_empty(said) else {name: row[name] for name in SAID if name in row}
    places = {name: place for name, value in named.items() if (place := found.place(value, where)) is not None}
    if len({*places.values()}) > 1:
        told = ", ".join(f"`{name}` says {found.labels[place]}" for name, place in places.items())
        raise RowError(where, f"columns disagree about the right option: {told}", UNCLEAR)
    return replace(found, right=next(iter(places.values()), None))


def _index(names: Sequence[str], name: str) -> int | None:
    return next((i for i, n in enumerate(names) if n and n.casefold() == name), None)


def _lettered(texts: Sequence[str], keys: Sequence[str] = ()) -> Choices:
    """Options under letters, which those that bring their own lose."""
    labels = [*ascii_uppercase] if len(texts) <= 26 else [str(i + 1) for i in range(len(texts))]
    marked = [re.fullmatch(MARKED.format(a), t, re.DOTALL) for a, t in zip(labels, texts, strict=False)]
    bare = [m[1] if m else t for m, t in zip(marked, texts, strict=True)] if all(marked) else [*texts]
    return Choices(tuple(labels[: len(texts)]), tuple(bare), tuple(keys))


def _listed(row: Mapping[str, Any], where: str, given: Any) -> Choices | None:
    """The options of one column."""
    names = [*OPTIONS, *(["answers"] if isinstance(row.get("label"), int) else [])]  # ReClor's
    name = next((n for n in names if n in row), "") if given is None else "choices"
    value = row.get(name) if given is None else given
    if value is None:
        return None
    inner, listed = as_object(value), as_list(value)
    if inner and not any(isinstance(v, str | list) for v in inner.values()):
        return None  # how a text was generated: Ollama's temperature and the like
    found = _object(inner) if inner else _list([v for v in listed or _lines(str(value)) if not is_empty(v)])
    if found is None:
        raise RowError(where, f"`{name}` holds no options: a list of texts, or {{text, label}}, or {{A: ...}}", UNCLEAR)
    scores = as_list(row.get("multiple_choice_scores"))  # BIG-bench's
    return _hashed(found.texts, _only(scores)) if scores and len(scores) == len(found.texts) else found


def _list(values: list[Any]) -> Choices | None:
    objects = [inner for v in values if (inner := as_object(v))]
    if any("finish_reason" in v for v in objects):
        return None  # an API's answers
    if objects:
        labels = [as_text(first_filled(v, ("label", "key", "letter", "id", "option"))) for v in objects]
        texts = [as_text(first_filled(v, ("text", "value", "content", "option_text", "choice"))) for v in objects]
        return _labelled(labels, texts)
    return _labelled([None] * len(values), [as_text(v) for v in values])


def _object(value: dict[str, Any]) -> Choices | None:
    filled = {str(k): v for k, v in value.items() if not is_empty(v)}
    texts = as_list(first_filled(filled, ("text", "choices")))
    labels = as_list(first_filled(filled, ("label", "labels")))
    if texts and labels:
        if all(label in (0, 1) for label in labels) and len(labels) == len(texts):  # TruthfulQA
            return _hashed([as_text(t) or "" for t in texts], _only(labels))
        return _labelled([*map(as_text, labels)], [*map(as_text, texts)])
    return _labelled([*filled], [as_text(v) for v in filled.values()])


def _only(marks: Sequence[Any]) -> int | None:
    """The place of the only 1."""
    return marks.index(1) if marks.count(1) == 1 else None


def _labelled(labels: Sequence[str | None], given: Sequence[str | None]) -> Choices | None:
    texts = [text for text in given if text is not None]
    if len(texts) < max(2, len(given)) or len(labels) != len(texts):
        return None
    bare = [(label or "").strip().strip("()[].:") for label in labels]
    if not all(bare):
        return _lettered(texts)
    if any(len(label) > 2 for label in bare):  # names, not labels
        return _lettered(texts, bare)
    return Choices(tuple(b.upper() for b in bare), tuple(texts))


def _lines(text: str) -> list[str]:
    """The options in a text that letters them: in lines, or one after another as MathQA does."""
    for parts in (text.splitlines(), re.split(r"[\s,;]+(?=\(?[A-Ja-j]\s?[).:、．])", text)):  # noqa: RUF001
        stripped = [p.strip() for p in parts if p.strip()]
        marked = [
            re.fullmatch(MARKED.format(a) + rf"|{a}\s+(.+)", p, re.DOTALL | re.IGNORECASE)
            for a, p in zip(ascii_uppercase, stripped, strict=False)
        ]
        if len(marked) > 1 and all(marked):
            return [m[1] or m[2] for m in marked if m]
    return []


def _columns(row: Mapping[str, Any]) -> Choices | None:
    """Options in columns of their own, that follow one another."""
    families: dict[str, dict[str, str]] = {}
    for name in row:
        if (m := COLUMNS.fullmatch(name)) and (m[1] or m[2].isalpha()):
            families.setdefault(m[1] or "", {})[m[2]] = name
    for prefix, names in families.items():
        keys = [*_following(names)]
        texts = [text for k in keys if (text := as_text(row[names[k]])) is not None]
        if len(keys) == len(texts) > 1 and (prefix != "answer" or "label" in row):
            # a class label counts from 0, but SocialIQA's; the number of a column is that in its name
            first = prefix == "answer" if keys[0] == "a" else keys[0] == "1" and "label" not in row
            return replace(_lettered(texts, [names[k] for k in keys]), first=int(first))
    return None


def _following(names: Mapping[str, str]) -> Iterator[str]:
    """The keys a, b, c, ... or 0 or 1, 2, ... as far as none is missing."""
    for sequence in ("abcdefghij", "0123456789" if "0" in names else "123456789"):
        if sequence[0] in names:
            for key in sequence:
                if key not in names:
                    return
                yield key
            return


def _right_and_wrong(row: Mapping[str, Any]) -> Choices | None:
    right = as_text(first_filled(row, CORRECT))
    listed = [as_list(value) or [value] for name, value in row.items() if INCORRECT.fullmatch(name)]
    wrong = [text for values in listed for v in values if (text := as_text(v))]
    return _hashed([right, *wrong], 0) if right and wrong else None


def _hashed(texts: Sequence[str], right: int | None) -> Choices:
    """Options in an order that does not give the right one away, as the row's own order would."""
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode("utf-8", "replace")).digest())
    return replace(_lettered([texts[i] for i in order]), right=None if right is None else order.index(right))
