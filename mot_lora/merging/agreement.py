"""How far adapters agree, and how much of their merge is left in the weights after rounding."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mot_lora.merging.lowrank import Adapter, Update, inner
from mot_lora.records import FoldRecord


@dataclass(frozen=True)
class Agreement:
    """Sums over entries: how an update relates to its base, its fold and its branches. They add up over modules.

    base_sq: |W|^2; update_sq: |D|^2; kept: <change, D>, change being what the fold did to the weights in use;
    gram: <D_i, D_j> of the branches; opposed: entries on which the signs of branches i and j differ; conflicts: entries
    on which those of any two do.
    """

    entries: int
    base_sq: float
    update_sq: float
    kept: float
    conflicts: int
    gram: tuple[tuple[float, ...], ...]
    opposed: tuple[tuple[int, ...], ...]

    @property
    def relative_norm(self) -> float:
        """|D| / |W|."""
        return math.sqrt(self.update_sq / self.base_sq) if self.base_sq else math.inf

    @property
    def survived(self) -> float | None:
        """<change, D> / |D|^2: the share of the update that is in the weights after rounding; None for no update."""
        return self.kept / self.update_sq if self.update_sq else None

    @property
    def sign_conflict(self) -> float:
        """Share of entries on which the branches disagree about the sign."""
        return self.conflicts / self.entries

    @property
    def opposition(self) -> tuple[tuple[float, ...], ...]:
        """Share of entries on which every two branches have opposite signs."""
        return tuple(tuple(n / self.entries for n in row) for row in self.opposed)

    @property
    def cosine(self) -> tuple[tuple[float, ...], ...]:
        """Cosine between every two branches' updates."""
        norms = [math.sqrt(max(row[i], 0.0)) for i, row in enumerate(self.gram)]
        return tuple(
            tuple(g / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0 for j, g in enumerate(row))
            for i, row in enumerate(self.gram)
        )


def agreement_of(
    adapters: Sequence[Adapter],
    module: str,
    base: Tensor | None = None,
    update: Tensor | None = None,
    change: Tensor | None = None,
) -> Agreement:
    """The agreement over one module's entries; what is not given counts as 0.

    base, update, change: of the module's shape, W_0, the merged D and what the fold did to the weights in use. A module
    that an adapter does not have counts as an update of 0, which has no sign and conflicts with nothing.

    >>> from mot_lora.merging.lowrank import Factors
    >>> one = Adapter("a", {"m": Factors(torch.ones(1, 2), torch.ones(2, 1))})
    >>> agreement_of([one], "m", torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2)).survived
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
    return Agreement(
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


def summed(parts: Iterable[Agreement]) -> Agreement:
    """The agreement over several modules together. Errors: ValueError for none."""
    rows = list(parts)
    if not rows:
        raise ValueError("nothing to add up")
    n = range(len(rows[0].gram))
    return Agreement(
        entries=sum(p.entries for p in rows),
        base_sq=math.fsum(p.base_sq for p in rows),
        update_sq=math.fsum(p.update_sq for p in rows),
        kept=math.fsum(p.kept for p in rows),
        conflicts=sum(p.conflicts for p in rows),
        gram=tuple(tuple(math.fsum(p.gram[i][j] for p in rows) for j in n) for i in n),
        opposed=tuple(tuple(sum(p.opposed[i][j] for p in rows) for j in n) for i in n),
    )


def by_layer(parts: Mapping[str, Agreement]) -> dict[str, Agreement]:
    """The agreement in each layer, from that in each module."""
    layers: dict[str, list[Agreement]] = {}
    for module, part in parts.items():
        layers.setdefault(layer_of(module), []).append(part)
    return {layer: summed(rows) for layer, rows in layers.items()}


def fold_record(found: Agreement) -> FoldRecord:
    """How a round's merge went into the weights, as it is recorded."""
    return FoldRecord(
        relative_norm=found.relative_norm,
        survived=found.survived,
        sign_conflict=found.sign_conflict,
        cosine=found.cosine,
        opposition=found.opposition,
    )


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
