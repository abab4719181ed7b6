"""How a chat template writes a turn: what stands before an assistant's words and after them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mot_lora.data.conversation import Message
from mot_lora.data.reasoning import THINK, THINK_END, opens_chain
from mot_lora.errors import UserError

Render = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> text. Errors: UserError for a conversation that the template does not accept."""
BEGINS = ("<|begin_of_text|>", "<bos>", "<s>", "<｜begin▁of▁sentence｜>", "<|startoftext|>", "<|endoftext|>")  # noqa: RUF001


def any_of(texts: Sequence[str]) -> str:
    """A pattern for any of these texts but blank ones, which some vocabularies have as added tokens."""
    return "|".join(map(re.escape, sorted(filter(str.strip, texts), key=len, reverse=True))) or r"(?!)"


BEGINNING = rf"(?:(?:{any_of(BEGINS)})\s*)"
# A generation prompt that ends so has the chain of thought closed before it began.
CLOSED = re.compile(r"(</think>|<channel\|>|<\|END_THINKING\|>)\s*\Z")
EMPTY_CHAIN = re.compile(r"(<think>\s*)?</think>\s*\Z")
ASKED, ANSWERED, AGAIN = "question-1-of-user", "answer-1-of-assistant", "question-2-of-user"
SYSTEM, REASONED = "words-of-system", "chain-of-thought-of-assistant"
FIELDS = ("reasoning_content", "reasoning", "thinking")  # where templates look for a chain of thought


@dataclass(frozen=True)
class Turn:
    """How a chat template writes an assistant's turn, found by rendering a conversation with it.

    The student reads the rendered prompt, and `header` where the template gives none to a prompt; it is trained to
    write `lead`, its words, `tail`, and the token `stop`. `user` is what stands before and after a question, `system`
    before and after a system's words, `again` before a second question; `chain` before and after a chain of thought,
    where the template has other marks than <think> for it.

    >>> Turn.of(chatml, ends=["<|im_end|>"], marks=["<|im_start|>", "<|im_end|>"]).stop  # doctest: +SKIP
    '<|im_end|>'
    """

    header: str
    lead: str
    tail: str
    stop: str
    user: tuple[str, str] = ("", "")
    system: tuple[str, str] | None = None
    again: str = ""
    chain: tuple[str, str] | None = None

    @classmethod
    def of(cls, render: Render, ends: Sequence[str], marks: Sequence[str]) -> "Turn":
        """ends: the texts of tokens at which generation stops, the tokenizer's own first; marks: of all added tokens.

        Errors: UserError for a template that accepts no question of a user.
        """
        first: list[Message] = [{"role": "user", "content": ASKED}]
        opened, said = render(first, True), _attempt(render, [{"role": "system", "content": SYSTEM}, *first], True)
        closed = _attempt(render, first, False)
        first.append({"role": "assistant", "content": ANSWERED})
        reasons = [*first[:-1], first[-1] | dict.fromkeys(FIELDS, REASONED)]
        before, last = _around(_attempt(render, first, False), ANSWERED)
        earlier, after = _around(_attempt(render, [*first, {"role": "user", "content": AGAIN}], True), ANSWERED)
        before, middle = before or earlier, after.partition(AGAIN)[0]
        # a chain that the prompt opens is closed by the completion, and an empty one is no part of the header
        extra = before.removeprefix(opened) if before.startswith(opened) and not opens_chain(opened) else ""
        extra = EMPTY_CHAIN.sub("", extra)
        header = extra.rstrip(" ") if opened == closed else ""  # a space begins the next word, in most vocabularies
        tail, stop = _end(last, middle, ends, marks)
        system = _around(said, SYSTEM)
        return cls(
            header,
            extra.removeprefix(header),
            tail,
            stop,
            user=_around(opened + header, ASKED),
            system=(system[0], system[1].partition(ASKED)[0]) if said and SYSTEM in said else None,
            again=without_beginning(middle.removeprefix(tail).removeprefix(stop)),
            chain=_chain(opened, _attempt(render, reasons, False) or "", stop),
        )

    @property
    def head(self) -> str:
        """What the student reads between a user's words and its own."""
        return self.user[1]

    @property
    def closing(self) -> str:
        """What ends a user's turn, as far as `head` shows it."""
        before, stop, _ = self.head.partition(self.stop)
        return before + stop if stop else ""

    @property
    def end(self) -> str:
        """What is trained after the student's words."""
        return self.tail + self.stop

    def written(self, completion: str) -> str:
        r"""A completion as the student is to write it, up to `stop`.

        >>> turn = Turn("", "", "", "", chain=("<seed:think>", "</seed:think>"))
        >>> turn.written("<think>\nso 2\n</think>\n\n2"), turn.written("2")
        ('<seed:think>so 2</seed:think>2', '2')
        """
        begin, end = self.chain or (THINK, THINK_END)
        thought = completion if THINK_END in completion or begin else f"{THINK}{THINK_END}{completion}"
        if self.chain and thought.lstrip().startswith(THINK) and THINK_END in thought:
            chain, _, answer = thought.lstrip().removeprefix(THINK).partition(THINK_END)
            return begin + chain.strip() + end + answer.lstrip() + self.tail
        return self.lead + completion + self.tail

    def read(self, text: str) -> str:
        r"""What the student has written as a completion, its chain in <think>; one that never ends stays open.

        >>> Turn("", "", "", "", chain=("<seed:think>", "</seed:think>")).read("<seed:think>so 2</seed:think>2")
        '<think>\nso 2\n</think>\n\n2'
        """
        if self.chain:
            begin, end = (mark.strip() for mark in self.chain)
            chain, ended, answer = text.strip().removeprefix(begin).partition(end)
            if ended:
                return f"{THINK}\n{chain.strip()}\n{THINK_END}\n\n{answer.lstrip()}"
            if text.lstrip().startswith(begin):
                return f"{THINK}\n{chain}"
        return text.removeprefix(self.lead) if self.lead.strip() else text


def _chain(opened: str, whole: str, stop: str) -> tuple[str, str] | None:
    """What a template writes around a chain of thought, where it has other marks than <think>."""
    chain, found, answer = whole.removeprefix(opened).partition(REASONED)
    end = answer.partition(ANSWERED)[0]
    if not (found and end.strip() and whole.startswith(opened) and ANSWERED in answer):
        return None
    # what stops an answer cannot stand within it
    return None if THINK in opened + chain or THINK_END in end or stop in end else (chain, end)


def _attempt(render: Render, messages: Sequence[Message], answer: bool) -> str | None:
    try:
        return render(messages, answer)
    except UserError:
        return None


def _around(text: str | None, words: str) -> tuple[str, str]:
    before, found, after = (text or "").rpartition(words)
    return (before, after) if found else ("", "")


def _end(last: str, middle: str, ends: Sequence[str], marks: Sequence[str]) -> tuple[str, str]:
    """What stands between an answer and the token that ends it, and that token.

    last, middle: what a template writes after its last answer, and between an answer and the next question.
    """
    alike = [x == y for x, y in zip(last, middle, strict=False)]
    shared = last[: [*alike, False].index(False)] if middle else last
    for text, among in ((shared, ends), (shared, marks), (last, ends), (last, marks), (middle, ends)):
        if found := re.search(any_of(among), text):
            return text[: found.start()], found.group()
    # an end in plain letters is learnt as it is written; it stops nothing, so a token must follow
    return (last.rstrip() if middle.startswith(last.rstrip()) else ""), ends[0]


def without_beginning(text: str) -> str:
    """A text without the marks that begin a sequence, and without spaces around it."""
    return re.sub(rf"\A{BEGINNING}+", "", text.strip())
