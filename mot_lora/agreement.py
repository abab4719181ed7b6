"""How far adapters agree, and how much of their merge the weights took up."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mot_lora.lowrank import Adapter, Update, inner
from mot_lora.tally import Tally


def tally(
    adapters: Sequence[Adapter],
    module: str,
    base: Tensor | None = None,
    update: Tensor | None = None,
    change: Tensor | None = None,
) -> Tally:
    """The sums over one module's entries; what is not given counts as 0.

    base, update, change: of the module's shape, W_0, the merged D and what the fold did to the weights in use. A module
    that an adapter does not have counts as an update of 0, which has no sign and conflicts with nothing.

    >>> from mot_lora.lowrank import Factors
    >>> one = Adapter("a", {"m": Factors(torch.ones(1, 2), torch.ones(2, 1))})
    >>> tally([one], "m", torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2)).survived
    1.0
    """
    parts = [a.updates.get(module) for a in adapters]
    have = [p for p in parts if p is not None]
    gram = [[0.0] * len(parts) for _ in parts]
    for i, x in enumerate(parts):
        for j, y in enumerate(parts[: i + 1]):
            if x is not None and y is not None:
                gram[i][j] = gram[j][i] = inner(x, y)
    conflicts, opposed = _conflicts(parts)
    return Tally(
        entries=have[0].shape.numel(),
        base_sq=0.0 if base is None else _dot(base, base),
        update_sq=0.0 if update is None else _dot(update, update),
        kept=0.0 if update is None or change is None else _dot(change, update),
        conflicts=conflicts,
        gram=tuple(map(tuple, gram)),
        opposed=opposed,
    )


def layer_of(module: str) -> str:
    """The transformer layer that a module belongs to, or the module itself outside of them.

    >>> layer_of("model.layers.3.mlp.up_proj")
    'model.layers.3'
    """
    found = re.match(r".*?\.\d+(?=\.)", module)
    return found[0] if found else module


def _conflicts(updates: Sequence[Update | None]) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Entries on which the signs of any two updates differ, and those of every two; of each only its signs are kept."""
    signs = [None if u is None else u.delta().sign().to(torch.int8) for u in updates]
    opposed = [[0] * len(signs) for _ in signs]
    plus = minus = torch.zeros((), dtype=torch.bool)
    for i, x in enumerate(signs):
        if x is None:
            continue
        plus, minus = (x > 0).logical_or_(plus), (x < 0).logical_or_(minus)
        for j, y in enumerate(signs[:i]):
            if y is not None:
                opposed[i][j] = opposed[j][i] = int(torch.count_nonzero(x * y < 0))
    return int(torch.count_nonzero(plus & minus)), tuple(map(tuple, opposed))


def _dot(x: Tensor, y: Tensor) -> float:
    # fp64 accumulation of fp32 products, without an fp64 copy of either
    return float((x * y).sum(dtype=torch.float64))
