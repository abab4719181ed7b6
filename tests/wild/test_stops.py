"""Answers that one of several ends stops, and what is judged of them: axolotl-ai-cloud/axolotl#3756."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from wild import jsonl, llama, recipe, rows, tokenizer

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import EvalConfig, LoraConfig
from mot_lora.data.chat import prompt_text, stop_ids
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Question
from mot_lora.training import evaluation
from mot_lora.training.adapter import add_adapter
from mot_lora.training.student import load_model

Call = Callable[..., tuple[int, str, str]]

GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
CHATML_BASE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GLM = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKS = ("<eos>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|observation|>")


def writes(folder: Path, template: str, tokens: Sequence[str], eos: str, ends: Sequence[str]) -> None:
    """A student that writes these tokens after a new line, the last of them for ever: its head permutes its input."""
    tok = tokenizer(folder, template=template, eos=eos, extra=MARKS)
    n = len(tok)
    model = LlamaForCausalLM(llama(vocab_size=n, hidden_size=288, num_hidden_layers=1, intermediate_size=8).config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(n, 288))
        model.lm_head.weight.zero_()
        ids = [tok.encode("\n")[-1], *tok.convert_tokens_to_ids(list(tokens))]
        for before, after in zip(ids, [*ids[1:], ids[-1]], strict=True):
            model.lm_head.weight[after, before] = 1.0
    model.generation_config.eos_token_id = tok.convert_tokens_to_ids(list(ends))
    model.save_pretrained(folder)


def loaded(folder: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    model = load_model(Checkpoint.open(folder), "none", torch.device("cpu"))
    return add_adapter(model, LoraConfig(r=2, alpha=4)).eval(), load_tokenizer(folder)


@pytest.fixture(params=["by decode", "by generate"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by generate":
        monkeypatch.setattr(evaluation, "decodes", lambda _: False)


@pytest.mark.parametrize(
    ("template", "tokens", "eos", "ends"),
    [
        (GEMMA, ["B", "<end_of_turn>"], "<eos>", ["<eos>", "<end_of_turn>"]),
        (GEMMA, ["B", "<eos>"], "<eos>", ["<eos>", "<end_of_turn>"]),
        (GEMMA, ["B", "<end_of_turn>"], "<eos>", ["<eos>"]),  # the template alone knows it
        (GEMMA, ["B", "<|observation|>"], "<eos>", ["<|observation|>", "<eos>"]),
        (CHATML_BASE, ["B", "<|im_end|>"], "<|endoftext|>", ["<|endoftext|>"]),
        (CHATML_BASE, ["B", "<|endoftext|>"], "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
        (GLM, ["B", "<|user|>"], "<|endoftext|>", ["<|endoftext|>", "<|user|>", "<|observation|>"]),
        (CHATML_BASE, ["B", "<", "/", "s", ">", "<|im_end|>"], "<|im_end|>", ["<|im_end|>"]),  # an end in letters
        (CHATML_BASE, ["B", "<|pad|>"], "<|im_end|>", ["<|im_end|>"]),  # pads to the limit
    ],
)
@pytest.mark.usefixtures("way")
def test_an_answer_is_judged_without_what_ended_it(
    tmp_path: Path, template: str, tokens: list[str], eos: str, ends: list[str]
) -> None:
    writes(tmp_path, template, tokens, eos, ends)
    model, tok = loaded(tmp_path)
    record, answers = evaluation.evaluate(
        model, tok, [Question("Which?", "B")], {}, EvalConfig(max_new_tokens=8), seed=0
    )
    assert answers[0].texts == ("B",)
    assert record.accuracy == 1.0


def test_a_header_that_the_template_gives_to_no_prompt_is_given_when_asked(tmp_path: Path) -> None:
    template = GEMMA.partition("{% if add_generation_prompt")[0]
    writes(tmp_path, template, ["B", "<end_of_turn>"], "<eos>", ["<eos>"])
    tok = load_tokenizer(tmp_path)
    assert prompt_text(tok, ({"role": "user", "content": "q"},)).endswith("<end_of_turn>\n<start_of_turn>assistant\n")
    assert tok.convert_ids_to_tokens(stop_ids(tok)) == ["<end_of_turn>", "<eos>"]


@pytest.mark.parametrize(
    ("file", "said", "ends"),
    [
        ("generation_config.json", {"eos_token_id": [256, 257]}, [256, 257]),
        ("generation_config.json", {"eos_token_id": 256}, [256]),
        ("config.json", {"eos_token_id": 256}, [256]),  # as transformers takes it where there is no other
        ("generation_config.json", {"eos_token_id": None}, []),
        ("generation_config.json", {}, []),
        ("generation_config.json", [], []),
    ],
)
def test_the_ends_that_a_checkpoint_lists(tmp_path: Path, file: str, said: Any, ends: list[int]) -> None:
    tok = tokenizer(tmp_path, eos="<|endoftext|>")
    (tmp_path / file).write_text(json.dumps(said))
    ids = stop_ids(load_tokenizer(tmp_path))
    im_end = tok.convert_tokens_to_ids("<|im_end|>")
    assert ids == list(dict.fromkeys([im_end, tok.eos_token_id, *ends]))


def test_a_tokenizer_without_an_end_takes_the_one_that_its_checkpoint_lists(tmp_path: Path) -> None:
    tok = tokenizer(None)
    tok.eos_token = None
    tok.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257]}')
    assert load_tokenizer(tmp_path).eos_token_id == 257


@pytest.mark.parametrize(("ends", "told"), [(["<|endoftext|>"], True), (["<|endoftext|>", "<|im_end|>"], False)])
def test_an_end_that_nothing_lists_is_told(tmp_path: Path, call: Call, ends: list[str], told: bool) -> None:
    """Who serves the student must know of it: huggingface/trl#3299."""
    writes(tmp_path, CHATML_BASE, ["B"], "<|endoftext|>", ends)
    config = recipe(tmp_path, tmp_path, jsonl(tmp_path / "one.jsonl", rows()))
    status, out, err = call("data", config)
    assert status == 0, err
    said = " ".join(out.split())
    assert "answer is between '<|im_end|>\\n<|im_start|>assistant\\n' and '<|im_end|>'" in said
    assert ("neither its tokenizer nor its checkpoint lists <|im_end|> as the end of an answer" in said) == told
    _, out, _ = call("data", config, "--json")
    turn = json.loads(out)["turn"]
    assert turn["head"] == "<|im_end|>\n<|im_start|>assistant\n"
    assert (turn["end"], turn["stops"], turn["listed"]) == ("<|im_end|>", ["<|im_end|>", "<|endoftext|>"], not told)


def test_what_is_exported_stops_where_it_was_taught_to(tmp_path: Path, call: Call) -> None:
    base = tmp_path / "base"
    writes(base, CHATML_BASE, ["B"], "<|endoftext|>", ["<|endoftext|>"])
    config = recipe(tmp_path, base, jsonl(tmp_path / "one.jsonl", rows()), branch={"steps": 1})
    status, _, err = call("run", config)
    assert status == 0, err
    status, _, err = call("export", tmp_path / "run", "--round", 1, "--out", tmp_path / "out")
    assert status == 0, err
    before, after = (json.loads((f / "generation_config.json").read_text()) for f in (base, tmp_path / "out"))
    tok = load_tokenizer(tmp_path / "out")
    assert after.pop("eos_token_id") == tok.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert after == {k: v for k, v in before.items() if k != "eos_token_id"}
    assert "An answer ends with <|im_end|>" in (tmp_path / "out" / "README.md").read_text()
