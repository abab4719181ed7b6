"""Merging methods on true deltas, composed of four primitives; and the lazy merge of whole adapters."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mot_lora.errors import UserError
from mot_lora.lowrank import Adapter, Factors, concatenate

Deltas = Tensor | Sequence[Tensor]
Generators = torch.Generator | Sequence[torch.Generator]
Method = Callable[..., Tensor]


def seed_for(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else, e.g. (run seed, round, teacher).

    >>> seed_for(0, 1, "a") == seed_for(0, 1, "a") != seed_for(0, 1, "b")
    True
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --- the four primitives ---------------------------------------------------------------------------


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the largest entries by magnitude, zero the rest (the trim step of TIES, arXiv 2306.01708).

    Keeps max(1, floor(density * numel)) entries, and all that tie with the smallest of them.

    Errors: UserError for a density outside (0, 1].

    >>> trim(torch.tensor([[3.0, -1.0], [2.0, 0.5]]), 0.5)
    tensor([[3., 0.],
            [2., 0.]])
    """
    _check_density(density)
    drop_count = delta.numel() - max(1, int(density * delta.numel()))
    if drop_count <= 0:
        return delta
    size = delta.abs()
    threshold = size.flatten().kthvalue(drop_count + 1).values
    return delta.masked_fill(size < threshold, 0.0)


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density` and divide what is kept by it (DARE, arXiv 2311.03099).

    The mean over many draws is the delta itself. Draw with a CPU generator, and a seed means the same on every device.

    Errors: UserError for a density outside (0, 1].

    >>> drop(torch.ones(1, 4), 0.5, torch.Generator().manual_seed(0)).unique().tolist()
    [0.0, 2.0]
    """
    _check_density(density)
    if density == 1:
        return delta
    dropped = torch.rand(delta.shape, generator=generator, device=generator.device) >= density
    return delta.masked_fill(dropped.to(delta.device), 0.0) / density


def elect_sign(weighted: Tensor) -> Tensor:
    """The sign, entry by entry, that the summed updates have (TIES, arXiv 2306.01708).

    weighted: [n, out, in], the weights already applied. Returns [out, in] of +1 and -1; an exact tie counts as +1.

    >>> elect_sign(torch.tensor([[[2.0, 1.0]], [[-1.0, -3.0]]]))
    tensor([[ 1., -1.]])
    """
    return torch.where(weighted.sum(0) >= 0, 1.0, -1.0).to(weighted.dtype)


def weighted_mean(deltas: Tensor, weights: Tensor, sign: Tensor | None = None) -> Tensor:
    """sum_i w_i d_i / sum_i w_i; with `sign`, per entry over only those d_i that have this sign.

    deltas: [n, out, in]; weights: [n], not negative; sign: [out, in]. An entry that nobody votes for is 0.

    >>> weighted_mean(torch.tensor([[[4.0]], [[-1.0]]]), torch.ones(2), torch.ones(1, 1))
    tensor([[4.]])
    """
    w = weights.to(deltas).view(-1, 1, 1)
    if sign is None:
        return (deltas * w).sum(0) / w.sum()
    agree = (deltas.sign() == sign) * w
    total = agree.sum(0)
    return (deltas * agree).sum(0) / torch.where(total == 0, 1.0, total)


# --- the methods ---------------------------------------------------------------------------------


def linear(deltas: Deltas, weights: Sequence[float] | None = None, *, scale: float = 1.0) -> Tensor:
    """The weighted mean of the updates (model soups, arXiv 2203.05482).

    scale * sum_i w_i d_i / sum_i w_i. deltas: [n, out, in] or a sequence of [out, in], any float dtype; weights: n
    numbers >= 0.

    Errors: UserError when the shapes differ, or the weights are of the wrong number or sign.

    >>> linear(torch.tensor([[[1.0]], [[3.0]]]))
    tensor([[2.]])
    """
    d, w = _prepare(deltas, weights)
    return scale * weighted_mean(d, w)


def ties(deltas: Deltas, weights: Sequence[float] | None = None, *, density: float, scale: float = 1.0) -> Tensor:
    """Trim, elect a sign, and average what agrees with it (TIES, arXiv 2306.01708).

    Weights are applied before the sign is elected; the sum is divided by the weights that agree.
    deltas, weights and errors as in `linear`; density in (0, 1] is the share of entries that each update keeps.

    >>> ties(torch.tensor([[[1.0, 5.0]], [[-4.0, 3.0]]]), density=0.5)
    tensor([[-4.,  5.]])
    """
    d, w = _prepare(deltas, weights)
    return scale * _elected_mean(torch.stack([trim(x, density) for x in d]), w)


def dare_linear(
    deltas: Deltas,
    weights: Sequence[float] | None = None,
    *,
    density: float,
    generator: Generators,
    scale: float = 1.0,
) -> Tensor:
    """Drop at random, rescale by 1/density, and average (DARE, arXiv 2311.03099).

    deltas, weights and errors as in `linear`; density in (0, 1]; one generator, or one for each update, which makes
    the result independent of their order.

    >>> dare_linear(torch.ones(2, 1, 1), density=1.0, generator=torch.Generator())
    tensor([[1.]])
    """
    d, w = _prepare(deltas, weights)
    return scale * weighted_mean(_dropped(d, density, generator), w)


def dare_ties(
    deltas: Deltas,
    weights: Sequence[float] | None = None,
    *,
    density: float,
    generator: Generators,
    scale: float = 1.0,
) -> Tensor:
    """Drop at random, rescale by 1/density, elect a sign, and average what agrees (arXiv 2311.03099, 2306.01708).

    Arguments and errors as in `dare_linear`.

    >>> dare_ties(torch.tensor([[[1.0]], [[-4.0]]]), density=1.0, generator=torch.Generator())
    tensor([[-4.]])
    """
    d, w = _prepare(deltas, weights)
    return scale * _elected_mean(_dropped(d, density, generator), w)


METHODS: dict[str, Method] = {
    "linear": linear,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}
NEEDS_DENSITY = frozenset({"ties", "dare_linear", "dare_ties"})
RANDOM = frozenset({"dare_linear", "dare_ties"})


def _elected_mean(deltas: Tensor, weights: Tensor) -> Tensor:
    return weighted_mean(deltas, weights, elect_sign(deltas * weights.to(deltas).view(-1, 1, 1)))


def _dropped(deltas: Tensor, density: float, generator: Generators) -> Tensor:
    one = isinstance(generator, torch.Generator)
    generators = [generator] * len(deltas) if one else list(generator)
    return torch.stack([drop(d, density, g) for d, g in zip(deltas, generators, strict=True)])


def _prepare(deltas: Deltas, weights: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    rows = list(deltas)
    if not rows or any(r.ndim != 2 or r.shape != rows[0].shape for r in rows):
        shapes = [list(r.shape) for r in rows]
        raise UserError(f"merging needs updates of one shape [out, in], not {shapes}")
    d = deltas if isinstance(deltas, Tensor) else torch.stack(rows)
    return d, torch.tensor(check_weights(weights, len(rows)), dtype=d.dtype)


def check_weights(weights: Sequence[float] | None, n: int) -> list[float]:
    """The weights of n adapters, all 1 when none are given.

    Errors: UserError for the wrong number, a negative or non-finite weight, or a sum of 0.

    >>> check_weights(None, 2)
    [1.0, 1.0]
    """
    w = [1.0] * n if weights is None else [float(x) for x in weights]
    if len(w) != n:
        raise UserError(f"{len(w)} weights for {n} adapters: give one for each")
    if not all(0 <= x < float("inf") for x in w) or sum(w) <= 0:
        raise UserError(f"weights must be finite, not negative, and not all 0: {w}")
    return w


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise UserError(f"density must be in (0, 1], not {density}")


# --- whole adapters ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """Adapters and the way to merge them: computes one module's update at a time, when asked.

    Iterating yields (module name, fp32 delta [out, in]). A module that an adapter does not have counts as an update of
    0. `factors(module)` is the exact low-rank form, which only a linear merge has.
    """

    adapters: tuple[Adapter, ...]
    method: str | Method = "linear"
    weights: tuple[float, ...] = ()
    density: float | None = None
    scale: float = 1.0
    seed: int = 0
    shapes: Mapping[str, torch.Size] = field(default_factory=dict[str, torch.Size])

    def delta(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The merged update of one module, [out, in], computed in `dtype`."""
        parts = [a.factors.get(module) for a in self.adapters]
        made = [None if p is None else p.delta(dtype) for p in parts]
        zeros = torch.zeros_like(next(d for d in made if d is not None))
        deltas = [zeros if d is None else d for d in made]
        settings: dict[str, object] = {"scale": self.scale}
        if self.density is not None:
            settings["density"] = self.density
        if self.method in RANDOM:
            seeds = [seed_for(self.seed, a.name, module) for a in self.adapters]
            settings["generator"] = [torch.Generator().manual_seed(s) for s in seeds]
        method = METHODS[self.method] if isinstance(self.method, str) else self.method
        return method(deltas, self.weights, **settings)

    def factors(self, module: str) -> Factors:
        """The merged update of one module as exact factors of rank sum(r). UserError unless linear."""
        if self.method != "linear":
            raise UserError(f"a {self.method} merge is not low-rank: fold it, or give a rank")
        total = sum(self.weights)
        pairs = [(a.factors.get(module), w) for a, w in zip(self.adapters, self.weights, strict=True)]
        have = [(f, self.scale * w / total) for f, w in pairs if f is not None]
        return concatenate([f for f, _ in have], [w for _, w in have])

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((module, self.delta(module)) for module in self.shapes)


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str | Method = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Merged:
    """Merge adapters by their true deltas, lazily.

    D_module = method(scaling_i * B_i @ A_i). `method` is a name in METHODS or a function (deltas, weights, **settings)
    -> Tensor. DARE draws from (seed, adapter name, module), so neither the order of adapters nor global state matters.

    Errors: UserError for no adapters, repeated names, an unknown method, a missing or unused density, wrong weights, or
    modules whose shapes differ between adapters.

    >>> one = Adapter("a", {"m": Factors(torch.eye(2), torch.eye(2))})
    >>> dict(merge_adapters([one]))["m"]
    tensor([[1., 0.],
            [0., 1.]])
    """
    if not adapters:
        raise UserError("no adapters to merge: give at least one")
    names = [a.name for a in adapters]
    if len(set(names)) < len(names):
        raise UserError(f"adapters need different names, not {names}")
    if isinstance(method, str) and method not in METHODS:
        raise UserError(f"unknown merge method `{method}`: use one of {', '.join(METHODS)}")
    if method in NEEDS_DENSITY and density is None:
        raise UserError(f"method `{method}` needs a density in (0, 1]")
    if method == "linear" and density is not None:
        raise UserError("method `linear` takes no density: leave it out, or choose another method")
    if density is not None:
        _check_density(density)
    shapes: dict[str, torch.Size] = {}
    for adapter in adapters:
        for module, factors in adapter.factors.items():
            if shapes.setdefault(module, factors.shape) != factors.shape:
                raise UserError(
                    f"adapter `{adapter.name}`, module {module}: shape {list(factors.shape)}, "
                    f"but others have {list(shapes[module])}; they are not for one base"
                )
    w = tuple(check_weights(weights, len(adapters)))
    return Merged(tuple(adapters), method, w, density, scale, seed, shapes)
