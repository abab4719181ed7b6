"""Common bases of several low-rank updates, whose coordinates are merged in place of their weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mot_lora.merging.lowrank import Factors, svd, truncate


@dataclass(frozen=True)
class Aligned:
    """Updates in a common space: D_i = left @ coordinates[i] @ right.

    left: [out, k], coordinates: n of [k, j], right: [j, in], or None for the identity.
    """

    left: Tensor
    coordinates: list[Tensor]
    right: Tensor | None = None

    def factors(self, merged: Tensor) -> Factors:
        """The update that has the merged coordinates, exactly low-rank."""
        return Factors(merged if self.right is None else merged @ self.right, self.left)


def core(parts: Sequence[Factors]) -> Aligned:
    """The core space: D_i = U M_i V^T in orthonormal bases of all B's and all A's (Core Space, arXiv 2509.17786).

    U: left singular vectors of [B_1 | B_2 | ...], V^T: right singular vectors of [A_1; A_2; ...], M_i = U^T B_i A_i V,
    at most sum(r) x sum(r). Each pair is balanced first (singular values split evenly) and directions below 1e-6 of
    the largest, which are rounding, are left out, so that the result depends on the updates and not on how they were
    factored. fp64 within, lossless.

    >>> parts = [Factors(torch.eye(2), torch.eye(2)), Factors(torch.eye(2), -torch.eye(2))]
    >>> aligned = core(parts)
    >>> bool(torch.allclose(aligned.factors(aligned.coordinates[1]).delta(), -torch.eye(2)))
    True
    """
    balanced = [truncate(p, p.rank)[0] for p in parts]
    left, s, _ = svd(torch.cat([p.b.double() for p in balanced], dim=1))
    left = left[:, : _size(s)]
    _, s, right = svd(torch.cat([p.a.double() for p in balanced], dim=0))
    right = right[: _size(s)]
    coordinates = [(left.mT @ p.b.double()) @ (p.a.double() @ right.mT) for p in balanced]
    return Aligned(left.float(), [c.float() for c in coordinates], right.float())


def knots(parts: Sequence[Factors]) -> Aligned:
    """The joint space: [D_1 | D_2 | ...] = U S [V_1 | V_2 | ...], where the V_i are merged (KnOTS, arXiv 2410.19735).

    Here left = U S. Found from the factors: B's = Q R, then an SVD of the small
    [R_1 A_1 | R_2 A_2 | ...]. Directions below 1e-6 of the largest are rounding and left out. fp64 within.

    >>> parts = [Factors(torch.eye(2), torch.eye(2)), Factors(torch.eye(2), -torch.eye(2))]
    >>> aligned = knots(parts)
    >>> bool(torch.allclose(aligned.factors(aligned.coordinates[1]).delta(), -torch.eye(2)))
    True
    """
    q, _, _ = svd(torch.cat([p.b.double() * p.scaling for p in parts], dim=1))
    rows = [(q.mT @ (p.b.double() * p.scaling)) @ p.a.double() for p in parts]
    u, s, vh = svd(torch.cat(rows, dim=1))
    k = _size(s)
    left = (q @ u[:, :k]) * s[:k]
    return Aligned(left.float(), [v.float() for v in torch.split(vh[:k], parts[0].shape[1], dim=1)])


def _size(s: Tensor) -> int:
    """How many singular values are more than rounding, and at least 1."""
    return max(1, int(torch.count_nonzero(s > 1e-6 * s[0])))


Space = Callable[[Sequence[Factors]], Aligned]
SPACES: dict[str, Space] = {"core": core, "knots": knots}
