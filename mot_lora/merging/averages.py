"""Weighted means of updates, over all or over those that agree on a sign, with one update in memory at a time."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mot_lora.errors import UserError

Deltas = Tensor | Sequence[Tensor]


def nesterov(rounds: int, momentum: float) -> list[float]:
    """The weight of each round's merged update after so many rounds with Nesterov momentum over them.

    The velocity v_t = m v_(t-1) + D_t and the step D_t + m v_t of round t add up to sum_i c_i D_i with
    c_i = (1 - m^(n - i + 2)) / (1 - m) after n rounds, so a ledger needs no state beside its updates; 1 each for m = 0.
    As the outer step of DiLoCo (arXiv 2311.08105).

    >>> nesterov(2, 0.5)
    [1.75, 1.5]
    """
    return [(1 - momentum ** (rounds - i + 2)) / (1 - momentum) if momentum else 1.0 for i in range(1, rounds + 1)]


def elect_sign(weighted: Deltas) -> Tensor:
    """The sign, entry by entry, that the summed updates have (TIES, arXiv 2306.01708).

    weighted: [n, ...] or n of [...], the weights already applied. Returns [...], True for plus; a tie counts as plus.

    >>> elect_sign(torch.tensor([[[2.0, 1.0]], [[-1.0, -3.0]]]))
    tensor([[ True, False]])
    """
    return sum(weighted[1:], start=weighted[0]) >= 0


def weighted_mean(deltas: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i d_i / sum_i w_i, one update in memory at a time; with a negative weight the sum alone.

    deltas: n of one shape; weights: n, not all 0.

    >>> weighted_mean(torch.tensor([[4.0], [-1.0]]), [1, 1])
    tensor([1.5000])
    """
    total: Tensor | None = None
    for delta, w in zip(deltas, weights, strict=True):
        total = torch.zeros_like(delta) if total is None else total
        total.add_(delta, alpha=w)
    if total is None:
        raise UserError("nothing to merge: give at least one update")
    return total.div_(divisor(weights))


def elected_mean(deltas: Iterable[Tensor], weights: Sequence[float], voices: Sequence[float] | None = None) -> Tensor:
    """The mean, entry by entry, over only those updates that have the elected sign (TIES, arXiv 2306.01708).

    sum_i w_i d_i [sign d_i = s] / sum_i w_i [sign d_i = s] with s = elect_sign of the w_i d_i, or of the v_i d_i where
    the sign is elected with other weights, `voices`. Both signs' sums are kept, so one pass with one
    update in memory at a time is enough. An entry without votes is 0.

    >>> elected_mean(torch.tensor([[[4.0]], [[-1.0]]]), [1, 1])
    tensor([[4.]])
    """
    sums: list[Tensor] = []
    votes: list[Tensor] = []
    part = balance = torch.empty(0)
    for delta, w, v in zip(deltas, weights, voices or weights, strict=True):
        if not sums:
            sums, votes = ([torch.zeros_like(delta), torch.zeros_like(delta)] for _ in range(2))
            part, balance = torch.empty_like(delta), torch.zeros_like(delta) if voices else balance
        if voices:
            balance.add_(delta.detach(), alpha=v)
        for k, clamp in enumerate((torch.clamp_min, torch.clamp_max)):
            clamp(delta.detach(), 0.0, out=part)
            sums[k].add_(part, alpha=w)
            votes[k].add_(part.sign_(), alpha=w)
    if not sums:
        raise UserError("nothing to merge: give at least one update")
    plus = elect_sign([balance] if voices else sums)
    minus = ~plus  # products with masks are several times faster than `where`
    total = sums[0].mul_(plus).add_(sums[1].mul_(minus))
    vote = votes[0].mul_(plus).sub_(votes[1].mul_(minus))
    return total.div_(vote.add_(vote == 0))


def divisor(weights: Sequence[float]) -> float:
    """What a weighted sum is divided by: its weights' sum, which makes it a mean, or 1 where one is negative.

    >>> divisor([2, 1]), divisor([1, -1])
    (3, 1.0)
    """
    return 1.0 if min(weights) < 0 else sum(weights)


def check_weights(weights: Sequence[float] | None, n: int, elects: bool = False) -> list[float]:
    """The weights of n adapters, all 1 when none are given.

    Errors: UserError for the wrong number, a weight that is not finite, all 0, and for a negative one where a sign is
    elected: an update to subtract has no vote.

    >>> check_weights(None, 2)
    [1.0, 1.0]
    """
    w = [1.0] * n if weights is None else [float(x) for x in weights]
    if len(w) != n:
        raise UserError(f"{len(w)} weights for {n} adapters: give one for each")
    if not all(map(math.isfinite, w)) or not any(w):
        raise UserError(f"weights must be finite, and not all 0: {w}")
    if elects and min(w) < 0:
        raise UserError(f"weights must not be negative where a sign is elected: {w}; subtract with linear, dare_linear")
    return w
