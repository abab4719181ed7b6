"""Answers and held-out losses on a GPU: as much memory as is planned, less where it runs out, none afterwards."""

import gc
from contextlib import nullcontext
from pathlib import Path

import falsecuda
import pytest
import torch
from false_gpu import false_gpu
from peft import PeftModel

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import EvalConfig, LoraConfig
from mot_lora.data.chat import prompt_text
from mot_lora.data.encoding import encode
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Example, Question, Trace
from mot_lora.errors import UserError
from mot_lora.training.adapter import add_adapter
from mot_lora.training.decoding import Decoding, decode
from mot_lora.training.evaluation import evaluate
from mot_lora.training.loss import computing
from mot_lora.training.student import load_model

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


def every_token_is_the_likeliest(path: Path, quantization: str) -> None:
    """Save ties in rounding: what the model makes of a whole answer at once has no likelier one."""
    model, tokenizer = student(path, quantization), load_tokenizer(path)
    base, how = model.get_base_model(), Decoding(24, frozenset([tokenizer.eos_token_id]))
    texts = [prompt_text(tokenizer, [{"role": "user", "content": q.question}]) for q in QUESTIONS]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    said: list[list[list[int]]] = []
    for adapter in (True, False):
        with nullcontext() if adapter else model.disable_adapter(), torch.no_grad(), computing(base):
            found = dict(decode(base, prompts, [0] * len(prompts), how, 3, lambda _: None, 10**6))
            said.append([found[k] for k in range(len(prompts))])
            for prompt, new in zip(prompts, said[-1], strict=True):
                ids = torch.tensor([[*prompt, *new]], device=GPU)
                logits = base(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
                gap = logits.max(-1).values - logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
                assert (gap <= 0.1 * logits.std(-1)).all()
    assert said[0] != said[1]


@false_gpu()
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_answers_are_those_of_greedy_decoding(qwen3: Path, quantization: str) -> None:
    every_token_is_the_likeliest(qwen3, quantization)


@false_gpu(name="Tesla T4", gib=16, capability="7.5")
def test_answers_before_ampere(llama: Path) -> None:
    every_token_is_the_likeliest(llama, "nf4")


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
    assert eight - two == pytest.approx(6 * row, rel=0.1)


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
        assert sum(a == b for a, b in zip(answers, less, strict=True)) >= len(answers) // 2  # bf16 has ties
        gc.collect()
        assert falsecuda.held() == before
        torch.cuda.set_per_process_memory_fraction((before + 2**14) / total)
        with pytest.raises(
            UserError, match=r"memory even one by one \(.*; free .*, or start .* eval\.max_new_tokens below 100"
        ):
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
