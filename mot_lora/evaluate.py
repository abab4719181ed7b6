"""How good the student is: answers to questions, and the loss on held-out traces."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mot_lora.chat import collate, prompt_text
from mot_lora.config import EvalConfig
from mot_lora.errors import UserError, is_out_of_memory
from mot_lora.loss import batch_loss, computing
from mot_lora.progress import Progress, silent
from mot_lora.records import Answer, EvaluationRecord
from mot_lora.scoring import is_right, mean_score
from mot_lora.thought import opens_chain
from mot_lora.traces import Example, Question

LOSS_CHUNK = 1024
# tokens in a batch of several traces: a layer of an 8B student takes some 2 GiB for them, and a GPU is busy with fewer
LOSS_TOKENS = 16_384


def evaluate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    held_out: Mapping[str, Sequence[Example]],
    settings: EvalConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> tuple[EvaluationRecord, list[Answer]]:
    """Answer the questions and measure the loss on each teacher's held-out traces, with the adapter as it is set.

    Accuracy is avg@n, judged by math-verify; the loss is in nats a trained token. This is the seam `evaluate=` of
    `run`.

    >>> evaluate(model, tokenizer, [Question("1 + 1 = ?", "2")], {}, EvalConfig(), seed=0)  # doctest: +SKIP
    """
    start = time.monotonic()
    model.eval()
    try:
        with torch.no_grad():
            losses = held_out_losses(model, tokenizer, held_out, settings, progress)
            texts = generate(model, tokenizer, questions, settings, seed=seed, progress=progress)
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        numbers = f"eval.batch_size {settings.batch_size} or eval.max_new_tokens {settings.max_new_tokens}"
        raise UserError(f"out of memory ({' '.join(str(e).split())[:160]}); lower {numbers}") from e
    answers = [
        Answer(
            question=q.question,
            answer=q.answer,
            texts=tuple(samples),
            score=sum(is_right(t, q.answer) for t in samples) / len(samples),
        )
        for q, samples in zip(questions, texts, strict=True)
    ]
    accuracy, interval = mean_score([a.score for a in answers]) if answers else (None, None)
    record = EvaluationRecord(
        questions=len(answers),
        accuracy=accuracy,
        interval=interval,
        losses=losses,
        seconds=time.monotonic() - start,
    )
    return record, answers


def held_out_losses(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Mapping[str, Sequence[Example]],
    settings: EvalConfig,
    progress: Progress = silent,
) -> dict[str, float]:
    """The mean loss over the trained tokens of each teacher's examples, in nats.

    A batch holds `settings.batch_size` traces, and fewer where they have more than 16,384 tokens, with padding.
    """
    losses: dict[str, float] = {}
    done, total = 0, sum(map(len, held_out.values()))
    for name, examples in held_out.items():
        summed, count = 0.0, 0
        for chosen in _batches(examples, settings.batch_size):
            batch = collate(chosen, cast("int", tokenizer.pad_token_id))
            batch = {key: value.to(model.device) for key, value in batch.items()}
            loss, n = batch_loss(model.get_base_model(), batch, LOSS_CHUNK)
            summed, count, done = summed + float(loss), count + n, done + len(chosen)
            progress("loss", done, total)
        if count:
            losses[name] = summed / count
    return losses


def _batches(examples: Sequence[Example], most: int) -> Iterator[list[Example]]:
    """The examples by length, in batches of at most so many; long ones by themselves."""
    batch: list[Example] = []
    for example in sorted(examples, key=len):
        if batch and (len(batch) == most or (len(batch) + 1) * len(example) > LOSS_TOKENS):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    settings: EvalConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> list[list[str]]:
    """The student's answers, `settings.samples` texts to each question, in the order of the questions.

    Prompts of like length share a batch, padded on the left. Sampling draws from `seed` and leaves the global random
    state as it was.
    """
    prompts = [prompt_text(tokenizer, [{"role": "user", "content": q.question}]) for q in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: list[list[str]] = [[] for _ in prompts]
    sampled: dict[str, Any] = (
        {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        if settings.temperature
        else {"do_sample": False}
    )
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_return_sequences=settings.samples,
        eos_token_id=_stops(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **sampled,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), computing(model.get_base_model()):
        torch.manual_seed(seed)
        if order:
            progress("answer", 0, len(order))
        for i in range(0, len(order), settings.batch_size):
            chosen = order[i : i + settings.batch_size]
            batch = tokenizer(
                [prompts[k] for k in chosen], return_tensors="pt", padding=True, add_special_tokens=False
            ).to(model.device)
            output = cast("Any", model).generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config
            )
            new = output[:, batch["input_ids"].shape[1] :].tolist()
            for j, ids in enumerate(new):
                k = chosen[j // settings.samples]
                begun = "<think>\n" if opens_chain(prompts[k]) else ""  # a chain that never ends is no answer
                texts[k].append(begun + _decode(tokenizer, ids))
            progress("answer", i + len(chosen), len(order))
    return texts


def _stops(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    said = getattr(model.get_base_model().generation_config, "eos_token_id", None)
    stops = said if isinstance(said, list) else [said]
    return sorted({cast("int", tokenizer.eos_token_id), *(s for s in stops if s is not None)})


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    # <think> may be a special token, and is needed to find the answer: drop only what ends or pads a text
    drop = {cast("int", tokenizer.eos_token_id), cast("int", tokenizer.pad_token_id)}
    return cast("str", tokenizer.decode([i for i in ids if i not in drop], skip_special_tokens=False))
