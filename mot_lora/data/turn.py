"""How a chat template writes a turn: what heads an assistant's words and ends them; and texts that hold such marks."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

from mot_lora.data.columns import Message
from mot_lora.data.reasoning import THINK, THINK_END, opens_chain
from mot_lora.errors import UserError

Render = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> text. Errors: UserError for a conversation that the template does not take."""

# What models' templates write at the end of a turn, at the beginning, and before a user, and texts can hold.
ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<turn|>",
    "<eos>",
    "</s>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<|END_OF_TURN_TOKEN|>",
    "[|endofturn|]",
    "<|end_of_turn|>",
)
BEGINS = ("<|begin_of_text|>", "<bos>", "<s>", "<｜begin▁of▁sentence｜>", "<|startoftext|>", "<|endoftext|>")  # noqa: RUF001
USERS = (
    "<|im_start|>user",
    "<|start_header_id|>user",
    "<start_of_turn>user",
    "<|turn>user",
    "<|start_of_role|>user",
    "<|start|>user",
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
    "<|user|>",
    "<｜User｜>",  # noqa: RUF001
    "[|user|]",
    "[INST]",
)


def _any(texts: Sequence[str]) -> str:
    """A pattern for any of these texts; some vocabularies have added tokens of spaces, which mark nothing."""
    return "|".join(map(re.escape, sorted(filter(str.strip, texts), key=len, reverse=True))) or r"(?!)"


BEGINNING = rf"(?:(?:{_any(BEGINS)})\s*)"
# How a prompt begins and ends that was rendered by one of those templates.
RENDERED = (
    ("<|im_start|>", "<|im_start|>assistant"),
    ("<|start_header_id|>", "<|start_header_id|>assistant<|end_header_id|>"),
    ("<start_of_turn>", "<start_of_turn>model"),
    ("<|turn>", "<|turn>model"),
    ("<|start_of_role|>", "<|start_of_role|>assistant<|end_of_role|>"),
    ("<|start|>", "<|start|>assistant"),
    ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ("<|user|>", "<|assistant|>"),
    ("<|system|>", "<|assistant|>"),
    ("<｜User｜>", "<｜Assistant｜>"),  # noqa: RUF001
    ("[|user|]", "[|assistant|]"),
    ("[INST]", "[/INST]"),
)
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

        Errors: UserError for a template that takes no user's question.
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
            again=_bare(middle.removeprefix(tail).removeprefix(stop)),
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
    """What a template writes around a chain of thought, where it knows one and has no <think> for it."""
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
        if found := re.search(_any(among), text):
            return text[: found.start()], found.group()
    # an end in plain letters is learnt as it is written; it stops nothing, so a token must follow
    return (last.rstrip() if middle.startswith(last.rstrip()) else ""), ends[0]


def _bare(text: str) -> str:
    """A text without what begins a whole one, and without spaces around it."""
    return re.sub(rf"\A{BEGINNING}+", "", text.strip())


# --- texts that hold the marks already -------------------------------------------------------------------


def without_marks(text: str, turn: Turn, ends: Sequence[str] = ()) -> str:
    r"""An answer without what heads a turn and ends it, the student's or another model's, however many ends there are.

    >>> without_marks("<|im_start|>assistant\n5<|im_end|>", Turn("", "", "", "<|im_end|>"))
    '5'
    """
    head = turn.head.removeprefix(turn.closing).strip()
    heads = [header for _, header in RENDERED] + ([head] if re.search(r"[<\[]", head) else [])
    begun = next((header for header in heads if text.lstrip().startswith(header)), None)
    words = text.lstrip().removeprefix(begun).removeprefix("\n") if begun else text
    ended = without_ends(words, (*ends, *ENDS, turn.stop, turn.tail.strip()))
    return words if ended == words else ended.removesuffix(turn.tail)


def without_ends(text: str, ends: Sequence[str]) -> str:
    """A text without these marks at its end, however many."""
    marks, words = tuple(filter(str.strip, ends)), text
    while (stripped := words.rstrip()).endswith(marks):
        words = stripped[: -max(len(mark) for mark in marks if stripped.endswith(mark))]
    return words


def goes_on(text: str, turn: Turn, ends: Sequence[str] = ()) -> bool:
    """Whether a text goes on after an end of its turn, as generations do that nothing stopped there.

    The student's own ends count wherever they stand, others' before a user's turn.
    """
    if any(end in text for end in (*ends, turn.stop) if end.strip()):
        return True
    users = [user for user in (*USERS, turn.again) if user.strip() and user in text]
    return bool(users) and re.search(rf"(?:{_any(ENDS)})\s*{BEGINNING}*(?:{_any(users)})", text) is not None


def unrendered(text: str, turn: Turn) -> tuple[Message, ...] | None:
    r"""The messages of a prompt that the template has rendered already; None for one that it has not.

    >>> t = Turn("", "", "", "<|im_end|>", ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"))
    >>> unrendered("<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n", t)
    ({'role': 'user', 'content': '1 + 1?'},)
    """
    words, (before, after) = _prompt(text), (_bare(turn.user[0]), _unopened(turn.head))
    end = next((e for e in (after, turn.closing.strip()) if e and words.endswith(e)), None)
    if not (before and end):
        return None
    words = words.removesuffix(end)
    said: list[Message] = []
    if not words.startswith(before) and turn.system:
        first, between = _bare(turn.system[0]), turn.system[1].strip()
        system, found, rest = words.removeprefix(first).partition(between)
        if not (between and found and words.startswith(first)):
            return None
        said, words, before = [{"role": "system", "content": system.strip()}], rest, ""
    user = words.removeprefix(before)
    if not words.startswith(before) or turn.stop in user or end in user:
        return None
    return (*said, {"role": "user", "content": user.strip()})


def is_rendered(text: str, turn: Turn) -> bool:
    """Whether a text is a conversation as the template renders it, up to where an answer begins."""
    head = _unopened(turn.head)
    return bool(turn.again and head) and turn.again in text and _prompt(text).endswith(head)


def rendered_by(text: str) -> str | None:
    r"""How a text begins that some chat template has rendered, up to where an answer begins; None for mere words.

    >>> rendered_by("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"), rendered_by("What is [INST]?")
    ('<start_of_turn>', None)
    """
    words = _prompt(text)
    return next((begin for begin, end in RENDERED if words.startswith(begin) and words.endswith(end)), None)


def _prompt(text: str) -> str:
    return _unopened(_bare(text))


def _unopened(prompt: str) -> str:
    return EMPTY_CHAIN.sub("", prompt.strip()).removesuffix("<think>").rstrip()


# --- the date --------------------------------------------------------------------------------------------

DATE = date(2024, 7, 26)  # which Llama's own templates say where they are told none
LETTERS = "aAbBcdeFHIjmMpSuUwWxXyY"


def dated(template: str) -> bool:
    """Whether a template writes today's date into what the student reads."""
    return "strftime_now" in template


def pinned(template: str) -> str:
    """The template with its clock stopped at `DATE`: what a student reads does not depend on the day."""
    if not dated(template):
        return template
    codes = [f"%{flag}{letter}" for letter in LETTERS for flag in ("-", "")]
    told = "".join(f' | replace("{code}", "{DATE.strftime(code)}")' for code in codes)
    # the line's end is dropped after a block
    return f"{{% macro strftime_now(format) -%}}{{{{ format{told} }}}}{{%- endmacro %}}\n{template}"
