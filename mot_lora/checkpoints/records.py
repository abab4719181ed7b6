"""What is known of a full model that was written: how much of an update is in it, and how exactly."""

import math
from collections.abc import Mapping
from typing import Self

from mot_lora.records import Record

ENOUGH = 0.9  # the share of an update below which too little of it survived rounding


class KeptRecord(Record):
    """The share of an update D that the written weights have, <change, D> / |D|^2: in total, and of the worst layer.

    None if the update is 0.
    """

    survived: float | None = None
    worst: tuple[str, float] | None = None

    @classmethod
    def of(cls, sums: Mapping[str, tuple[float, float]]) -> Self:
        """From each layer's <change, D> and |D|^2."""
        kept, square = (math.fsum(pair[i] for pair in sums.values()) for i in (0, 1))
        shares = {layer: k / s for layer, (k, s) in sums.items() if s}
        worst = min(shares, key=lambda layer: shares[layer], default=None)
        return cls(survived=kept / square if square else None, worst=(worst, shares[worst]) if worst else None)

    @property
    def faded(self) -> bool:
        """Whether too much of the update is lost, in total or in a layer."""
        shares = [self.survived, self.worst and self.worst[1]]
        return any(share is not None and share < ENOUGH for share in shares)

    @property
    def text(self) -> str:
        """`0.9312 of the update survived, 0.8841 in model.layers.3`."""
        if self.survived is None or self.worst is None:
            return "the update is 0"
        return f"{self.survived:.4f} of the update survived, {self.worst[1]:.4f} in {self.worst[0]}"


class VerifiedTensor(Record):
    """One written tensor against W_0 + D: |D|, <change, D> / |D|^2, and its largest error in units of rounding.

    A unit is half a step of the tensor's dtype at that entry, the most that one rounding can cost; `survived` is None
    for an update of 0.
    """

    update_norm: float
    survived: float | None
    error: float


class VerifyRecord(Record):
    """The verification of a folded checkpoint: every updated tensor, and the number of others equal to the base's.

    `loaded`: whether transformers found all tensors of its model class; False if the model has its own code.
    """

    tensors: dict[str, VerifiedTensor]
    untouched: int
    loaded: bool

    @property
    def error(self) -> float:
        """The largest error of all tensors, in units of rounding."""
        return max((t.error for t in self.tensors.values()), default=0.0)
