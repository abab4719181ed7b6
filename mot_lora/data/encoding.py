"""Traces as tokens with a loss mask, and tokens as answers."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mot_lora.data.chat import Template, prompt_text, stop_ids, unmarked
from mot_lora.data.marks import ENDS, without_ends
from mot_lora.data.reasoning import THINK, THINK_END, opens_chain
from mot_lora.data.records import Segment
from mot_lora.data.tokenizer import text_of_ids, token_ids
from mot_lora.data.traces import IGNORE, Example, Trace


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


def _following(tokenizer: PreTrainedTokenizerBase, text: str, prompt: list[int], answer: str) -> list[int]:
    """The tokens of an answer after a prompt's, which are as they are when an answer is asked for.

    Alone, sentencepiece would begin it with a space. Where a token spans both, the prompt keeps its own tokens, and the
    answer has those that it would have at the beginning of a line.
    """
    whole = token_ids(tokenizer, text + answer)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    line, new = token_ids(tokenizer, "\n"), token_ids(tokenizer, f"\n{answer}")
    return new[len(line) :] if new[: len(line)] == line else token_ids(tokenizer, answer)


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: Sequence[int]) -> str:
    """What a student has written after a prompt, without the marks of its turn and the padding.

    A chain of thought that the prompt has opened begins with <think> here. Special tokens stay: marks of the chain may
    be among them, and are needed to find the answer.
    """
    drop = {*stop_ids(tokenizer), cast("int", tokenizer.pad_token_id)}
    text = text_of_ids(tokenizer, (i for i in ids if i not in drop))
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
            text=text_of_ids(tokenizer, example.input_ids[i:j]),
            trained=example.labels[i] != IGNORE,
        )
        for i, j in parts
    )


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
