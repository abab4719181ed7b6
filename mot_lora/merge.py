"""Merging methods on true updates, composed of four primitives."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mot_lora.errors import UserError

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
    check_density(density)
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
    check_density(density)
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
    w = check_weights(weights, len(rows))
    # only the ratio counts, and counts of traces may be more than the updates' dtype holds
    return d, torch.tensor([x / max(w) for x in w], dtype=d.dtype)


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


def check_density(density: float) -> None:
    """UserError for a density outside (0, 1]."""
    if not 0 < density <= 1:
        raise UserError(f"density must be in (0, 1], not {density}")
