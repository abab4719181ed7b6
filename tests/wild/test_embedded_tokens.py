"""Tokens that a tokenizer has and its model does not embed: meta-llama/llama-cookbook#189, hiyouga/LlamaFactory#885."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from transformers import AutoModelForCausalLM
from wild import jsonl, llama, recipe, rows, tokenizer

from mot_lora.data.encoding import collate, encode
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Trace
from mot_lora.training.loss import batch_loss

Call = Callable[..., tuple[int, str, str]]


def short_by(folder: Path, n: int, **named: Any) -> int:
    """A student whose model embeds n tokens fewer than its tokenizer has; the number that it embeds."""
    embedded = len(tokenizer(folder, extra=("<|last|>",), **named)) - n
    llama(folder, vocab_size=embedded, num_hidden_layers=1)
    return embedded


def asked(question: str, completion: str) -> Trace:
    return Trace(({"role": "user", "content": question},), completion)


def test_padding_with_a_token_that_is_not_embedded_does_no_harm(tmp_path: Path) -> None:
    short_by(tmp_path, 1, pad="<|last|>")
    tok, model = load_tokenizer(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    examples = [encode(tok, asked("q", "5")), encode(tok, asked("a longer one", "<think>\nso\n</think>\n\n5"))]
    batch = collate(examples, tok.pad_token_id)
    with torch.no_grad():
        together, n = batch_loss(model, batch, 64)
        alone = [batch_loss(model, collate([e], tok.pad_token_id), 64) for e in examples]
    assert n == sum(count for _, count in alone)
    assert float(together) == pytest.approx(sum(float(loss) for loss, _ in alone), rel=1e-5)


def test_where_the_tokenizers_end_is_not_embedded_either_another_one_pads(tmp_path: Path) -> None:
    embedded = short_by(tmp_path, 2, pad="<|last|>", eos="<|bos|>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257]}')
    assert load_tokenizer(tmp_path).pad_token_id == 257 < embedded


def test_a_pad_token_that_is_embedded_is_kept(tmp_path: Path) -> None:
    short_by(tmp_path, 1)
    assert load_tokenizer(tmp_path).pad_token == "<|pad|>"


@pytest.mark.parametrize("where", ["question", "reasoning", "answer"])
def test_a_row_with_a_token_that_is_not_embedded_is_left_out_and_named(tmp_path: Path, call: Call, where: str) -> None:
    embedded = short_by(tmp_path, 1)
    some = rows()
    some[3][where] += " <|last|>."
    file = jsonl(tmp_path / "one.jsonl", some)
    status, out, err = call("data", recipe(tmp_path, tmp_path, file), "--json")
    assert status == 0, err
    (teacher,) = json.loads(out)["teachers"]
    reason = "with a token that the student does not embed"
    assert teacher["left_out"] == {reason: 1}
    said = f"{file}:4: token {embedded} ('<|last|>') is beyond the student's {embedded} embeddings"
    assert teacher["bad"][reason].startswith(said)
    assert refused(call("data", recipe(tmp_path, tmp_path, file), "teachers.0.on_bad_row=stop")).startswith(said)


def test_rows_with_tokens_that_are_not_embedded_end_a_run_before_it_begins(tmp_path: Path, call: Call) -> None:
    short_by(tmp_path, 1)
    some = [row | {"answer": "<|last|>"} for row in rows(6)]
    file = jsonl(tmp_path / "one.jsonl", some)
    assert refused(call("run", recipe(tmp_path, tmp_path, file))).startswith(f"{file}:1: token ")
    assert not (tmp_path / "run").exists()


def test_a_template_whose_marks_are_not_embedded_is_one_line(tmp_path: Path, call: Call) -> None:
    """Marks of a template that were added to the tokenizer, and the model never resized."""
    embedded = short_by(tmp_path, 6, pad=None)
    line = refused(call("data", recipe(tmp_path, tmp_path, jsonl(tmp_path / "one.jsonl", rows()))))
    assert "/one.jsonl:1: token " in line
    assert f"is beyond the student's {embedded} embeddings" in line
    assert "resize_token_embeddings" in line


@pytest.mark.parametrize("key", ["data", "validation"])
def test_a_question_with_a_token_that_is_not_embedded_is_one_line(tmp_path: Path, call: Call, key: str) -> None:
    short_by(tmp_path, 1)
    asked_ = jsonl(tmp_path / "asked.jsonl", [{"question": "What is <|last|>?", "answer": "5"}])
    other = jsonl(tmp_path / "other.jsonl", [{"question": "What is it?", "answer": "5"}])
    config = recipe(
        tmp_path, tmp_path, jsonl(tmp_path / "one.jsonl", rows()), eval={"data": str(other), key: str(asked_)}
    )
    assert refused(call("data", config)).startswith(f"{asked_}:1: token ")


def test_token_ids_beyond_the_embeddings_are_one_line(tmp_path: Path, call: Call) -> None:
    embedded = short_by(tmp_path, 1)
    ids = [65, 66, embedded]
    file = jsonl(tmp_path / "one.jsonl", [{"input_ids": ids, "labels": [-100, *ids[1:]]}])
    assert refused(call("data", recipe(tmp_path, tmp_path, file))).startswith(f"{file}:1: token {embedded} ")


def test_more_embeddings_than_tokens_are_nothing_to_speak_of(tmp_path: Path, call: Call) -> None:
    tokenizer(tmp_path)
    llama(tmp_path, vocab_size=320, num_hidden_layers=1)
    status, _, err = call("data", recipe(tmp_path, tmp_path, jsonl(tmp_path / "one.jsonl", rows())))
    assert status == 0, err
