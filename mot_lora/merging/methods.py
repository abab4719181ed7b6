"""Merging methods on true updates, composed of a few primitives (see `averages` and `sparsify`).

Every method reads its updates one after the other, so that a lazy sequence of them is never in memory whole.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mot_lora.errors import UserError
from mot_lora.merging.averages import Deltas, check_weights, elected_mean, weighted_mean
from mot_lora.merging.sparsify import check_density, drop, kth_largest, rank_densities, trim

Generators = torch.Generator | Sequence[torch.Generator]
Method = Callable[..., Tensor]


def linear(deltas: Deltas, weights: Sequence[float] | None = None, *, scale: float = 1.0) -> Tensor:
    """The weighted mean of the updates (model soups, arXiv 2203.05482).

    scale * sum_i w_i d_i / sum_i w_i, or, with a negative weight, task arithmetic (arXiv 2212.04089): scale *
    sum_i w_i d_i, so that weights (1, -1) are d_1 - d_2. deltas: [n, ...] or a sequence of [...], any float dtype.

    Errors: UserError when the shapes differ, or the weights are of the wrong number, not finite or all 0.

    >>> linear(torch.tensor([[[1.0]], [[3.0]]]))
    tensor([[2.]])
    """
    d, w = _prepare(deltas, weights)
    return scale * weighted_mean(d, w)


def ties(deltas: Deltas, weights: Sequence[float] | None = None, *, density: float, scale: float = 1.0) -> Tensor:
    """Trim, elect a sign, and average what agrees with it (TIES, arXiv 2306.01708).

    Weights are applied before the sign is elected; the sum is divided by the weights that agree.
    deltas, weights and errors as in `linear`, and UserError for a negative weight; density in (0, 1] is the share of
    entries that each update keeps.

    >>> ties(torch.tensor([[[1.0, 5.0]], [[-4.0, 3.0]]]), density=0.5)
    tensor([[-4.,  5.]])
    """
    d, w = _prepare(deltas, weights, elects=True)
    return scale * elected_mean((trim(x, density) for x in d), w)


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

    Arguments and errors as in `dare_linear`, and UserError for a negative weight.

    >>> dare_ties(torch.tensor([[[1.0]], [[-4.0]]]), density=1.0, generator=torch.Generator())
    tensor([[-4.]])
    """
    d, w = _prepare(deltas, weights, elects=True)
    return scale * elected_mean(_dropped(d, density, generator), w)


def della(
    deltas: Deltas,
    weights: Sequence[float] | None = None,
    *,
    density: float,
    generator: Generators,
    epsilon: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Drop at random, the small entries of a row more often than the large, elect a sign, average (arXiv 2406.11617).

    An entry is kept with probability density - epsilon (a row's smallest) to density + epsilon (its largest) and
    divided by it. epsilon is half of what keeps both within (0, 1) unless given. Other arguments and errors as in
    `dare_ties`, and UserError for an epsilon that leaves (0, 1).

    >>> della(torch.ones(2, 1, 1), density=1.0, generator=torch.Generator())
    tensor([[1.]])
    """
    d, w = _prepare(deltas, weights, elects=True)
    check_density(density)
    room = min(density, 1 - density)
    spread = room / 2 if epsilon is None else epsilon
    if not (0 <= spread < room or spread == room == 0):
        raise UserError(f"epsilon {spread} with density {density}: density +- epsilon must be within (0, 1)")
    kept = (
        x if density == 1 else drop(x, rank_densities(x, density, spread), g)
        for x, g in zip(d, _one_each(generator, len(d)), strict=True)
    )
    return scale * elected_mean(kept, w)


def sce(deltas: Deltas, weights: Sequence[float] | None = None, *, density: float, scale: float = 1.0) -> Tensor:
    """Select the entries on which the updates differ most, calculate weights, erase minority signs (arXiv 2408.07990).

    Select: the share `density` of the entries that vary, by their variance over the updates; all of them at 1.
    Calculate: an update's weight is the mean square of what is selected of it, times its weight in `weights`. Erase: as
    in TIES. The updates are read four times. Arguments and errors as in `ties`, and UserError for one update alone at a
    density below 1: it has no variance.

    >>> sce(torch.tensor([[[1.0, 5.0]], [[-4.0, 5.0]]]), density=0.5)
    tensor([[-4.,  0.]])
    """
    d, w = _prepare(deltas, weights, elects=True)
    check_density(density)
    selected = 1.0 if density == 1 else _most_varied(d, density)
    energies = [float((_wide(x) * selected).square_().mean()) for x in d]
    most = max(energies)
    if not most:
        return torch.zeros_like(d[0])
    return scale * elected_mean(
        (x * selected for x in d), [v * (e / most) for v, e in zip(w, energies, strict=True)], w
    )


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least: squares of half-precision updates underflow."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _most_varied(deltas: Deltas, density: float) -> Tensor:
    """1 for the share `density` of the entries that vary over the updates, those that vary most, else 0."""
    if len(deltas) < 2:
        raise UserError("sce selects by the variance over adapters: give two or more, or density 1")
    mean = weighted_mean((_wide(x) for x in deltas), [1.0] * len(deltas))
    variance = torch.zeros_like(mean)
    for x in deltas:
        difference = _wide(x) - mean
        variance.addcmul_(difference, difference)
    # equal updates differ by the rounding of their mean alone
    varies = variance > (mean * (torch.finfo(mean.dtype).eps * len(deltas))).square_()
    count = max(1, int(density * int(torch.count_nonzero(varies))))
    return (varies & (variance >= kth_largest(variance.flatten(), count))).to(deltas[0].dtype)


METHODS: dict[str, Method] = {
    "linear": linear,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della": della,
    "sce": sce,
}
NEEDS_DENSITY = frozenset(METHODS) - {"linear"}
ELECTS = frozenset(METHODS) - {"linear", "dare_linear"}


def _dropped(deltas: Deltas, density: float, generator: Generators) -> Iterable[Tensor]:
    return (drop(x, density, g) for x, g in zip(deltas, _one_each(generator, len(deltas)), strict=True))


def _one_each(generator: Generators, n: int) -> Sequence[torch.Generator]:
    return [generator] * n if isinstance(generator, torch.Generator) else generator


def _prepare(deltas: Deltas, weights: Sequence[float] | None, elects: bool = False) -> tuple[Deltas, list[float]]:
    if isinstance(deltas, Tensor | list | tuple):  # a lazy sequence would be computed here for its shapes alone
        shapes = [list(d.shape) for d in deltas]
        if not shapes or any(s != shapes[0] for s in shapes):
            raise UserError(f"merging needs updates of one shape, not {shapes}")
    w = check_weights(weights, len(deltas), elects)
    if min(w) < 0:
        return deltas, w
    # only the ratio counts, and counts of traces may overflow a dtype; a power of two divides without rounding
    return deltas, [math.ldexp(x, -math.frexp(max(w))[1]) for x in w]
