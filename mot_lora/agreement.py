"""How far the branches of a round agree, and how much of their merge the weights took up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mot_lora.lowrank import Adapter, inner
from mot_lora.records import Tally


def tally(adapters: Sequence[Adapter], module: str, base: Tensor, update: Tensor, change: Tensor) -> Tally:
    """The sums over one module's entries.

    base, update, change: [out, in], W_0, the merged D and what the fold did to the weights in use. A module that an
    adapter does not have counts as an update of 0, which has no sign and conflicts with nothing.

    >>> from mot_lora.lowrank import Factors
    >>> one = Adapter("a", {"m": Factors(torch.ones(1, 2), torch.ones(2, 1))})
    >>> tally([one], "m", torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2)).survived
    1.0
    """
    factors = [a.updates.get(module) for a in adapters]
    gram = tuple(tuple(0.0 if x is None or y is None else inner(x, y) for y in factors) for x in factors)
    signs = torch.stack([f.delta().sign() if f else torch.zeros_like(update) for f in factors])
    return Tally(
        entries=update.numel(),
        base_sq=_dot(base, base),
        update_sq=_dot(update, update),
        kept=_dot(change, update),
        conflicts=int((signs.amax(0) * signs.amin(0) < 0).sum()),
        gram=gram,
    )


def _dot(x: Tensor, y: Tensor) -> float:
    # fp64 accumulation of fp32 products, without an fp64 copy of either
    return float((x * y).sum(dtype=torch.float64))
