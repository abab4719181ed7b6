"""Texts of the data on a page: what of them can be seen at once, and what opens at a click."""

from dataclasses import dataclass

from mot_lora.data.reasoning import THINK_END

LONG = 600  # characters of a text that is seen whole


@dataclass(frozen=True)
class Passage:
    """What is seen of a text, and before it the (title, text) of what opens at a click."""

    shown: str
    folded: tuple[tuple[str, str], ...] = ()


def passage(text: str, what: str) -> Passage:
    """A text that is seen whole; of a long one only the end is, and the whole opens at a click.

    >>> passage("2 + 2?", "Question")
    Passage(shown='2 + 2?', folded=())
    """
    if len(text) <= LONG:
        return Passage(text)
    return Passage(f"... {text[-LONG // 2 :]}", (_folded(what, text),))


def generated(text: str) -> Passage:
    """A generated text: the answer is seen, the chain of thought before it opens at a click, whole.

    >>> generated("<think>two and two</think> 4")
    Passage(shown='4', folded=(('Reasoning, 26 characters', '<think>two and two</think>'),))
    """
    thought, closed, answer = text.rpartition(THINK_END)
    if not closed and "<think>" in text:
        return Passage("", (_folded("Reasoning that never ends", text),))
    seen = passage(answer.strip() or "(nothing)", "Answer")
    return Passage(seen.shown, (_folded("Reasoning", thought + closed), *seen.folded)) if closed else seen


def _folded(what: str, text: str) -> tuple[str, str]:
    return f"{what}, {len(text):,} characters", text
