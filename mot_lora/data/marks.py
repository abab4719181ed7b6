"""Texts that hold a chat template's marks already: rendered prompts, and answers with the end of their turn."""

import re
from collections.abc import Sequence

from mot_lora.data.conversation import Message
from mot_lora.data.turn import BEGINNING, EMPTY_CHAIN, Turn, any_of, without_beginning

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
    """Whether a text goes on after the end of its turn, as generations do that were not stopped there.

    The student's own end marks count anywhere, those of other models only before a user's turn.
    """
    if any(end in text for end in (*ends, turn.stop) if end.strip()):
        return True
    users = [user for user in (*USERS, turn.again) if user.strip() and user in text]
    return bool(users) and re.search(rf"(?:{any_of(ENDS)})\s*{BEGINNING}*(?:{any_of(users)})", text) is not None


def unrendered(text: str, turn: Turn) -> tuple[Message, ...] | None:
    r"""The messages of a prompt that the template has rendered already; None for one that it has not.

    >>> t = Turn("", "", "", "<|im_end|>", ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"))
    >>> unrendered("<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n", t)
    ({'role': 'user', 'content': '1 + 1?'},)
    """
    words, (before, after) = _prompt(text), (without_beginning(turn.user[0]), _unopened(turn.head))
    end = next((e for e in (after, turn.closing.strip()) if e and words.endswith(e)), None)
    if not (before and end):
        return None
    words = words.removesuffix(end)
    said: list[Message] = []
    if not words.startswith(before) and turn.system:
        first, between = without_beginning(turn.system[0]), turn.system[1].strip()
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
    r"""How a text begins that some chat template has rendered up to an answer; None for plain words.

    >>> rendered_by("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"), rendered_by("What is [INST]?")
    ('<start_of_turn>', None)
    """
    words = _prompt(text)
    return next((begin for begin, end in RENDERED if words.startswith(begin) and words.endswith(end)), None)


def _prompt(text: str) -> str:
    return _unopened(without_beginning(text))


def _unopened(prompt: str) -> str:
    return EMPTY_CHAIN.sub("", prompt.strip()).removesuffix("<think>").rstrip()
