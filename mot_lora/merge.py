"""Merging methods on true updates, composed of a few primitives.

Every method reads its updates one after the other, so that a lazy sequence of them is never in memory whole.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mot_lora.errors import UserError

Deltas = Tensor | Sequence[Tensor]
Generators = torch.Generator | Sequence[torch.Generator]
Method = Callable[..., Tensor]
SAMPLE = 1 << 14  # entries that bracket a selection


def seed_for(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else, e.g. (run seed, round, teacher).

    >>> seed_for(0, 1, "a") == seed_for(0, 1, "a") != seed_for(0, 1, "b")
    True
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --- the primitives --------------------------------------------------------------------------------


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the largest entries by magnitude, zero the rest (the trim step of TIES, arXiv 2306.01708).

    Keeps max(1, floor(density * numel)) entries, and all that tie with the smallest of them.

    Errors: UserError for a density outside (0, 1].

    >>> trim(torch.tensor([[3.0, -1.0], [2.0, 0.5]]), 0.5)
    tensor([[3., 0.],
            [2., 0.]])
    """
    check_density(density)
    count = max(1, int(density * delta.numel()))
    if count >= delta.numel():
        return delta
    # |x| > the number before the threshold is |x| >= the threshold
    below = torch.nextafter(kth_largest(delta.abs().flatten(), count), torch.tensor(-1.0).to(delta))
    return torch.nn.functional.hardshrink(delta, below.item())


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of a vector, exactly; much faster than a full selection where the vector is long.

    A sample brackets the answer, the entries outside of the bracket are counted, and those within are searched
    (Floyd and Rivest 1975). Where the sample misleads, all are searched.

    >>> kth_largest(torch.tensor([3.0, 1.0, 2.0]), 2)
    tensor(2.)
    """
    n = values.numel()
    if n > SAMPLE:
        sample = values[:: n // SAMPLE | 1].sort(descending=True).values
        at, spread = k / n * len(sample), 4 * (k / n * (1 - k / n) * len(sample)) ** 0.5 + 1
        high = sample[max(0, int(at - spread))]
        low = sample[min(len(sample) - 1, int(at + spread))]
        within = values[(values >= low) & (values <= high)]
        left = k - int(torch.count_nonzero(values > high))
        if 0 < left <= within.numel():
            values, k = within, left
    return values.kthvalue(values.numel() - k + 1).values


def drop(delta: Tensor, density: float | Tensor, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density` and divide what is kept by it (DARE, arXiv 2311.03099).

    The mean over many draws is the delta itself. `density` may differ by entry. Draw with a CPU generator, and a seed
    means the same on every device.

    Errors: UserError for a density outside (0, 1].

    >>> drop(torch.ones(1, 4), 0.5, torch.Generator().manual_seed(0)).unique().tolist()
    [0.0, 2.0]
    """
    if isinstance(density, float | int):
        check_density(density)
        if density == 1:
            return delta
    drawn = torch.rand(delta.shape, generator=generator, device=generator.device).to(delta.device)
    return delta.masked_fill(drawn >= density, 0.0) / density


def rank_densities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Probabilities of being kept that grow with magnitude, row by row (MagPrune of DELLA, arXiv 2406.11617).

    From density - epsilon for a row's smallest entry to density + epsilon for its largest, evenly by rank.

    >>> rank_densities(torch.tensor([[3.0, -1.0, 2.0]]), 0.5, 0.25)
    tensor([[0.7500, 0.2500, 0.5000]])
    """
    ranks = delta.abs().argsort(-1).argsort(-1).to(delta.dtype)
    return density + epsilon * (2 * ranks / max(1, delta.shape[-1] - 1) - 1)


def elect_sign(weighted: Deltas) -> Tensor:
    """The sign, entry by entry, that the summed updates have (TIES, arXiv 2306.01708).

    weighted: [n, ...] or n of [...], the weights already applied. Returns [...], True for plus; a tie counts as plus.

    >>> elect_sign(torch.tensor([[[2.0, 1.0]], [[-1.0, -3.0]]]))
    tensor([[ True, False]])
    """
    return sum(weighted[1:], start=weighted[0]) >= 0


def weighted_mean(deltas: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i d_i / sum_i w_i, one update in memory at a time.

    deltas: n of one shape; weights: n, not negative, not all 0.

    >>> weighted_mean(torch.tensor([[4.0], [-1.0]]), [1, 1])
    tensor([1.5000])
    """
    total: Tensor | None = None
    for delta, w in zip(deltas, weights, strict=True):
        total = torch.zeros_like(delta) if total is None else total
        total.add_(delta, alpha=w)
    if total is None:
        raise UserError("nothing to merge: give at least one update")
    return total.div_(sum(weights))


def elected_mean(deltas: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean, entry by entry, over only those updates that have the elected sign (TIES, arXiv 2306.01708).

    sum_i w_i d_i [sign d_i = s] / sum_i w_i [sign d_i = s] with s = elect_sign of the w_i d_i. Both signs' sums are
    kept while the updates pass by, so that one pass and one update in memory at a time are enough. An entry for which
    nobody votes is 0.

    >>> elected_mean(torch.tensor([[[4.0]], [[-1.0]]]), [1, 1])
    tensor([[4.]])
    """
    sums: list[Tensor] = []
    votes: list[Tensor] = []
    part = torch.empty(0)
    for delta, w in zip(deltas, weights, strict=True):
        if not sums:
            sums, votes = ([torch.zeros_like(delta), torch.zeros_like(delta)] for _ in range(2))
            part = torch.empty_like(delta)
        for k, clamp in enumerate((torch.clamp_min, torch.clamp_max)):
            clamp(delta.detach(), 0.0, out=part)
            sums[k].add_(part, alpha=w)
            votes[k].add_(part.sign_(), alpha=w)
    if not sums:
        raise UserError("nothing to merge: give at least one update")
    plus = elect_sign(sums)
    total = torch.where(plus, sums[0], sums[1])
    vote = torch.where(plus, votes[0], votes[1]).abs_()
    return total.div_(vote.masked_fill_(vote == 0, 1.0))


# --- the methods ---------------------------------------------------------------------------------


def linear(deltas: Deltas, weights: Sequence[float] | None = None, *, scale: float = 1.0) -> Tensor:
    """The weighted mean of the updates (model soups, arXiv 2203.05482).

    scale * sum_i w_i d_i / sum_i w_i. deltas: [n, ...] or a sequence of [...], any float dtype; weights: n
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
    kept = (drop(x, density, g) for x, g in zip(d, _one_each(generator, len(d)), strict=True))
    return scale * weighted_mean(kept, w)


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
    kept = (drop(x, density, g) for x, g in zip(d, _one_each(generator, len(d)), strict=True))
    return scale * elected_mean(kept, w)


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
    `dare_linear`, and UserError for an epsilon that leaves (0, 1).

    >>> della(torch.ones(2, 1, 1), density=1.0, generator=torch.Generator())
    tensor([[1.]])
    """
    d, w = _prepare(deltas, weights)
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
    d, w = _prepare(deltas, weights)
    check_density(density)
    selected = 1.0 if density == 1 else _most_varied(d, density)
    energies = [float((x * selected).square_().mean()) for x in d]
    if not any(energies):
        return torch.zeros_like(d[0])
    return scale * elected_mean((x * selected for x in d), [v * e for v, e in zip(w, energies, strict=True)])


def _most_varied(deltas: Deltas, density: float) -> Tensor:
    """1 for the share `density` of the entries that vary over the updates, those that vary most, else 0."""
    if len(deltas) < 2:
        raise UserError("sce selects by the variance over adapters: give two or more, or density 1")
    mean = weighted_mean(deltas, [1.0] * len(deltas))
    variance = torch.zeros_like(mean)
    for x in deltas:
        difference = x - mean
        variance.addcmul_(difference, difference)
    # equal updates differ by the rounding of their mean alone
    varies = variance > (mean * (torch.finfo(mean.dtype).eps * len(deltas))).square_()
    count = max(1, int(density * int(torch.count_nonzero(varies))))
    return (varies & (variance >= kth_largest(variance.flatten(), count))).to(mean.dtype)


METHODS: dict[str, Method] = {
    "linear": linear,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della": della,
    "sce": sce,
}
NEEDS_DENSITY = frozenset(METHODS) - {"linear"}


def _one_each(generator: Generators, n: int) -> Sequence[torch.Generator]:
    return [generator] * n if isinstance(generator, torch.Generator) else generator


def _prepare(deltas: Deltas, weights: Sequence[float] | None) -> tuple[Deltas, list[float]]:
    if isinstance(deltas, Tensor | list | tuple):  # a lazy sequence would be computed here for its shapes alone
        shapes = [list(d.shape) for d in deltas]
        if not shapes or any(s != shapes[0] for s in shapes):
            raise UserError(f"merging needs updates of one shape, not {shapes}")
    w = check_weights(weights, len(deltas))
    return deltas, [x / max(w) for x in w]  # only the ratio counts, and counts of traces may overflow a dtype


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
