"""A trace as the student reads it: what the template makes of it, its tokens, and which of them are trained."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mot_lora.data.chat import prompt_text
from mot_lora.data.encoding import collate, encode, segments
from mot_lora.data.reasoning import think
from mot_lora.data.scoring import final_answer
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import IGNORE, Example, Trace, read_trace
from mot_lora.errors import UserError
from mot_lora.reader import demo_path

fuzzed = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(demo_path("student"))


@pytest.fixture(scope="module")
def thinker(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One whose template opens the chain of thought itself, as those of DeepSeek-R1 and QwQ do."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    return other


def trace_of(row: dict[str, Any]) -> Trace:
    trace = read_trace(row, "row 1")
    assert isinstance(trace, Trace)
    return trace


def asked(question: str, completion: str) -> Trace:
    return Trace(({"role": "user", "content": question},), completion)


def trained(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    text = tokenizer.decode([label for label in example.labels if label != IGNORE])
    assert isinstance(text, str)
    return text


def untrained(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    text = tokenizer.decode([i for i, label in zip(example.input_ids, example.labels, strict=True) if label == IGNORE])
    assert isinstance(text, str)
    return text


# --- the mask ------------------------------------------------------------------------------------------


def test_the_mask_covers_the_prompt_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    trace = trace_of({"question": "How much is 12 + 3?", "reasoning": " 12 + 3 = 15\nso 15 ", "answer": "15"})
    example = encode(tokenizer, trace)
    prompt = "<|im_start|>user\nHow much is 12 + 3?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(tokenizer, trace.prompt) == prompt
    assert tokenizer.decode(example.input_ids[: example.prompt_length]) == prompt
    labels = [label for label in example.labels if label != IGNORE]
    assert tokenizer.decode(labels) == "<think>\n12 + 3 = 15\nso 15\n</think>\n\n15<|im_end|>"
    assert labels[-1] == tokenizer.eos_token_id
    assert example.labels == (IGNORE,) * example.prompt_length + example.input_ids[example.prompt_length :]
    assert len(example) == len(example.input_ids) == len(example.labels)


def test_a_trace_without_reasoning_is_trained_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    example = encode(tokenizer, trace_of({"question": "q", "answer": 7}))
    assert trained(tokenizer, example) == "7<|im_end|>"


def test_earlier_turns_are_read_whole_and_not_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1 = ?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "<think>\n2 + 2 = 4\n</think>\n\n4"},
    ]
    example = encode(tokenizer, trace_of({"messages": messages}))
    prompt = tokenizer.decode(example.input_ids[: example.prompt_length])
    assert [m["content"] in prompt for m in messages] == [True, True, True, True, False]
    assert prompt.endswith("<|im_start|>assistant\n")
    assert trained(tokenizer, example) == messages[-1]["content"] + "<|im_end|>"


words = st.text("abc 0123+-=?.\n", min_size=1, max_size=30).filter(str.strip)


@fuzzed
@given(words, words, words)
def test_what_is_trained_is_the_completion_and_the_end(
    tokenizer: PreTrainedTokenizerBase, question: str, chain: str, answer: str
) -> None:
    for trace in (asked(question, think(chain, answer)), asked(question, answer)):
        example = encode(tokenizer, trace)
        assert trained(tokenizer, example) == trace.completion + "<|im_end|>"
        assert untrained(tokenizer, example) == prompt_text(tokenizer, trace.prompt)
        assert example.labels[example.prompt_length :] == example.input_ids[example.prompt_length :]


# --- templates that open the chain ---------------------------------------------------------------------


@fuzzed
@given(words, words, words)
def test_a_chain_that_the_template_opens_is_not_opened_twice(
    thinker: PreTrainedTokenizerBase, question: str, chain: str, answer: str
) -> None:
    example = encode(thinker, asked(question, think(chain, answer)))
    assert untrained(thinker, example).endswith("<|im_start|>assistant\n<think>\n")
    assert trained(thinker, example) == f"{chain.strip()}\n</think>\n\n{answer}<|im_end|>"
    assert thinker.decode(example.input_ids).count("<think>") == 1


def test_a_completion_that_begins_inside_the_chain_is_the_same_for_every_template(
    tokenizer: PreTrainedTokenizerBase, thinker: PreTrainedTokenizerBase
) -> None:
    begun = trace_of({"prompt": "1 + 1?", "completion": "so 2\n</think>\n\n2"})
    whole = trace_of({"prompt": "1 + 1?", "completion": "<think>\nso 2\n</think>\n\n2"})
    assert encode(thinker, begun) == encode(thinker, whole)
    assert encode(tokenizer, begun) == encode(tokenizer, whole)
    assert trained(thinker, encode(thinker, begun)) == "so 2\n</think>\n\n2<|im_end|>"


def test_an_answer_without_reasoning_ends_the_chain_that_the_template_opened(thinker: PreTrainedTokenizerBase) -> None:
    # else the student would learn to answer within its thoughts, and never to end them
    example = encode(thinker, asked("1 + 1?", "2"))
    text = thinker.decode(example.input_ids)
    assert text.endswith("<think>\n\n</think>\n\n2<|im_end|>")
    assert final_answer(text.removesuffix("<|im_end|>")) == "2"
    assert untrained(thinker, example).endswith("<think>\n")


# --- pieces and batches --------------------------------------------------------------------------------


def test_an_example_is_shown_in_pieces_with_and_without_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    trace = asked("1 + 1?", "<think>\nso\n</think>\n\n2")
    shown = segments(tokenizer, encode(tokenizer, trace))
    prompt = prompt_text(tokenizer, trace.prompt)
    assert [(s.text, s.trained) for s in shown] == [(prompt, False), (f"{trace.completion}<|im_end|>", True)]


@fuzzed
@given(st.lists(st.tuples(st.integers(0, 200), st.booleans()), min_size=1, max_size=12))
def test_pieces_alternate_and_are_the_whole_example(
    tokenizer: PreTrainedTokenizerBase, tokens: list[tuple[int, bool]]
) -> None:
    example = Example(tuple(t for t, _ in tokens), tuple(t if on else IGNORE for t, on in tokens))
    shown = segments(tokenizer, example)
    marks = [on for _, on in tokens]
    assert [s.trained for s in shown] == [on for i, on in enumerate(marks) if i == 0 or on != marks[i - 1]]
    pieces, at = [], 0
    for i in [*(i for i in range(1, len(marks)) if marks[i] != marks[i - 1]), len(marks)]:
        pieces.append(tokenizer.decode(list(example.input_ids[at:i])))
        at = i
    assert [s.text for s in shown] == pieces


def test_collate_pads_on_the_right_and_trains_no_padding() -> None:
    batch = collate([Example.after((5, 6, 7), 1), Example((8, 9, 10, 11, 12), (IGNORE, 9, IGNORE, 11, 12))], pad_id=99)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 99, 99], [8, 9, 10, 11, 12]]
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, IGNORE], [IGNORE, 9, IGNORE, 11, 12]]
    assert {t.dtype for t in batch.values()} == {torch.int64}


# --- mistakes ------------------------------------------------------------------------------------------


def test_a_tokenizer_that_cannot_chat_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}: its tokenizer cannot be loaded: [^\n]+$"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template; use the chat or instruct form"):
        load_tokenizer(tmp_path / "plain")
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(tmp_path / "endless")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"model": 7}', '{"tokenizer_class": "None"}'])
def test_a_damaged_tokenizer_is_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, content: str
) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    try:
        said = f"{tmp_path}: {load_tokenizer(tmp_path).eos_token}"
    except UserError as e:
        said = str(e)
    assert said.startswith(f"{tmp_path}: ")
    assert not re.search(r"[\r\n]", said)


def test_a_tokenizer_without_padding_pads_with_its_end_on_the_left(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.pad_token_id, loaded.padding_side) == (tokenizer.eos_token_id, "left")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('System role\nnot supported') }}",
        "{{ messages[0].content.missing.more }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 / 0 }}",
        "{% for m in messages %}",
    ],
)
def test_a_conversation_that_the_template_does_not_take_is_one_line(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = template
    with pytest.raises(UserError, match=r"^the student's chat template does not accept a conversation of user \(") as e:
        encode(strict, asked("q", "a"))
    assert not re.search(r"[\r\n]", str(e.value))
