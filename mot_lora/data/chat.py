"""The student's chat template: a conversation as the student reads it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from mot_lora.data.conversation import Message, tool_names, with_written_arguments
from mot_lora.data.marks import goes_on, is_rendered, rendered_by, unrendered, without_ends, without_marks
from mot_lora.data.records import TurnRecord
from mot_lora.data.template_date import DATE, dated, pinned
from mot_lora.data.tokenizer import end_ids
from mot_lora.data.traces import Trace
from mot_lora.data.turn import CLOSED, EMPTY_CHAIN, Turn
from mot_lora.errors import UserError


@dataclass(frozen=True)
class Template:
    """The student's chat template: its text, how it is called, and how it writes a turn.

    parts: whether a message's content is a list of parts; thinking: whether chains of thought must be asked for.
    """

    text: str
    parts: bool
    thinking: bool
    ends: tuple[str, ...]
    turn: Turn

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Template":
        """Errors: UserError for a template that accepts no question, or several of which none is the default."""
        try:
            text = cast("Any", tokenizer).get_chat_template()
        except ValueError as e:
            names = ", ".join(cast("Any", tokenizer).chat_template)
            raise UserError(
                f"the student's tokenizer has several chat templates ({names}), and none of them is called `default`"
            ) from e
        return _template(cast("Any", tokenizer), text, tuple(end_ids(tokenizer)))


@lru_cache(maxsize=4)
def _template(tokenizer: PreTrainedTokenizerBase, text: str, ends: tuple[int, ...]) -> Template:
    text = pinned(text)
    asked: list[Message] = [{"role": "user", "content": "words"}]
    # templates for images and text know a message's words only as a part of it
    parts = "words" not in _render(tokenizer, text, asked) and "words" in _render(tokenizer, text, asked, parts=True)
    thinking = CLOSED.search(_render(tokenizer, text, asked, parts=parts)) is not None

    def render(messages: Sequence[Message], answer: bool) -> str:
        return _render(tokenizer, text, messages, answer, parts=parts, thinking=thinking)

    stops = cast("list[str]", tokenizer.convert_ids_to_tokens(list(ends)))
    turn = Turn.of(render, stops, list(cast("dict[str, int]", cast("Any", tokenizer).get_added_vocab())))
    return Template(text, parts, thinking, tuple(stops), turn)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    answer: bool = True,
    *,
    parts: bool = False,
    thinking: bool = False,
    tools: Sequence[Any] = (),
) -> str:
    from jinja2 import TemplateError

    said = [{**m, "content": [{"type": "text", "text": m["content"]}]} if parts else m for m in messages]
    options: dict[str, Any] = {"enable_thinking": True, "thinking": True} if thinking else {}
    try:
        text = cast("Any", tokenizer).apply_chat_template(
            said,
            tools=list(tools) or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=answer,
            **options,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(f"the student's chat template does not accept a conversation of {roles} ({e})") from e
    assert isinstance(text, str)
    return EMPTY_CHAIN.sub("", text) if thinking and answer else text


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the one with which the template ends a turn first, and `end_ids`."""
    stop = cast("int", tokenizer.convert_tokens_to_ids(Template.of(tokenizer).turn.stop))
    return list(dict.fromkeys([stop, *end_ids(tokenizer)]))


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], tools: Sequence[Any] = ()) -> str:
    """The conversation as the student reads it, up to where its answer begins, with the tools that it offers.

    A prompt that the student's own template has rendered already is taken as it is.

    Errors: UserError for a conversation that the template does not accept, for tools that it leaves out, and for a
    prompt that another template has rendered.
    """
    template = Template.of(tokenizer)
    messages = unmarked_prompt(tokenizer, prompt)
    words = messages[-1]["content"]
    if is_rendered(words, template.turn) and len(messages) == 1:
        begin = str(tokenizer.bos_token or "")
        missing = template.turn.user[0].startswith(begin) and not words.startswith(begin)
        return begin + words if missing else words
    if begin := rendered_by(words):
        raise UserError(
            f"its prompt was rendered by a chat template that is not the student's, or has other messages before "
            f"it (it begins with {begin}); give the user's words alone"
        )
    # of several templates, one can be for conversations with tools
    written = pinned(cast("Any", tokenizer).get_chat_template(tools=list(tools))) if tools else template.text
    how: dict[str, Any] = {"parts": template.parts, "thinking": template.thinking, "tools": tools}
    try:
        text = _render(tokenizer, written, messages, **how)
    except UserError:
        if not any("tool_calls" in m for m in messages):
            raise
        text = _render(tokenizer, written, with_written_arguments(messages), **how)
    if left_out := next((name for name in tool_names(messages, tools) if name not in text), None):
        raise UserError(f"the student's chat template leaves out the tool `{left_out}`: it has no place for tools")
    return text + template.turn.header


def unmarked_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> tuple[Message, ...]:
    """Messages without the marks that a chat template adds, where their texts hold those already."""
    *before, last = (_unmarked_message(tokenizer, m) for m in prompt)
    found = unrendered(last["content"], Template.of(tokenizer).turn)
    return found if found and not before else (*before, last)


def _unmarked_message(tokenizer: PreTrainedTokenizerBase, message: Message) -> Message:
    template, words = Template.of(tokenizer), message["content"]
    if message["role"] == "assistant":
        return {**message, "content": unmarked_answer(tokenizer, words)}
    found = unrendered(words, template.turn) or ()
    if message["role"] == "user" and len(found) == 1:
        words = found[0]["content"]
    return {**message, "content": without_ends(words, (*template.ends, template.turn.stop))}


def unmarked(tokenizer: PreTrainedTokenizerBase, trace: Trace) -> Trace:
    """A trace without the marks that a chat template adds: of a rendered prompt, and of the end of its answer.

    Errors: EndedError for an answer that goes on after the end of its turn.
    """
    template = Template.of(tokenizer)
    completion = unmarked_answer(tokenizer, trace.completion)
    if goes_on(completion, template.turn, template.ends):
        raise EndedError("the answer goes on after the end of its turn; cut it there")
    return replace(trace, prompt=unmarked_prompt(tokenizer, trace.prompt), completion=completion)


def unmarked_answer(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    template = Template.of(tokenizer)
    return without_marks(text, template.turn, (*template.ends, cast("str", tokenizer.pad_token or "")))


class EndedError(UserError):
    """An answer that goes on after the end of its turn."""


def turn_record(tokenizer: PreTrainedTokenizerBase) -> TurnRecord:
    """What the student's template writes around its words, for the report."""
    template, ids = Template.of(tokenizer), stop_ids(tokenizer)
    turn = template.turn
    return TurnRecord(
        head=turn.head + turn.lead,
        end=turn.end,
        stops=tuple(cast("list[str]", tokenizer.convert_ids_to_tokens(ids))),
        stop_ids=tuple(ids),
        chain=turn.chain,
        listed=turn.stop in template.ends,
        date=f"{DATE:%d %B %Y}" if dated(cast("Any", tokenizer).get_chat_template()) else None,
    )
