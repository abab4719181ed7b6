"""Low-rank updates kept as factors: D = scaling * B @ A."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mot_lora.errors import UserError

# torch.linalg comes without types
_qr: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.linalg.qr  # pyright: ignore
_svd: Callable[..., tuple[Tensor, Tensor, Tensor]] = partial(torch.linalg.svd, full_matrices=False)  # pyright: ignore


@dataclass(frozen=True)
class Factors:
    """One module's update, D = scaling * B @ A.

    a: [r, in], b: [out, r], any float dtype; scaling is alpha/r, or alpha/sqrt(r) for rsLoRA
    (arXiv 2312.03732).

    Errors: UserError when the shapes do not multiply.

    >>> Factors(torch.ones(2, 3), torch.ones(4, 2), scaling=0.5).delta().shape
    torch.Size([4, 3])
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise UserError(
                f"factors A {list(self.a.shape)} and B {list(self.b.shape)} do not multiply: "
                "A must be [r, in] and B [out, r]"
            )

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.b.shape[0], self.a.shape[1]))

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense update scaling * B @ A, [out, in], computed in `dtype`."""
        return (self.b.to(dtype) @ self.a.to(dtype)).mul_(self.scaling)


@dataclass(frozen=True)
class Adapter:
    """A named set of low-rank updates: module name in the base model -> Factors.

    `base` is the base model that the adapter says it was trained on, if it says so.

    >>> Adapter("t1", {"layers.0.q_proj": Factors(torch.ones(2, 3), torch.ones(4, 2))}).name
    't1'
    """

    name: str
    factors: Mapping[str, Factors]
    base: str | None = None


def concatenate(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The exact weighted sum of low-rank updates, as one of rank sum(r).

    sum_i w_i * s_i * B_i @ A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] @ [A_1; A_2; ...], in fp32.

    Errors: UserError when there are no parts or their shapes differ.

    >>> f = Factors(torch.eye(2), torch.eye(2))
    >>> concatenate([f, f], [0.5, 0.5]).rank
    4
    """
    if not parts:
        raise UserError("nothing to add up: give at least one low-rank update")
    if len({p.shape for p in parts}) > 1:
        raise UserError(f"updates of different shapes: {[list(p.shape) for p in parts]}")
    b = [p.b.float() * (w * p.scaling) for p, w in zip(parts, weights, strict=True)]
    return Factors(torch.cat([p.a.float() for p in parts]), torch.cat(b, dim=1))


def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best rank-`rank` copy of an update, and the share of its norm that was lost.

    B = Q_b R_b, A^T = Q_a R_a, SVD of the small core s * R_b R_a^T (r x r): the cost is O((out + in) r^2), never an SVD
    of the [out, in] matrix. Lost is |D - D_rank| / |D| (Eckart-Young). fp32 out, the core in fp64.
    The singular values are split evenly over both sides.

    Errors: UserError for a rank below 1.

    >>> small, lost = truncate(Factors(torch.eye(4), torch.eye(4)), 3)
    >>> small.rank, round(lost, 2)
    (3, 0.5)
    """
    if rank < 1:
        raise UserError(f"rank must be at least 1, not {rank}")
    q_b, r_b = _qr(factors.b.double())
    q_a, r_a = _qr(factors.a.double().T)
    u, s, vh = _svd(factors.scaling * r_b @ r_a.T)
    total = float(s.square().sum())
    lost = math.sqrt(float(s[rank:].square().sum()) / total) if total else 0.0
    root = s[:rank].sqrt()
    b, a = (q_b @ u[:, :rank]) * root, root[:, None] * (vh[:rank] @ q_a.T)
    return Factors(a.float().contiguous(), b.float().contiguous()), lost


def inner(x: Factors, y: Factors) -> float:
    """The Frobenius inner product of two updates, without making either dense.

    <D_x, D_y> = s_x s_y tr((B_x^T B_y)(A_y A_x^T)), in fp64.

    >>> f = Factors(torch.eye(2), torch.eye(2))
    >>> inner(f, f)
    2.0
    """
    core_b, core_a = x.b.double().T @ y.b.double(), x.a.double() @ y.a.double().T
    return x.scaling * y.scaling * float((core_b * core_a).sum())
