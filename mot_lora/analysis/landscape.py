"""The loss around a round: on lines between its branches, along its update, and in random directions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mot_lora.analysis.confidence import LandscapeRecord, LossLine
from mot_lora.merging.lowrank import Adapter, Factors, Update, inner
from mot_lora.merging.merged import Merged, combine
from mot_lora.merging.seeds import seed_for

BETWEEN = (0.0, 0.25, 0.5, 0.75, 1.0)
ALONG = (0.0, 0.5, 1.0, 1.5, 2.0)  # shares of the round's update D
AROUND = (-1.0, -0.5, 0.5, 1.0)  # steps of size |D|
DIRECTIONS = 2


def points(branches: int) -> int:
    """The number of losses that `landscape` computes for `branches` branches.

    >>> points(2)
    18
    """
    return branches + math.comb(branches, 2) * (len(BETWEEN) - 2) + len(ALONG) + DIRECTIONS * len(AROUND)


def landscape(
    start: Sequence[Merged],
    end: Sequence[Merged],
    loss: Callable[[Sequence[Merged]], float],
    *,
    rank: int,
    seed: int,
    device: torch.device,
) -> LandscapeRecord:
    """The losses of students around that of a round, whose ledgers before and after it are `start` and `end`.

    loss: maps a ledger to the loss of W_0 + that ledger. rank, seed, device: of the random directions, of size |D|.
    """
    branches = end[-1].adapters
    pairs = [(a, b) for i, b in enumerate(branches) for a in branches[:i]]
    own = {a.name: loss([*start, combine([a])]) for a in branches}
    between = [
        LossLine(
            name=f"{a.name} to {b.name}",
            at=BETWEEN,
            losses=(
                own[a.name],
                *(loss([*start, combine([a, b], weights=(1 - x, x))]) for x in BETWEEN[1:-1]),
                own[b.name],
            ),
        )
        for a, b in pairs
    ]
    # with momentum a round also reweights earlier updates, so D is the difference of the ledgers
    along = [loss(_toward(start, end, s)) for s in ALONG]
    merged, middle = along[ALONG.index(1.0)], len(AROUND) // 2
    random: list[LossLine] = []
    for direction in _directions(start, end, rank, seed, device):
        losses = [loss([*end, combine([direction]).scaled(x)]) for x in AROUND]
        random.append(
            LossLine(
                name=direction.name,
                at=(*AROUND[:middle], 0.0, *AROUND[middle:]),
                losses=(*losses[:middle], merged, *losses[middle:]),
            )
        )
    update = LossLine(name="along the update", at=tuple(s - 1 for s in ALONG), losses=tuple(along))
    return LandscapeRecord(between=tuple(between), update=update, random=tuple(random))


def _directions(
    start: Sequence[Merged], end: Sequence[Merged], rank: int, seed: int, device: torch.device
) -> list[Adapter]:
    """Random low-rank updates, in each module of the same norm as the round's change."""
    factors: list[dict[str, Update]] = [{} for _ in range(DIRECTIONS)]
    for module, shape in {m: shape for merged in end for m, shape in merged.shapes.items()}.items():
        change: Any = torch.zeros(shape, device=device)  # Any, because torch's norm is untyped
        for merged in (*end, *(m.scaled(-1.0) for m in start)):
            if module in merged.shapes:
                change += merged.delta(module)
        for k, direction in enumerate(factors):
            drawn = seed_for(seed, "landscape", k, module)
            direction[module] = _random(shape, rank, float(change.norm()), drawn, device)
    return [Adapter(f"random {k}", direction) for k, direction in enumerate(factors, 1)]


def _random(shape: Sequence[int], rank: int, size: float, seed: int, device: torch.device) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    drawn = Factors(torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator))
    return Factors(drawn.a.to(device), drawn.b.to(device), size / math.sqrt(inner(drawn, drawn)))


def _toward(start: Sequence[Merged], end: Sequence[Merged], s: float) -> list[Merged]:
    """The ledger of start + s (end - start)."""
    return [m.scaled(share) for ledger, share in ((start, 1 - s), (end, s)) if share for m in ledger]
