"""Updates of a model's parameters: low-rank ones as factors, D = scaling * B @ A, dense ones made on demand."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mot_lora.errors import UserError

# torch.linalg comes without types
eigh: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.linalg.eigh  # pyright: ignore
svd: Callable[..., tuple[Tensor, Tensor, Tensor]] = partial(torch.linalg.svd, full_matrices=False)  # pyright: ignore

Form = Literal["linear", "embedding", "parameter", "bias", "whole"]
"""How PEFT holds an update: LoRA on a linear layer, on an embedding, on a bare parameter (stacked experts); the bias
of a LoRA's B; or a trained copy of the whole parameter (modules_to_save)."""


@contextmanager
def full_precision() -> Generator[None]:
    """Multiply fp32 tensors on a GPU in fp32, also where TF32 is allowed, which keeps 10 of the 23 bits."""
    products = torch.backends.cuda.matmul
    allowed = products.fp32_precision
    if allowed != "tf32":
        yield
        return
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # TF32 was allowed by the newer setting, and torch refuses to mix the two
        older = ""
    if older:
        torch.set_float32_matmul_precision("highest")
    else:
        products.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older:
            torch.set_float32_matmul_precision(older)
        else:
            products.fp32_precision = allowed


@dataclass(frozen=True)
class Factors:
    """One parameter's low-rank update, D = scaling * B @ A.

    a: [..., r, in], b: [..., out, r], any float dtype, with equal leading dimensions (experts); scaling is alpha/r, or
    alpha/sqrt(r) for rsLoRA (arXiv 2312.03732).

    Errors: UserError when the shapes do not multiply.

    >>> Factors(torch.ones(2, 3), torch.ones(4, 2), scaling=0.5).delta().shape
    torch.Size([4, 3])
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    form: Form = "linear"

    def __post_init__(self) -> None:
        a, b = self.a.shape, self.b.shape
        if len(a) < 2 or len(a) != len(b) or a[:-2] != b[:-2] or a[-2] != b[-1]:
            raise UserError(f"factors A {list(a)} and B {list(b)} do not multiply: A must be [r, in] and B [out, r]")

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.b.shape[:-1], self.a.shape[-1]))

    @full_precision()
    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense update scaling * B @ A, [..., out, in], computed in `dtype`."""
        # on the smaller factor, not on the product
        b, a = self.b.to(dtype), self.a.to(dtype)
        return (b * self.scaling) @ a if b.numel() < a.numel() else b @ (a * self.scaling)


@dataclass(frozen=True)
class Origin:
    """The base's values of a parameter of which an adapter has a trained copy, and the parameter's full name."""

    name: str
    read: Callable[[torch.dtype], Tensor]
    transposed: bool = False


@dataclass(frozen=True)
class Dense:
    """One parameter's update that is not low-rank: made when asked for, so that it takes no memory before.

    make(dtype) gives D of `shape`; a `whole` parameter has its `origin`, to which D is added.

    >>> Dense(torch.Size([2]), lambda dtype: torch.ones(2, dtype=dtype), "bias").delta()
    tensor([1., 1.])
    """

    shape: torch.Size
    make: Callable[[torch.dtype], Tensor]
    form: Form = "linear"
    origin: Origin | None = None

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update, computed in `dtype`."""
        return self.make(dtype)


Update = Factors | Dense


@dataclass(frozen=True)
class Adapter:
    """A named set of updates: module name in the base model -> its weight's update.

    A bare parameter, and one that is not a weight, is named in full: `model.layers.0.self_attn.q_proj.bias`. `base` is
    the base model that the adapter says it was trained on, if it says so; `targets` its PEFT config.

    >>> Adapter("t1", {"layers.0.q_proj": Factors(torch.ones(2, 3), torch.ones(4, 2))}).name
    't1'
    """

    name: str
    updates: Mapping[str, Update]
    base: str | None = None
    targets: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def meta_updates(self) -> Mapping[str, Update]:
        """The updates with their shapes, ranks and forms, but maybe no numbers: nothing is read that is read lazily."""
        return getattr(self.updates, "meta_updates", self.updates)


def concatenate(parts: Sequence[Factors], weights: Sequence[float], dtype: torch.dtype = torch.float32) -> Factors:
    """The exact weighted sum of low-rank updates, as one of rank sum(r).

    sum_i w_i * s_i * B_i @ A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] @ [A_1; A_2; ...], in `dtype`.

    Errors: UserError when there are no parts or their shapes differ.

    >>> f = Factors(torch.eye(2), torch.eye(2))
    >>> concatenate([f, f], [0.5, 0.5]).rank
    4
    """
    if not parts:
        raise UserError("nothing to add up: give at least one low-rank update")
    if len({p.shape for p in parts}) > 1:
        raise UserError(f"updates of different shapes: {[list(p.shape) for p in parts]}")
    b = [p.b.to(dtype) * (w * p.scaling) for p, w in zip(parts, weights, strict=True)]
    return Factors(torch.cat([p.a.to(dtype) for p in parts], dim=-2), torch.cat(b, dim=-1), form=parts[0].form)


def spectrum(update: Factors | Tensor) -> Tensor:
    """All singular values of an update, largest first, in fp64; right to 1e-8 of the largest (see `truncate`).

    >>> spectrum(Factors(torch.eye(2), 3 * torch.eye(2)))
    tensor([3., 3.], dtype=torch.float64)
    """
    if isinstance(update, Tensor):
        return _dense_spectrum(update.double())[0]
    return _core_svd(update)[1]


def truncate(update: Factors | Tensor, rank: int) -> tuple[Factors, float]:
    """The best rank-`rank` copy of an update, and the share of its norm that was lost, |D - D_rank| / |D|.

    Factors: from the Gram matrices of both sides, B^T B = U_b S_b U_b^T and A A^T alike, an SVD of the small core
    s * S_b^1/2 U_b^T U_a S_a^1/2 (r x r): O((out + in) r^2), never an SVD of the [out, in] matrix. A dense update:
    from the eigenvectors of the Gram matrix of its shorter side. The Gram matrices are in fp64, so that singular values
    are right to 1e-8 of the largest; fp32 out, with the singular values split evenly over both sides (Eckart-Young).

    Errors: UserError for a rank below 1.

    >>> small, lost = truncate(Factors(torch.eye(4), torch.eye(4)), 3)
    >>> small.rank, round(lost, 2)
    (3, 0.5)
    """
    if rank < 1:
        raise UserError(f"rank must be at least 1, not {rank}")
    if isinstance(update, Tensor):
        return _truncate_dense(update, rank)
    left, s, right = _core_svd(update)
    root = s[..., None, :rank].sqrt()
    b = update.b.double() @ (left[..., :rank] * root)
    a = (right[..., :rank, :] * root.mT) @ update.a.double()
    return Factors(a.float(), b.float(), form=update.form), _share_lost(s, rank)


def _core_svd(update: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """L, s, R with orthonormal B @ L and R @ A, and D = (B @ L) s (R @ A)."""
    b, a = update.b.double(), update.a.double()
    # a column of B and its row of A may share their product unequally; in equal shares, what is small is small in both
    size_b, size_a = b.square().sum(-2).sqrt(), a.square().sum(-1).sqrt()
    share = torch.where((size_b > 0) & (size_a > 0), (size_a / size_b).sqrt(), 1.0)
    b, a = b * share[..., None, :], a / share[..., None]
    basis_b, root_b = _whiten(b.mT @ b)
    basis_a, root_a = _whiten(a @ a.mT)
    core = root_b[..., None] * (basis_b.mT @ basis_a) * root_a[..., None, :] * update.scaling
    u, s, vh = svd(core)
    left = share[..., None] * (basis_b @ (u * _inverse(root_b)[..., None]))
    right = ((vh * _inverse(root_a)[..., None, :]) @ basis_a.mT) / share[..., None, :]
    return left, s, right


def _truncate_dense(delta: Tensor, rank: int) -> tuple[Factors, float]:
    exact = delta.double()
    wide = exact.shape[-2] <= exact.shape[-1]
    s, vectors = _dense_spectrum(exact)
    top = vectors[..., :rank]
    root = s[..., None, :rank].sqrt()
    projected = top.mT @ exact if wide else exact @ top  # = s * the other side's singular vectors
    scale = _inverse(root)
    small = Factors(projected * scale.mT, top * root) if wide else Factors((top * root).mT, projected * scale)
    return Factors(small.a.float().contiguous(), small.b.float().contiguous()), _share_lost(s, rank)


def _dense_spectrum(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and the singular vectors of the shorter side."""
    wide = exact.shape[-2] <= exact.shape[-1]
    values, vectors = eigh(exact @ exact.mT if wide else exact.mT @ exact)
    return values.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)


def _whiten(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a Gram matrix, and the roots of its eigenvalues, 0 for what is rounding."""
    values, vectors = eigh(gram)
    noise = values.amax(-1, keepdim=True) * (torch.finfo(gram.dtype).eps * gram.shape[-1])
    return vectors, values.where(values > noise, 0.0).sqrt()


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1 / x, 0.0)


def _share_lost(s: Tensor, rank: int) -> float:
    total = float(s.square().sum())
    return math.sqrt(float(s[..., rank:].square().sum()) / total) if total else 0.0


def inner(x: Update, y: Update) -> float:
    """The Frobenius inner product of two updates, without making low-rank ones dense.

    <D_x, D_y> = s_x s_y tr((B_x^T B_y)(A_y A_x^T)), in fp64.

    >>> f = Factors(torch.eye(2), torch.eye(2))
    >>> inner(f, f)
    2.0
    """
    if isinstance(x, Dense) or isinstance(y, Dense):
        return float((x.delta() * y.delta()).sum(dtype=torch.float64))
    core_b, core_a = x.b.double().mT @ y.b.double(), x.a.double() @ y.a.double().mT
    return x.scaling * y.scaling * float((core_b * core_a).sum())
