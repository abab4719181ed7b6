"""Decoding with continuous batching: when an answer ends, the next prompt takes its row."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mot_lora.data.traces import batches
from mot_lora.training.attention import REPEATED

Report = Callable[[int], object]  # called with the number of tokens generated since the last call

READ = 64  # keys are read in multiples of this many tokens, so that kernels see few shapes


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: up to one of `stops` or `max_new_tokens` tokens; greedily if the temperature is 0."""

    max_new_tokens: int
    stops: frozenset[int]
    temperature: float = 0.0
    top_p: float = 1.0

    def draws(self, seed: int) -> list[float]:
        """An answer's random numbers in [0, 1), one a token, so that an answer does not depend on its batch."""
        if not self.temperature:
            return []
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.max_new_tokens, generator=generator, dtype=torch.float64).tolist()

    def choose(self, logits: Tensor, draws: Sequence[float]) -> Tensor:
        """The next token of each answer: the likeliest, or the first whose cumulative p exceeds the answer's draw.

        logits: [n, vocabulary]; draws: n. With top_p only the likeliest tokens that together have p = top_p are drawn.

        >>> Decoding(1, frozenset()).choose(torch.eye(3), [])
        tensor([0, 1, 2])
        """
        if not self.temperature:
            return logits.argmax(-1)
        p, tokens = (logits.float() / self.temperature).softmax(-1), None
        if self.top_p < 1:
            p, tokens = p.sort(-1, descending=True)
            p = p.where(p.cumsum(-1) - p < self.top_p, 0.0)
        cumulative = p.double().cumsum(-1)
        drawn = torch.tensor(draws, dtype=torch.float64, device=p.device)[:, None] * cumulative[:, -1:]
        index = torch.searchsorted(cumulative, drawn, right=True).clamp(max=p.shape[-1] - 1)
        return (index if tokens is None else tokens.gather(-1, index))[:, 0]


def decodes(model: Any) -> bool:
    """Whether `decode` supports a model: every layer attends to all earlier tokens and takes explicit positions."""
    layers = DynamicCache(config=model.config).layers
    plain = layers and all(type(layer) is DynamicLayer for layer in layers)
    positions = inspect.signature(type(model.base_model).forward).parameters.keys() >= {"position_ids"}
    return bool(plain and positions and model.config._attn_implementation in ("sdpa", REPEATED))


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    how: Decoding,
    at_once: int,
    report: Report,
    tokens: int,
) -> Iterator[tuple[int, list[int]]]:
    """Answer prompts, at most `at_once` at a time, and yield each one's index and new tokens as it ends.

    model: a causal language model of transformers that `decodes`; tokens: how many prompt tokens are read at once.
    Keys and values are allocated once for [at_once, longest prompt + max_new_tokens] tokens, and written in place.
    """
    texts = [list(p) for p in prompts]
    draws: dict[int, list[float]] = {}
    columns = max(map(len, prompts), default=0) + how.max_new_tokens
    layers: list[Layer] = []
    active: list[int] = []  # the prompt of each row
    started = 0
    while started < len(prompts) or active:
        new = range(started, min(started + at_once - len(active), len(prompts)))
        for batch in batches([len(prompts[k]) for k in new], at_once, tokens):
            read = _read(model, [prompts[new[i]] for i in batch])
            layers = layers or [Layer(r, min(at_once, len(prompts)), columns) for r in read]
            for j, i in enumerate(batch):
                for layer, prompt in zip(layers, read, strict=True):
                    layer.put(len(active), prompt, j)
                active.append(new[i])
                draws[new[i]] = how.draws(seeds[new[i]])
            del read
        started = new.stop
        logits = next_logits(model, layers, [texts[k] for k in active])
        at = [len(texts[k]) - len(prompts[k]) for k in active]
        chosen = how.choose(logits, [draws[k][n] for k, n in zip(active, at, strict=True)] if how.temperature else [])
        for k, token in zip(active, chosen.tolist(), strict=True):
            texts[k].append(token)
        report(len(active))
        for row in reversed(range(len(active))):
            k = active[row]
            new_tokens = texts[k][len(prompts[k]) :]
            if new_tokens[-1] in how.stops or len(new_tokens) == how.max_new_tokens:
                yield k, new_tokens
                last = active.pop()
                if row < len(active):  # active rows stay contiguous
                    active[row] = last
                    for layer in layers:
                        layer.move(len(active), row)


class Layer(DynamicLayer):
    """A layer's keys and values, one row for each active answer: [rows, heads, tokens, width]."""

    keys: Any
    values: Any

    def __init__(self, like: Any, rows: int, tokens: int) -> None:
        super().__init__()
        self.keys, self.values = (
            x.new_zeros(rows, x.shape[1], tokens, x.shape[3])  # not `empty`: a masked NaN would still spread, 0 * NaN
            for x in (like.keys, like.values)
        )
        self.is_initialized = True
        self.rows = self.at = torch.empty(0)
        self.seen = 0

    def put(self, row: int, other: Any, i: int) -> None:
        """Start a row with the keys and values of a prompt, row `i` of `other`; positions after them are masked."""
        for mine, others in ((self.keys, other.keys), (self.values, other.values)):
            mine[row, :, : others.shape[2]] = others[i]

    def move(self, source: int, target: int) -> None:
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[self.rows, :, self.at] = key_states[:, :, 0]
        self.values[self.rows, :, self.at] = value_states[:, :, 0]
        n = len(key_states)
        return self.keys[:n, :, : self.seen], self.values[:n, :, : self.seen]


def _read(model: Any, prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Keys and values of prompts without their last tokens, from which decoding starts; padded on the right."""
    width = max(1, *(len(p) - 1 for p in prompts))
    ids = torch.tensor([[*p[:-1], *[p[-1]] * width][:width] for p in prompts], device=model.device)
    cache = DynamicCache(config=model.config)
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache.layers


def next_logits(model: Any, layers: Sequence[Layer], texts: Sequence[Sequence[int]]) -> Tensor:
    """The logits after the last token of each text, [n, vocabulary]."""
    at = torch.tensor([len(t) - 1 for t in texts], device=model.device)
    rows = torch.arange(len(texts), device=model.device)
    longest = max(map(len, texts))
    seen = min(-(-longest // READ) * READ, layers[0].keys.shape[2])
    for layer in layers:
        layer.rows, layer.at, layer.seen = rows, at, seen
    mask = torch.arange(seen, device=model.device) <= at[:, None]
    output = model(
        input_ids=torch.tensor([[t[-1]] for t in texts], device=model.device),
        position_ids=at[:, None],
        attention_mask=mask[:, None, None],
        past_key_values=Cache(layers=list(layers)),
        use_cache=True,
    )
    return output.logits[:, -1]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    how: Decoding,
    at_once: int,
    report: Report,
    pad: int,
) -> Iterator[tuple[int, list[int]]]:
    """Like `decode`, by transformers' generate: for any model, but a batch takes as long as its longest answer."""
    config = GenerationConfig(
        max_new_tokens=how.max_new_tokens, do_sample=False, eos_token_id=sorted(how.stops), pad_token_id=pad
    )
    for start in range(0, len(prompts), at_once):
        batch = range(start, min(start + at_once, len(prompts)))
        width = max(len(prompts[k]) for k in batch)
        left = [width - len(prompts[k]) for k in batch]
        ids = [[*[pad] * n, *prompts[k]] for n, k in zip(left, batch, strict=True)]
        mask = [[*[0] * n, *[1] * (width - n)] for n in left]
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Draw(how, [seeds[k] for k in batch])] if how.temperature else []),
        )
        rows = output[:, width:].tolist()
        ends = [next((i for i, token in enumerate(row, 1) if token in how.stops), len(row)) for row in rows]
        report(sum(ends))
        yield from ((k, row[:end]) for k, row, end in zip(batch, rows, ends, strict=True))


class _Draw(LogitsProcessor):
    """Masks every token but each answer's drawn one, so that greedy decoding takes it."""

    def __init__(self, how: Decoding, seeds: Sequence[int]) -> None:
        self.how = how
        self.draws = zip(*(how.draws(seed) for seed in seeds), strict=True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        chosen = self.how.choose(scores, next(self.draws))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)
