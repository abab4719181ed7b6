"""The memory and time that a config needs on a card, for traces of any length."""

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from transformers import AutoConfig

from mot_lora.config import BranchConfig, Config, EvalConfig, LoraConfig
from mot_lora.data.dataset import Data
from mot_lora.errors import UserError
from mot_lora.planning.cards import CONTEXT, Card
from mot_lora.planning.footprint import Pass, Step, Weights, answer, measure, step, student, weights
from mot_lora.planning.kernels import Attention
from mot_lora.records import Record
from mot_lora.training.decoding import Decoding
from mot_lora.training.evaluation import LOSS_CHUNK, loss_tokens
from mot_lora.training.liger import uses_liger
from mot_lora.training.offload import SLAB, kept_bytes, offloads
from mot_lora.training.student import AHEAD

EFFICIENCY = 0.5  # of a card's TFLOP/s; conservative: others report more for training a quantized 8B student
LAUNCHES = 0.03 / 36  # seconds to launch a layer's kernels: some 30 ms a token for the 36 layers of an 8B student
PROGRAM = 2**30  # bytes of host memory that Python and torch take
PROMPT = 256  # tokens assumed for a question
STEP = 64  # tokens; the longest trace is rounded down to a multiple
# fp32 copies of a layer that folding holds on a GPU, by method; other methods count as the largest
FOLDED = {"linear": 5, "dare_linear": 8.5, "ties": 11.2, "dare_ties": 12.5, "sce": 12.5, "della": 15.5}


class UnplannableError(UserError):
    """A model whose step cannot be run without data."""


Phase = Literal["always", "training", "loss", "layers", "folding", "measuring", "losses", "answering"]
"""When memory is held: `loss` and `layers` are parts of training, `losses` and `answering` of measuring."""


class Part(Record):
    """Something that takes memory: its bytes, place and phase."""

    name: str
    bytes: int
    place: Literal["card", "host", "disk"] = "card"
    phase: Phase = "always"


class TeacherPlan(Record):
    """The training of one teacher's branch in a round; `seconds` is None if the card's speed is not known.

    `tokens` counts a trace each time it is trained on. `traces` is 0 if they could not be read; then each is assumed to
    have `longest` tokens.
    """

    teacher: str
    traces: int
    longest: int
    steps: int
    tokens: int
    seconds: float | None


def peak_of(parts: Sequence[Part]) -> int:
    """The peak memory on the card, in bytes.

    >>> peak_of([Part(name="weights", bytes=5), Part(name="kept", bytes=2, phase="training")])
    7
    """
    during = dict.fromkeys(get_args(Phase), 0)
    for part in parts:
        during[part.phase] += part.bytes if part.place == "card" else 0
    training = during["training"] + max(during["loss"], during["layers"])
    measuring = during["measuring"] + max(during["losses"], during["answering"])
    return during["always"] + max(training, during["folding"], measuring)


@dataclass(frozen=True)
class Work:
    """The work of a run, as far as it is known: the lengths of each teacher's traces and of those held out, in tokens,
    and the numbers of questions of `eval.data`, `eval.validation`, each set of `eval.forgetting`, and `eval.final`.
    """

    lengths: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    held_out: Sequence[int] = ()
    questions: int = 0
    validation: int = 0
    forgetting: Sequence[int] = ()
    final: int = 0

    @staticmethod
    def of(data: Data) -> "Work":
        """The work that follows from a run's data."""
        held = [len(e) for examples in data.held_out.values() for e in examples]
        sets = [len(questions) for questions in data.forgetting.values()]
        return Work(data.lengths, held, len(data.questions), len(data.validation), sets, len(data.final))


@dataclass(frozen=True)
class Need:
    """The memory and time that a config needs on a card, for traces of any length."""

    config: Config
    architecture: str
    card: Card

    @property
    def student(self) -> "Student":
        c, card = self.config, self.card
        attention: Attention = "cpu" if not card.is_gpu else "cuda" if card.bf16 else "repeated"
        return Student(self.architecture, c.quantization, c.lora, card.dtype, attention)

    @property
    def liger(self) -> bool:
        """Whether training uses Liger's kernels; with `on` they need not be installed on this machine."""
        setting = self.config.branch.liger
        return self.card.is_gpu and (setting == "on" or uses_liger(setting, is_gpu=True))

    def offload(self, tokens: int) -> bool:
        """Whether layers' inputs are offloaded to host memory."""
        batch = math.prod(self.config.branch.largest(tokens))
        return offloads(self.config.branch, self.student.kept(batch), self.card.bytes if self.card.is_gpu else 0)

    def step(self, tokens: int) -> Step:
        """The largest batch of a step whose longest trace has `tokens` tokens."""
        return self._step(*self.config.branch.largest(tokens), self.offload(tokens))

    def _step(self, batch: int, tokens: int, offload: bool) -> Step:
        b = self.config.branch
        return self.student.step(batch, tokens, b.loss_chunk, b.activation_checkpointing, offload, self.liger)

    def parts(self, tokens: int) -> list[Part]:
        """What takes memory if the longest trace has `tokens` tokens."""
        c, w, s = self.config, self.student.weights(), self.step(tokens)
        adapters = c.rounds * len(c.teachers) * w.adapter
        parts = [
            Part(
                name="linear layers" if c.quantization == "none" else f"linear layers, {c.quantization}", bytes=w.layers
            ),
            Part(name="embeddings, head, norms", bytes=w.others),
            Part(name="adapter", bytes=w.adapter),
            Part(name="its gradients", bytes=w.adapter, phase="training"),
            Part(name="Adam's state", bytes=2 * w.adapter, phase="training"),
            Part(name="kept for the backward pass", bytes=s.kept, phase="training"),
            Part(name=f"loss, {c.branch.loss_chunk} tokens at a time", bytes=s.loss, phase="loss"),
            Part(
                name="one layer, computed again" if c.branch.activation_checkpointing else "one layer, backward",
                bytes=s.layer,
                phase="layers",
            ),
            Part(name="fold of one layer", bytes=int(4 * self.copies * w.largest), phase="folding"),
        ]
        if c.lora.dropout and self.card.is_gpu:  # autocast keeps its 16-bit copy until the end of a batch
            parts.append(Part(name="adapter in 16 bits", bytes=w.adapter // 2, phase="training"))
        if c.eval.holdout or c.eval.traces:
            batch = max(tokens, min(c.eval.batch_size * tokens, loss_tokens(c.branch, tokens)))
            losses = self.student.measure(batch, LOSS_CHUNK)
            parts.append(Part(name=f"held-out losses of {batch:,} tokens", bytes=losses.bytes, phase="losses"))
        if c.eval.data or c.eval.forgetting or c.merge.searched:
            a = max((self._answer(e, tokens) for e in (c.eval, c.eval.at_last)), key=lambda a: a.bytes)
            parts += [
                Part(name=f"keys and values of {a.rows} answers", bytes=a.cache, phase="answering"),
                Part(name="their prompts, or next tokens", bytes=a.bytes - a.cache, phase="answering"),
            ]
        if self.card.is_gpu and (c.eval.each_branch or c.merge.searched):
            parts.append(Part(name="adapter in 16 bits", bytes=w.adapter // 2, phase="measuring"))
        parts += [
            Part(name="CUDA and its libraries", bytes=CONTEXT)
            if self.card.is_gpu
            else Part(name="Python and torch", bytes=PROGRAM),
            Part(name="inputs of layers, offloaded", bytes=-(-s.host // SLAB) * SLAB, place="host"),
            Part(name="prefetched weights", bytes=(AHEAD + 1) * 2 * w.largest, place="host"),
            Part(name="the student's checkpoint, in bf16", bytes=2 * w.parameters, place="disk"),
            Part(name="adapters of all rounds", bytes=adapters, place="disk"),
            Part(name="states to resume from", bytes=2 * 3 * w.adapter, place="disk"),
        ]
        return [p for p in parts if p.bytes]

    @property
    def copies(self) -> float:
        """The fp32 copies of a layer held while it is folded and the teachers' signs, one byte each, are compared."""
        measured = 4.75 + len(self.config.teachers) / 4
        on_cpu = 0 if self.card.is_gpu else 6  # prefetched weights are in the same memory
        return max(FOLDED.get(self.config.merge.method, max(FOLDED.values())), measured, on_cpu)

    def _answer(self, e: EvalConfig, tokens: int) -> Pass:
        """A batch of answers, if the longest trace has `tokens` tokens."""
        how = Decoding(e.max_new_tokens, frozenset(), e.temperature, e.top_p)
        if not (self.config.eval.holdout or self.config.eval.traces):  # then only max_length bounds the batch
            tokens = self.config.branch.max_length
        return self.student.answer(e.batch_size * e.samples, how, loss_tokens(self.config.branch, tokens))

    def peak(self, tokens: int) -> int:
        """The peak memory on the card, in bytes."""
        return peak_of(self.parts(tokens))

    def fits(self, tokens: int) -> bool:
        """Whether traces of `tokens` tokens fit."""
        return self.peak(tokens) <= self.card.bytes

    def longest(self) -> int:
        """The longest trace that fits, to within 2 %, and at most the student's context length; 0 if none fits."""
        if self.config.branch.offload == "auto" and self.card.is_gpu:  # memory drops where offloading starts
            moves, stays = (replace(self, config=_offloading(self.config, how)) for how in ("on", "off"))
            longest = moves.longest()
            return longest if self.offload(longest) else stays.longest()
        low, high, limit = 0, STEP, self.student.limit
        while self.fits(high):
            if high == limit:
                return limit // STEP * STEP
            low, high = high, min(4 * high, limit)
        if not low:
            return 0
        while high - low > max(STEP, low // 50):
            share = (self.card.bytes - self.peak(low)) / (self.peak(high) - self.peak(low))  # memory is nearly linear
            middle = low + int(min(max(share, 0.1), 0.9) * (high - low))
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return low // STEP * STEP

    def teacher(self, name: str, lengths: Sequence[int], most: int) -> TeacherPlan:
        """The training of one teacher's branch in a round, if the longest trace of all has `most` tokens."""
        b = self.config.branch
        steps = b.steps or math.ceil((b.epochs or 1) * math.ceil(len(lengths) / b.traces))
        seen = lengths or [b.max_length]
        times = steps * b.traces / len(seen)
        return TeacherPlan(
            teacher=name,
            traces=len(lengths),
            longest=max(seen),
            steps=steps,
            tokens=round(times * sum(seen)),
            seconds=self.seconds(seen, most, times),
        )

    def measurements(self) -> tuple[int, int]:
        """The numbers of evaluations without an adapter and with one."""
        c = self.config
        return 1 + c.rounds, c.rounds * len(c.teachers) * c.eval.each_branch

    def answering(self, work: Work) -> float | None:
        """Seconds of all the run's answers, if each has max_new_tokens: a decoding step takes as long as reading all
        weights, keys and values once, or as launching the kernels, whichever is longer.
        """
        c, rate, w = self.config, self.card.gbps, self.student.weights()
        e, (alone, adapted) = c.eval, self.measurements()
        sets = [(alone + adapted, work.questions, e), *((alone, n, e) for n in work.forgetting)]
        if c.merge.searched:
            tried = len(c.teachers) + (len(c.teachers) - 1) * (c.merge.weights == "greedy")
            sets.append((c.rounds * tried, work.validation, e))
        sets.append((1, work.final, e.at_last))
        if rate is None or not any(n for _, n, _ in sets):
            return None
        starts = LAUNCHES * self.student.config.num_hidden_layers
        seconds = 0.0
        for times, n, how in sets:
            if n:
                read = w.layers + w.others + self._answer(how, PROMPT).cache // 2  # answers grow
                seconds += times * math.ceil(n / how.batch_size) * how.max_new_tokens * max(read / (rate * 1e9), starts)
        return seconds

    def losing(self, work: Work) -> float | None:
        """Seconds of all held-out losses."""
        if self.card.tflops is None or not work.held_out:
            return None
        flops = _along(work.held_out, lambda n: self.student.measure(n, LOSS_CHUNK).flops)
        return sum(self.measurements()) * flops / (self.card.tflops * 1e12 * EFFICIENCY)

    def seconds(self, lengths: Sequence[int], most: int, times: float) -> float | None:
        """Seconds of training `times` times on each trace, if the longest trace of all has `most` tokens."""
        if self.card.tflops is None:
            return None
        flops = _along(lengths, lambda n: self._step(1, n, self.offload(n)).flops, most)
        return times * flops / (self.card.tflops * 1e12 * EFFICIENCY)


def _along(lengths: Sequence[int], flops: Callable[[int], float], most: int | None = None) -> float:
    """The sum over all lengths n of a n + b n^2 operations, with a and b from the counts at `most` and half of it."""
    n = max((most or max(lengths)) // 2, 2)
    half, whole = flops(n), flops(2 * n)
    square = (whole - 2 * half) / (2 * n**2)
    return sum((half / n - square * n) * k + square * k**2 for k in lengths)


@dataclass(frozen=True)
class Student:
    """A student to plan for: everything that the shapes of its tensors depend on. Results are cached."""

    architecture: str
    quantization: str
    lora: LoraConfig
    dtype: torch.dtype
    attention: Attention

    @property
    def config(self) -> Any:
        return _config(self.architecture)

    @property
    def limit(self) -> int:
        """The context length, in tokens."""
        return getattr(self.config, "max_position_embeddings", None) or 2**20

    def kept(self, tokens: int) -> int:
        """The bytes of the inputs of all its layers, for `tokens` tokens."""
        c = self.config
        return kept_bytes(c.num_hidden_layers, tokens, c.hidden_size, self.dtype.itemsize)

    def weights(self) -> Weights:
        return weights(_model(self))

    def step(self, batch: int, tokens: int, chunk: int, checkpointing: bool, offload: bool, liger: bool) -> Step:
        return _step(self, batch, tokens, chunk, checkpointing, offload, liger)

    def measure(self, tokens: int, chunk: int) -> Pass:
        return _measure(self, tokens, chunk)

    def answer(self, rows: int, how: Decoding, read: int) -> Pass:
        return _answer(self, rows, how, min(read, rows * PROMPT))


def _offloading(config: Config, how: Literal["on", "off"]) -> Config:
    return config.model_copy(update={"branch": config.branch.model_copy(update={"offload": how})})


@lru_cache(maxsize=16)
def _config(architecture: str) -> Any:
    config: dict[str, Any] = json.loads(architecture)
    try:
        return AutoConfig.for_model(**config).get_text_config()
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise UnplannableError(f"transformers does not know `{config.get('model_type')}` ({e})") from e


@lru_cache(maxsize=4)
def _model(s: Student) -> Any:
    return student(s.config, s.quantization, s.lora, s.dtype, s.attention)


@lru_cache(maxsize=256)
def _step(s: Student, batch: int, tokens: int, chunk: int, checkpointing: bool, offload: bool, liger: bool) -> Step:
    settings = BranchConfig(loss_chunk=chunk, activation_checkpointing=checkpointing)
    with _without_data(s):
        return step(_model(s), batch, tokens, settings, offload, liger)


@lru_cache(maxsize=256)
def _measure(s: Student, tokens: int, chunk: int) -> Pass:
    with _without_data(s):
        return measure(_model(s), 1, tokens, chunk)


@lru_cache(maxsize=256)
def _answer(s: Student, rows: int, how: Decoding, read: int) -> Pass:
    with _without_data(s):
        return answer(_model(s), rows, PROMPT, how, read)


@contextmanager
def _without_data(s: Student) -> Generator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as e:
        kind = s.config.model_type
        raise UnplannableError(f"a `{kind}` cannot be run without data ({' '.join(str(e).split())[:120]})") from e
