"""A trace as the student reads it: its chat template, tokens and loss mask."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mot_lora.errors import UserError
from mot_lora.loss import IGNORE
from mot_lora.records import Segment
from mot_lora.thought import opens_chain
from mot_lora.traces import Example, Message, Trace


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The student's tokenizer, padding on the left for generation.

    Errors: UserError when there is none, or it has no chat template or no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as e:  # what the libraries raise for a damaged one is of a dozen kinds
        raise UserError(f"{path}: its tokenizer cannot be loaded: {[*str(e).splitlines(), repr(e)][0]}") from e
    if not tokenizer.chat_template:
        raise UserError(f"{path}: its tokenizer has no chat template; use the chat or instruct form of the model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> str:
    """The conversation as the student reads it, up to where its answer begins.

    Errors: UserError for a conversation that the template does not take.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        roles = ", ".join(m["role"] for m in prompt)
        raise UserError(f"the student's chat template does not take a conversation of {roles} ({e})") from e
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, trace: Trace) -> Example:
    """Tokenize a trace for training; the loss is on the completion and the end token, <think> included.

    Templates drop earlier chains of thought and mark no assistant spans, so only the prompt goes through the template.
    """
    text, completion = prompt_text(tokenizer, trace.prompt), trace.completion
    if opens_chain(text):
        # the chain is open: what has none must first close it
        whole = completion if "</think>" in completion else f"<think>\n\n</think>\n\n{completion}"
        completion = whole.removeprefix("<think>").removeprefix("\n")
    # verbose would warn of more tokens than the tokenizer's file says, which branch.max_length is for
    prompt = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    answer = tokenizer.encode(completion, add_special_tokens=False, verbose=False)
    return Example.after((*prompt, *answer, cast("int", tokenizer.eos_token_id)), len(prompt))


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
