"""Answers and held-out losses on a GPU: as much memory as is planned, less where it runs out, none afterwards."""

import gc
from pathlib import Path

import falsecuda
import pytest
import torch
from false_gpu import false_gpu
from peft import PeftModel

from mot_lora.base import load_model
from mot_lora.branch import add_adapter
from mot_lora.chat import encode, load_tokenizer, prompt_text
from mot_lora.checkpoint import Checkpoint
from mot_lora.config import EvalConfig, LoraConfig
from mot_lora.errors import UserError
from mot_lora.evaluate import evaluate
from mot_lora.loss import computing
from mot_lora.traces import Example, Question, Trace

GPU = torch.device("cuda", 0)
QUESTIONS = [Question("7 + " * n + "1 = ?", "8") for n in (5, 1, 9, 3, 7, 2, 12, 4)]
LONG = 100


def student(path: Path, quantization: str) -> PeftModel:
    """A student whose adapter is large enough for it to go on talking."""
    model = add_adapter(load_model(Checkpoint.open(path), quantization, GPU), LoraConfig(r=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


def traces(path: Path) -> dict[str, list[Example]]:
    tokenizer = load_tokenizer(path)
    return {"a": [encode(tokenizer, Trace(({"role": "user", "content": q.question},), "7 + " * 30)) for q in QUESTIONS]}


def by_hand(model: PeftModel, path: Path, question: str, tokens: int) -> str:
    """Greedy decoding without keys that are kept."""
    tokenizer, base = load_tokenizer(path), model.get_base_model()
    text = tokenizer.encode(prompt_text(tokenizer, [{"role": "user", "content": question}]), add_special_tokens=False)
    start = len(text)
    with torch.no_grad(), computing(base):
        while len(text) < start + tokens:
            token = int(base(input_ids=torch.tensor([text], device=GPU)).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            text.append(token)
    return tokenizer.decode(text[start:])


def answered_as_by_hand(path: Path, quantization: str) -> None:
    model, settings = student(path, quantization), EvalConfig(max_new_tokens=12, batch_size=3)
    for adapter in (True, False):
        with torch.no_grad():
            if adapter:
                record, answers = evaluate(model, load_tokenizer(path), QUESTIONS, {}, settings, seed=0)
                want = [by_hand(model, path, q.question, 12) for q in QUESTIONS]
            else:
                with model.disable_adapter():
                    record, answers = evaluate(model, load_tokenizer(path), QUESTIONS, {}, settings, seed=0)
                    want = [by_hand(model, path, q.question, 12) for q in QUESTIONS]
        same = sum(a.texts == (w,) for a, w in zip(answers, want, strict=True))
        assert same >= (len(want) - 1 if model.dtype != torch.float32 else len(want))  # in 16 bits there are ties
        assert record.at_once == {}


@false_gpu()
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_answers_are_those_of_one_at_a_time(qwen3: Path, quantization: str) -> None:
    answered_as_by_hand(qwen3, quantization)


@false_gpu(name="Tesla T4", gib=16, capability="7.5")
def test_answers_before_ampere(llama: Path) -> None:
    answered_as_by_hand(llama, "nf4")


@false_gpu()
def test_memory_is_that_of_keys_and_values_and_is_given_back(qwen3: Path) -> None:
    model, tokenizer = student(qwen3, "none"), load_tokenizer(qwen3)
    layers, heads, width = 2, 2, 32
    before = falsecuda.held()

    def peak(batch_size: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        evaluate(model, tokenizer, QUESTIONS, {}, EvalConfig(max_new_tokens=LONG, batch_size=batch_size), seed=0)
        gc.collect()
        assert falsecuda.held() == before
        return falsecuda.peak() - before

    longest = max(
        len(tokenizer.encode(prompt_text(tokenizer, [{"role": "user", "content": q.question}]))) for q in QUESTIONS
    )
    row = 2 * layers * heads * width * (longest + LONG) * 2  # bf16
    two, eight = peak(2), peak(8)
    # beside them one layer's in fp32, which attention on a CPU makes of what is in 16 bits
    assert 6 * row <= eight - two <= 6 * row * (1 + 7 / (2 * layers))


@false_gpu()
def test_out_of_memory_halves_and_gives_the_same(qwen3: Path) -> None:
    model, tokenizer, total = student(qwen3, "none"), load_tokenizer(qwen3), torch.cuda.mem_get_info()[1]
    before = falsecuda.held()
    for what, questions, held_out in (("answers", QUESTIONS, {}), ("traces", [], traces(qwen3))):
        settings = {n: EvalConfig(max_new_tokens=LONG, batch_size=n) for n in (3, 8)}
        want, answers = evaluate(model, tokenizer, questions, held_out, settings[8], seed=0)
        assert want.at_once == {}
        torch.cuda.reset_peak_memory_stats()
        evaluate(model, tokenizer, questions, held_out, settings[3], seed=0)
        ooms = torch.cuda.memory_stats()["num_ooms"]
        torch.cuda.set_per_process_memory_fraction((falsecuda.peak() + 2**12) / total)
        record, less = evaluate(model, tokenizer, questions, held_out, settings[8], seed=0)
        assert torch.cuda.memory_stats()["num_ooms"] > ooms
        assert record.at_once == {what: 2}
        assert record.losses == pytest.approx(want.losses, rel=0.01)
        assert sum(a == b for a, b in zip(answers, less, strict=True)) >= len(answers) - 1  # bf16 has ties
        gc.collect()
        assert falsecuda.held() == before
        torch.cuda.set_per_process_memory_fraction((before + 2**14) / total)
        with pytest.raises(UserError, match=r"one by one; lower eval\.max_new_tokens 100 or branch\.max_length"):
            evaluate(model, tokenizer, questions, held_out, settings[8], seed=0)
        torch.cuda.set_per_process_memory_fraction(1.0)


@false_gpu()
def test_an_interruption_gives_the_memory_back(qwen3: Path) -> None:
    model, tokenizer = student(qwen3, "nf4"), load_tokenizer(qwen3)
    gc.collect()
    before = falsecuda.held()

    def stop(_stage: str, done: int, *_counts: object, **_numbers: object) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, QUESTIONS, {}, EvalConfig(max_new_tokens=9, batch_size=3), seed=0, progress=stop)
    assert falsecuda.held() == before
