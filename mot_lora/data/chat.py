"""A trace as the student reads it: its chat template, tokens and loss mask."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from mot_lora.data.conversation import Message, tool_names, with_written_arguments
from mot_lora.data.reasoning import THINK, THINK_END, opens_chain
from mot_lora.data.traces import IGNORE, Example, Trace
from mot_lora.data.turn import (
    CLOSED,
    DATE,
    EMPTY_CHAIN,
    ENDS,
    Turn,
    dated,
    goes_on,
    is_rendered,
    pinned,
    rendered_by,
    unrendered,
    without_ends,
    without_marks,
)
from mot_lora.errors import UserError
from mot_lora.records import Segment, TurnRecord


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The student's tokenizer, padding on the left for generation; it knows the ends and embeddings of its model.

    Errors: UserError when there is none, or it has no chat template or no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as e:  # what the libraries raise for a damaged one is of a dozen kinds
        raise UserError(f"{path}: its tokenizer cannot be loaded: {[*str(e).splitlines(), repr(e)][0]}") from e
    if not tokenizer.chat_template:
        raise UserError(f"{path}: its tokenizer has no chat template; use the chat or instruct form of the model")
    known = cast("Any", tokenizer)
    known.listed_ends, known.embedded = _listed_ends(path), _embedded(path, trust_remote_code)
    if tokenizer.eos_token_id is None and known.listed_ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(known.listed_ends[0])
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no end-of-text token")
    # what is padded is never looked at, but it is embedded
    pads = [p for p in (tokenizer.pad_token_id, *end_ids(tokenizer)) if isinstance(p, int)]
    pad = next((p for p in pads if p < (known.embedded or p + 1)), pads[0])
    if pad != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.padding_side = "left"
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what the tokens of a trace depend on: the vocabulary and the chat template."""
    said = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _listed_ends(path: Path) -> tuple[int, ...]:
    """The tokens at which a checkpoint says that generation stops."""
    for name in ("generation_config.json", "config.json"):
        try:
            said: Any = json.loads((path / name).read_text(encoding="utf-8"))["eos_token_id"]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # loading the model tells what is wrong with them
        return tuple(i for i in (said if isinstance(said, list) else [said]) if isinstance(i, int))
    return ()


def _embedded(path: Path, trust_remote_code: bool) -> int | None:
    """How many tokens the model beside a tokenizer embeds; None where that cannot be told."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return cast("int | None", getattr(config.get_text_config(), "vocab_size", None))
    except Exception:  # there is no model, or loading it tells what is wrong with it
        return None


def check_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Errors: NotEmbeddedError for a token that the model beside the tokenizer does not embed."""
    embedded: int | None = getattr(tokenizer, "embedded", None)
    if embedded is not None and (token := max(ids, default=0)) >= embedded:
        raise NotEmbeddedError(
            f"token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) is beyond the student's {embedded} "
            "embeddings; resize the model (resize_token_embeddings), bring its own tokenizer, or leave such rows out"
        )


# --- the template ----------------------------------------------------------------------------------------


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
        """Errors: UserError for a template that takes no question, or several of which none is the default."""
        try:
            text = tokenizer.get_chat_template()
        except ValueError as e:
            names = ", ".join(cast("dict[str, str]", tokenizer.chat_template))
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
        text = tokenizer.apply_chat_template(
            cast("Any", said),
            tools=list(tools) or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=answer,
            **options,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(f"the student's chat template does not take a conversation of {roles} ({e})") from e
    assert isinstance(text, str)
    return EMPTY_CHAIN.sub("", text) if thinking and answer else text


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which the tokenizer and the checkpoint say that generation stops, the tokenizer's own first."""
    return list(dict.fromkeys([cast("int", tokenizer.eos_token_id), *getattr(tokenizer, "listed_ends", ())]))


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the one with which the template ends a turn first, and `end_ids`."""
    stop = cast("int", tokenizer.convert_tokens_to_ids(Template.of(tokenizer).turn.stop))
    return list(dict.fromkeys([stop, *end_ids(tokenizer)]))


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], tools: Sequence[Any] = ()) -> str:
    """The conversation as the student reads it, up to where its answer begins, with the tools that it offers.

    One that the student's own template has rendered already is taken as it is.

    Errors: UserError for a conversation that the template does not take, for calls of tools and tools that it leaves
    out, and for a conversation that another has rendered.
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
            f"its prompt is rendered by a chat template already, which is not the student's or has other messages "
            f"before it (it begins with {begin}); give what the user says alone"
        )
    # of several templates, one can be for conversations with tools
    written = pinned(tokenizer.get_chat_template(tools=list(tools))) if tools else template.text
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
        return {**message, "content": _without_marks(tokenizer, words)}
    found = unrendered(words, template.turn) or ()
    if message["role"] == "user" and len(found) == 1:
        words = found[0]["content"]
    return {**message, "content": without_ends(words, (*template.ends, template.turn.stop))}


def unmarked(tokenizer: PreTrainedTokenizerBase, trace: Trace) -> Trace:
    """A trace without the marks that a chat template adds: of a rendered prompt, and of the end of its answer.

    Errors: EndedError for an answer that goes on after the end of its turn.
    """
    template = Template.of(tokenizer)
    completion = _without_marks(tokenizer, trace.completion)
    if goes_on(completion, template.turn, template.ends):
        raise EndedError("the answer goes on after the end of its turn; cut it there")
    return replace(trace, prompt=unmarked_prompt(tokenizer, trace.prompt), completion=completion)


def _without_marks(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    template = Template.of(tokenizer)
    return without_marks(text, template.turn, (*template.ends, cast("str", tokenizer.pad_token or "")))


class EndedError(UserError):
    """An answer that goes on after the end of its turn."""


class NotEmbeddedError(UserError):
    """A token that the tokenizer has and the model does not embed."""


def turn_record(tokenizer: PreTrainedTokenizerBase) -> TurnRecord:
    """What the student's template writes around its words, for people to see."""
    template, ids = Template.of(tokenizer), stop_ids(tokenizer)
    turn = template.turn
    return TurnRecord(
        head=turn.head + turn.lead,
        end=turn.end,
        stops=tuple(cast("list[str]", tokenizer.convert_ids_to_tokens(ids))),
        stop_ids=tuple(ids),
        chain=turn.chain,
        listed=turn.stop in template.ends,
        date=f"{DATE:%d %B %Y}" if dated(tokenizer.get_chat_template()) else None,
    )


def encode(tokenizer: PreTrainedTokenizerBase, trace: Trace) -> Example:
    """Tokenize a trace for training; the loss is on the completion and the end of the turn, <think> included.

    Templates drop earlier chains of thought and mark no assistant spans, so only the prompt goes through the template;
    what heads and ends the answer is as the template writes it (`Turn`).
    """
    trace, turn = unmarked(tokenizer, trace), Template.of(tokenizer).turn
    text, completion = prompt_text(tokenizer, trace.prompt, trace.tools), trace.completion
    if opens_chain(text):
        # the chain is open: what has none must first close it
        whole = completion if THINK_END in completion else f"{THINK}\n\n{THINK_END}\n\n{completion}"
        completion = whole.removeprefix(THINK).removeprefix("\n")
    prompt = token_ids(tokenizer, text)
    answer = _following(tokenizer, text, prompt, turn.written(completion))
    stop = cast("int", tokenizer.convert_tokens_to_ids(turn.stop))
    return Example.after((*prompt, *answer, stop), len(prompt))


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a rendered text, which has its special ones in it."""
    # verbose would warn of more tokens than the tokenizer's file says, which branch.max_length is for
    return cast("list[int]", tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _following(tokenizer: PreTrainedTokenizerBase, text: str, prompt: list[int], answer: str) -> list[int]:
    """The tokens of an answer after a prompt's, which are as they are when an answer is asked for.

    Alone, vocabularies of sentencepiece would begin it with a space. Where a token lies across the seam, the prompt
    keeps its own tokens, and the answer's are those that it has at the beginning of a line.
    """
    whole = token_ids(tokenizer, text + answer)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    line, new = token_ids(tokenizer, "\n"), token_ids(tokenizer, f"\n{answer}")
    return new[len(line) :] if new[: len(line)] == line else token_ids(tokenizer, answer)


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: Sequence[int]) -> str:
    """What a student has written after a prompt, without what heads and ends its turn and pads it.

    A chain of thought that the prompt has opened begins with <think> here. Special tokens stay: marks of the chain may
    be such, and are needed to find the answer.
    """
    drop = {*stop_ids(tokenizer), cast("int", tokenizer.pad_token_id)}
    text = cast("str", tokenizer.decode([i for i in ids if i not in drop], skip_special_tokens=False))
    template = Template.of(tokenizer)
    words = template.turn.read(
        without_ends(text, (*template.ends, template.turn.stop, template.turn.tail.strip(), *ENDS))
    )
    return f"{THINK}\n{words}" if opens_chain(prompt) else words  # a chain that never ends is no answer


def segments(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[Segment, ...]:
    """An example decoded, in pieces with and without loss."""
    cuts = [i for i in range(1, len(example)) if (example.labels[i] == IGNORE) != (example.labels[i - 1] == IGNORE)]
    parts = zip([0, *cuts], [*cuts, len(example)], strict=True)
    return tuple(
        Segment(
            text=cast("str", tokenizer.decode(list(example.input_ids[i:j]), skip_special_tokens=False)),
            trained=example.labels[i] != IGNORE,
        )
        for i, j in parts
    )


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token's own text; that of a character made of several tokens is with the last of them.

    >>> pieces(tokenizer, tokenizer.encode("18 apples"))  # doctest: +SKIP
    ['18', ' apples']
    """
    texts: list[str] = []
    before = begin = 0  # a token is read with what stands before it, on which its spaces can depend
    for end in range(1, len(ids) + 1):
        said, whole = (cast("str", tokenizer.decode(list(ids[before:e]))) for e in (begin, end))
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and end - begin < 8 and end < len(ids):
            texts.append("")
        else:
            texts.append(whole[len(said) :])
            before, begin = begin, end
    return texts


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """A batch padded on the right: input_ids and labels, each [batch, longest] int64.

    There is no attention_mask: attention is causal, so no token sees what is on its right.
    """
    width = max(len(e) for e in examples)

    def padded(rows: Iterable[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    return {
        "input_ids": padded((e.input_ids for e in examples), pad_id),
        "labels": padded((e.labels for e in examples), IGNORE),
    }
