"""Evaluation of the student: accuracy on questions, and the loss on held-out traces."""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from mot_lora.config import BranchConfig, EvalConfig
from mot_lora.data.chat import prompt_text, stop_ids
from mot_lora.data.encoding import answer_text, collate
from mot_lora.data.scoring import is_right, mean_score
from mot_lora.data.tokenizer import token_ids
from mot_lora.data.traces import Example, Question, batches
from mot_lora.errors import enough_memory, is_out_of_memory
from mot_lora.merging.seeds import seed_for
from mot_lora.progress import Progress, silent
from mot_lora.records import Answer, EvaluationRecord
from mot_lora.training import decoding as decode
from mot_lora.training.decoding import Decoding, decodes
from mot_lora.training.loss import batch_loss, computing

LOSS_CHUNK = 1024
# tokens in a batch of several traces: enough to keep a GPU busy, and some 2 GiB for a layer of an 8B student
LOSS_TOKENS = 16_384


def loss_tokens(branch: BranchConfig, longest: int) -> int:
    """The tokens of an evaluation batch: no more than a training step whose longest trace has `longest` tokens.

    A longer held-out trace is measured alone.

    >>> loss_tokens(BranchConfig(batch_size=4), 1000)
    4000
    """
    rows, tokens = branch.largest(longest)
    return min(LOSS_TOKENS, rows * tokens)


class AtOnce:
    """A batch size that is halved whenever memory runs out.

    >>> at_once = AtOnce(8)
    >>> with at_once.attempt(8):
    ...     raise torch.OutOfMemoryError("CUDA out of memory")
    >>> at_once.most
    4
    """

    def __init__(self, first: int) -> None:
        self.first = self.most = first
        self._failed = False

    @contextmanager
    def attempt(self, count: int) -> Iterator[None]:
        """Try a batch of `count`. Out of memory ends the block, to be retried with half; a count of 1 raises."""
        if self._failed:  # only now are the frames of the failed attempt gone, and its memory can be freed
            gc.collect()
            torch.cuda.empty_cache()
            self._failed = False
        try:
            yield
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e) or count == 1:
                raise
            self.most, self._failed = count // 2, True

    @property
    def note(self) -> str:
        """A note for the progress display if the batch size was reduced; else empty."""
        return f"out of memory: {self.most} at once" if self.most < self.first else ""


def evaluate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    held_out: Mapping[str, Sequence[Example]],
    settings: EvalConfig,
    *,
    seed: int,
    progress: Progress = silent,
    tokens: int = LOSS_TOKENS,
) -> tuple[EvaluationRecord, list[Answer]]:
    """Answer the questions and measure the loss on each teacher's held-out traces, with the adapter on or off as set.

    Accuracy is avg@n, judged by math-verify; the loss is in nats a trained token. A batch of several traces or prompts
    has at most `tokens` tokens. If memory runs out, batches are halved, which the record notes. This is the seam
    `evaluate=` of `run`.

    Errors: UserError if memory does not suffice for a single answer or trace.

    >>> evaluate(model, tokenizer, [Question("1 + 1 = ?", "2")], {}, EvalConfig(), seed=0)  # doctest: +SKIP
    """
    start = time.monotonic()
    model.eval()
    traces, rows = AtOnce(settings.batch_size), AtOnce(settings.batch_size * settings.samples)
    fewer = f"start a new run with eval.max_new_tokens below {settings.max_new_tokens} or a smaller branch.max_length"
    with enough_memory("even one by one", f"free memory that other programs use, and resume, or {fewer}"):
        losses = held_out_losses(model, tokenizer, held_out, traces, tokens, progress)
        texts = generate(model, tokenizer, questions, settings, rows, tokens, seed=seed, progress=progress)
    answers = [
        Answer(
            question=q.question,
            answer=q.answer,
            texts=tuple(samples),
            also=q.also,
            score=sum(is_right(t, q.right_answers) for t in samples) / len(samples),
        )
        for q, samples in zip(questions, texts, strict=True)
    ]
    accuracy, interval = mean_score([a.score for a in answers]) if answers else (None, None)
    record = EvaluationRecord(
        questions=len(answers),
        accuracy=accuracy,
        interval=interval,
        losses=losses,
        at_once={what: n.most for what, n in (("traces", traces), ("answers", rows)) if n.most < n.first},
        seconds=time.monotonic() - start,
    )
    return record, answers


def held_out_losses(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Mapping[str, Sequence[Example]],
    at_once: AtOnce,
    tokens: int,
    progress: Progress = silent,
) -> dict[str, float]:
    """The mean loss over the trained tokens of each teacher's examples, in nats.

    A batch holds `at_once` traces, or fewer if they would have more than `tokens` tokens with padding.
    """
    base, pad = model.get_base_model(), cast("int", tokenizer.pad_token_id)
    losses: dict[str, float] = {}
    done, total = 0, sum(map(len, held_out.values()))
    for name, examples in held_out.items():
        summed, count = 0.0, 0
        left = sorted(examples, key=len)
        while left:
            batch = left[: len(next(batches([len(e) for e in left], at_once.most, tokens)))]
            with at_once.attempt(len(batch)), torch.no_grad(), computing(base):
                ids = {key: value.to(model.device) for key, value in collate(batch, pad).items()}
                loss, n = batch_loss(base, ids, LOSS_CHUNK)
                summed, count, done = summed + float(loss), count + n, done + len(batch)
                left = left[len(batch) :]
                progress("loss", done, total, at_once.note)
        if count:
            losses[name] = summed / count
    return losses


def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    settings: EvalConfig,
    at_once: AtOnce | None = None,
    tokens: int = LOSS_TOKENS,
    *,
    seed: int,
    progress: Progress = silent,
) -> list[list[str]]:
    """The student's answers, `settings.samples` texts to each question, in the order of the questions.

    Up to `at_once` answers (default: batch_size * samples) are generated together, by `decode`, or by transformers'
    generate for a model that `decode` does not support. Up to rounding, a sample depends only on the seed, the
    question, the sample's number and the student: the global random state is neither used nor changed.
    """
    base, pad = cast("Any", model.get_base_model()), cast("int", tokenizer.pad_token_id)
    at_once = at_once or AtOnce(settings.batch_size * settings.samples)
    stops = {*stop_ids(tokenizer), *_listed(base)}
    how = Decoding(settings.max_new_tokens, frozenset(stops), settings.temperature, settings.top_p)
    write, note = partial(decode.decode, tokens=tokens), ""
    if not decodes(base):
        write, note = partial(decode.generate, pad=pad), f"{type(base).__name__}: by transformers' generate"
    texts = [prompt_text(tokenizer, q.prompt) for q in questions]
    prompts = [token_ids(tokenizer, text) for text in texts]
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    wanted = [(k, sample) for k in order for sample in range(settings.samples)]
    answers: dict[tuple[int, int], str] = {}
    written = 0

    def report(new: int) -> None:
        nonlocal written
        written += new
        progress("answer", len(answers), len(wanted), at_once.note or note, tokens=written)

    if wanted:
        report(0)
    while left := [key for key in wanted if key not in answers]:
        seeds = [seed_for(seed, questions[k].question, sample) for k, sample in left]
        rows = min(at_once.most, len(left))
        with at_once.attempt(rows), torch.no_grad(), computing(base):
            for i, ids in write(base, [prompts[k] for k, _ in left], seeds, how, rows, report):
                answers[left[i]] = answer_text(tokenizer, texts[left[i][0]], [t for t in ids if t not in stops])
                report(0)
    return [[answers[k, sample] for sample in range(settings.samples)] for k in range(len(questions))]


def _listed(model: Any) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
