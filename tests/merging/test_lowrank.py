"""Low-rank arithmetic against dense linear algebra in fp64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mot_lora.errors import UserError
from mot_lora.merging.lowrank import Adapter, Dense, Factors, concatenate, inner, spectrum, truncate

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)


def random_factors(out: int, width: int, rank: int, *, seed: int = 0, scaling: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, width, generator=generator)
    b = torch.randn(out, rank, generator=generator)
    return Factors(a, b, scaling)


def stack(parts: list[Factors]) -> Factors:
    """Experts: matrices of one shape and scaling."""
    return Factors(torch.stack([p.a for p in parts]), torch.stack([p.b for p in parts]), parts[0].scaling)


def dense(f: Factors) -> Tensor:
    return f.scaling * torch.einsum("...or,...ri->...oi", f.b.double(), f.a.double())


def best_error(update: Tensor, rank: int) -> float:
    """|D - D_rank| by a full SVD of the dense matrix (Eckart-Young)."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    return float((update - (u[:, :rank] * s[:rank]) @ vh[:rank]).norm())


def test_delta_is_scaling_times_b_times_a() -> None:
    f = Factors(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [-2.0]]), scaling=0.5)
    assert f.delta().tolist() == [[0.5, 1.0, 1.5], [-1.0, -2.0, -3.0]]
    assert (f.rank, f.shape) == (1, (2, 3))


def test_delta_of_bf16_factors_multiplies_in_the_asked_precision() -> None:
    f = random_factors(7, 5, 3, scaling=1.7)
    stored = Factors(f.a.bfloat16(), f.b.bfloat16(), 1.7)
    assert stored.delta().dtype == torch.float32
    torch.testing.assert_close(stored.delta(torch.float64), dense(stored), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(stored.delta().double(), dense(stored), rtol=1e-6, atol=1e-6)


def test_delta_leaves_its_factors_alone() -> None:
    f = Factors(torch.ones(1, 2), torch.ones(2, 1), scaling=3.0)
    assert torch.equal(f.delta(), f.delta())
    assert f.b.tolist() == [[1.0], [1.0]]


def test_stacked_experts_are_matrices_of_their_own() -> None:
    parts = [random_factors(4, 6, 3, seed=i, scaling=0.25) for i in range(5)]
    experts = stack(parts)
    assert (experts.rank, experts.shape) == (3, (5, 4, 6))
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(experts.delta(dtype), torch.stack([p.delta(dtype) for p in parts]))


def test_a_dense_update_is_made_when_asked_for_in_the_asked_precision() -> None:
    made: list[torch.dtype] = []

    def make(dtype: torch.dtype) -> Tensor:
        made.append(dtype)
        return torch.full((3,), 0.1, dtype=dtype)

    update = Dense(torch.Size([3]), make, "bias")
    assert made == []
    assert update.delta(torch.float64).tolist() == [0.1] * 3
    assert update.delta().dtype == torch.float32
    assert made == [torch.float64, torch.float32]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 3), (4, 3)),
        ((3,), (4, 3)),
        ((2, 3), (4, 2, 1)),
        ((2, 3, 1), (4, 2)),
        ((0,), (2, 0)),
        ((5, 2, 3), (4, 4, 2)),
    ],
)
def test_factors_that_do_not_multiply_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="do not multiply") as e:
        Factors(torch.ones(a), torch.ones(b))
    assert str(list(a)) in str(e.value)
    assert str(list(b)) in str(e.value)


@quick
@given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_concatenation_is_the_exact_weighted_sum(seed: int, ranks: list[int]) -> None:
    parts = [random_factors(6, 9, r, seed=seed + i, scaling=0.3 + i) for i, r in enumerate(ranks)]
    weights = [0.7 / (i + 1) for i in range(len(ranks))]
    whole = concatenate(parts, weights)
    expected = sum((w * dense(p) for p, w in zip(parts, weights, strict=True)), torch.zeros(6, 9, dtype=torch.float64))
    assert whole.rank == sum(ranks)
    # only the rounding of w * s * B to fp32 is allowed: the product is compared in fp64
    torch.testing.assert_close(dense(whole), expected, rtol=1e-6, atol=2e-6)


def test_concatenation_of_exact_numbers_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        Factors(
            torch.randint(-8, 9, (3, 5), generator=generator).bfloat16(),
            torch.randint(-8, 9, (4, 3), generator=generator).bfloat16(),
            scaling=s,
        )
        for s in (0.5, 2.0)
    ]
    whole = concatenate(parts, [0.25, 4.0])
    assert whole.a.dtype == whole.b.dtype == torch.float32
    assert torch.equal(dense(whole), 0.25 * dense(parts[0]) + 4.0 * dense(parts[1]))


def test_concatenation_errors() -> None:
    with pytest.raises(UserError, match="at least one"):
        concatenate([], [])
    with pytest.raises(UserError, match=r"different shapes: \[\[4, 3\], \[3, 4\]\]"):
        concatenate([random_factors(4, 3, 2), random_factors(3, 4, 2)], [1, 1])


@quick
@given(seeds, st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_concatenation_of_experts_is_that_of_each(seed: int, experts: int, ranks: list[int]) -> None:
    adapters = [
        [random_factors(5, 6, r, seed=seed + 100 * i + e, scaling=0.5 + i) for e in range(experts)]
        for i, r in enumerate(ranks)
    ]
    weights = [1.0 / (i + 1) for i in range(len(ranks))]
    whole = concatenate([stack(parts) for parts in adapters], weights)
    for e in range(experts):
        one = concatenate([parts[e] for parts in adapters], weights)
        assert torch.equal(whole.a[e], one.a)
        assert torch.equal(whole.b[e], one.b)


@quick
@given(seeds, st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(1, 10))
def test_truncation_is_the_best_copy_of_its_rank(seed: int, out: int, width: int, rank: int, asked: int) -> None:
    f = random_factors(out, width, rank, seed=seed, scaling=2.5)
    small, lost = truncate(f, asked)
    norm = float(dense(f).norm())
    error = float((dense(f) - dense(small)).norm())
    assert small.rank <= asked
    assert small.shape == f.shape
    assert error == pytest.approx(best_error(dense(f), asked), abs=2e-6 * norm)
    assert lost == pytest.approx(error / norm, abs=2e-6)


def test_truncation_of_a_larger_rank_than_there_is_loses_nothing() -> None:
    f = random_factors(6, 8, 3, seed=1, scaling=-0.7)
    small, lost = truncate(f, 50)
    assert small.rank == 3
    assert lost == 0
    torch.testing.assert_close(dense(small), dense(f), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", [1, 2, 4])
def test_truncation_of_a_rank_deficient_update(asked: int) -> None:
    # rank 2 stored in four columns, two of which repeat the others
    two = random_factors(9, 7, 2, seed=2)
    four = Factors(torch.cat([two.a, two.a]), torch.cat([two.b, two.b], dim=1))
    small, lost = truncate(four, asked)
    error = float((dense(four) - dense(small)).norm() / dense(four).norm())
    assert error == pytest.approx(best_error(dense(four), asked) / float(dense(four).norm()), abs=1e-6)
    assert lost == pytest.approx(error, abs=1e-6)
    assert (lost > 0.01) == (asked == 1)


def test_truncation_of_nothing_is_nothing() -> None:
    small, lost = truncate(Factors(torch.randn(3, 5, generator=torch.Generator()), torch.zeros(4, 3)), 2)
    assert lost == 0
    assert small.rank == 2
    assert torch.equal(small.delta(), torch.zeros(4, 5))


def test_truncation_balances_its_sides() -> None:
    f = random_factors(8, 8, 6, seed=3, scaling=100.0)
    small, _ = truncate(f, 4)
    assert (small.a.dtype, small.b.dtype, small.scaling) == (torch.float32, torch.float32, 1.0)
    singular = torch.linalg.svdvals(dense(f))[:4]
    torch.testing.assert_close(small.a.double().norm(dim=1) ** 2, singular, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small.b.double().norm(dim=0) ** 2, singular, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("out", "width"), [(40, 25), (25, 40), (30, 30)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_truncation_finds_the_singular_vectors(out: int, width: int, rank: int) -> None:
    f = random_factors(out, width, 14, seed=out, scaling=0.3)
    u, s, vh = torch.linalg.svd(dense(f), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
    for small, lost in (truncate(f, rank), truncate(dense(f), rank), truncate(f.delta(), rank)):
        assert float((dense(small) - expected).norm()) < 1e-6 * float(s[0])
        assert lost == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-6)
        # both sides span the leading subspaces
        for basis, side in ((u[:, :rank], small.b.double()), (vh[:rank].mT, small.a.double().mT)):
            assert float((side - basis @ (basis.mT @ side)).norm()) < 1e-6 * float(side.norm())
    torch.testing.assert_close(spectrum(f), s[:14], rtol=0, atol=1e-7 * float(s[0]))
    torch.testing.assert_close(spectrum(dense(f)), s, rtol=0, atol=1e-7 * float(s[0]))


@pytest.mark.parametrize("balance", [1.0, 1e-4, 1e2])
def test_truncation_of_parts_that_differ_10_000_times_in_size(balance: float) -> None:
    # as when a merge weighs one adapter low, or one has hardly moved; fp32 Gram matrices would lose the small one
    large, small = random_factors(60, 50, 4, seed=1), random_factors(60, 50, 4, seed=2)
    both = concatenate([large, Factors(small.a * balance, small.b / balance)], [1.0, 1e-4])
    singular = torch.linalg.svdvals(dense(both))
    assert float(singular[4] / singular[3]) < 3e-4
    torch.testing.assert_close(spectrum(both), singular[:8], rtol=1e-3, atol=0)
    for rank in (4, 5, 6, 7, 8):
        for kept, lost in (truncate(both, rank), truncate(dense(both), rank)):
            # what fp32 factors leave of the large part, and then what is best of the small one
            rounding = 3e-7 * float(singular[0])
            error = float((dense(both) - dense(kept)).norm())
            assert error == pytest.approx(best_error(dense(both), rank), rel=1e-3, abs=rounding)
            assert lost == pytest.approx(best_error(dense(both), rank) / float(singular.norm()), rel=1e-3, abs=1e-7)


def test_truncation_does_not_care_how_a_pair_shares_its_size() -> None:
    f = random_factors(20, 30, 6, seed=5, scaling=2.0)
    expected, lost = truncate(f, 3)
    for c in (1e-6, -1.0, 1e6):
        other, other_lost = truncate(Factors(c * f.a, f.b / c, f.scaling), 3)
        assert float((dense(other) - dense(expected)).norm()) < 2e-6 * float(dense(expected).norm())
        assert other_lost == pytest.approx(lost, rel=1e-6)


@quick
@given(seeds, st.integers(1, 9), st.integers(1, 9), st.integers(1, 11))
def test_truncation_of_a_dense_update_is_the_best_copy_of_its_rank(seed: int, out: int, width: int, rank: int) -> None:
    d = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    small, lost = truncate(d, rank)
    norm = float(d.norm())
    assert (small.rank, small.shape) == (min(rank, out, width), (out, width))
    assert (small.a.dtype, small.b.dtype, small.scaling) == (torch.float32, torch.float32, 1.0)
    assert small.a.is_contiguous()
    assert small.b.is_contiguous()
    error = float((d.double() - dense(small)).norm())
    assert error == pytest.approx(best_error(d.double(), rank), abs=2e-6 * norm)
    assert lost == pytest.approx(error / norm, abs=2e-6)
    singular = torch.linalg.svdvals(d.double())[:rank]
    torch.testing.assert_close(small.a.double().norm(dim=1) ** 2, singular, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.b.double().norm(dim=0) ** 2, singular, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("out", "width"), [(30, 20), (20, 30)])
def test_truncation_of_a_dense_update_of_low_rank_loses_nothing(out: int, width: int) -> None:
    f = random_factors(out, width, 3, seed=4)
    for rank in (3, 4, 15):
        small, lost = truncate(dense(f), rank)
        assert lost < 1e-6
        assert float((dense(small) - dense(f)).norm()) < 1e-6 * float(dense(f).norm())


@pytest.mark.parametrize("update", [torch.zeros(4, 6), torch.zeros(6, 4), torch.zeros(2, 4, 6)])
def test_truncation_of_a_dense_nothing_is_nothing(update: Tensor) -> None:
    small, lost = truncate(update, 3)
    assert lost == 0
    assert torch.equal(small.delta(), update)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_truncation_of_experts_is_that_of_each(seed: int, experts: int, rank: int, as_dense: bool) -> None:
    parts = [random_factors(6, 8, 4, seed=seed + e, scaling=1.5) for e in range(experts)]
    parts[0] = Factors(parts[0].a, 0 * parts[0].b, 1.5)  # an expert that was never chosen
    whole, lost = truncate(dense(stack(parts)) if as_dense else stack(parts), rank)
    squares = 0.0
    for e, part in enumerate(parts):
        one, lost_of_one = truncate(dense(part) if as_dense else part, rank)
        expected = dense(one)
        assert float((dense(whole)[e] - expected).norm()) <= 2e-6 * float(expected.norm())
        squares += float(dense(part).norm()) ** 2 * lost_of_one**2
    total = float(dense(stack(parts)).norm())
    assert lost == pytest.approx(math.sqrt(squares) / total if total else 0, abs=1e-7)


@quick
@given(seeds, st.integers(1, 5), st.booleans())
def test_no_other_copy_of_the_same_rank_is_closer(seed: int, rank: int, as_dense: bool) -> None:
    f = random_factors(9, 11, 6, seed=seed)
    small, _ = truncate(dense(f) if as_dense else f, rank)
    error = float((dense(f) - dense(small)).norm())
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-2, 0.1, 1.0, 100.0):
        # near it and far from it, and each with the other side that suits it best
        a = small.a.double() + size * torch.randn(small.a.shape, generator=generator).double()
        fitted = dense(f) @ torch.linalg.pinv(a) @ a
        b = small.b.double() + size * torch.randn(small.b.shape, generator=generator).double()
        for other in (fitted, b @ a, b @ torch.linalg.pinv(b) @ dense(f)):
            assert error <= float((dense(f) - other).norm()) * (1 + 1e-6)


def test_truncation_keeps_the_form_and_leaves_its_input_alone() -> None:
    f = Factors(torch.ones(2, 3), torch.ones(4, 2), 3.0, form="embedding")
    small, _ = truncate(f, 1)
    assert small.form == "embedding"
    assert torch.equal(f.a, torch.ones(2, 3))
    d = torch.ones(4, 3)
    truncate(d, 1)
    assert torch.equal(d, torch.ones(4, 3))


@pytest.mark.parametrize("rank", [0, -1])
def test_truncation_to_no_rank_is_refused(rank: int) -> None:
    with pytest.raises(UserError, match=f"at least 1, not {rank}"):
        truncate(random_factors(3, 3, 2), rank)


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_inner_product_equals_the_dense_one(seed: int, rank_x: int, rank_y: int) -> None:
    x = random_factors(7, 11, rank_x, seed=seed, scaling=0.5)
    y = random_factors(7, 11, rank_y, seed=seed + 1, scaling=-3.0)
    scale = float(dense(x).norm() * dense(y).norm())
    assert inner(x, y) == pytest.approx(float((dense(x) * dense(y)).sum()), abs=1e-12 * scale)
    assert inner(x, x) == pytest.approx(float(dense(x).square().sum()), rel=1e-12)


def test_inner_product_of_experts_and_of_dense_updates() -> None:
    x, y = (stack([random_factors(4, 5, 2, seed=10 * i + e, scaling=0.5) for e in range(3)]) for i in range(2))
    expected = float((dense(x) * dense(y)).sum())
    assert inner(x, y) == pytest.approx(expected, rel=1e-9)
    as_dense = Dense(y.shape, y.delta)
    assert inner(x, as_dense) == pytest.approx(expected, rel=1e-5)
    assert inner(as_dense, x) == pytest.approx(expected, rel=1e-5)
    assert inner(as_dense, as_dense) == pytest.approx(float(dense(y).square().sum()), rel=1e-5)


def test_an_adapter_cannot_be_changed_by_accident() -> None:
    adapter = Adapter("a", {"m": random_factors(2, 2, 1)})
    with pytest.raises(AttributeError):
        adapter.name = "b"  # pyright: ignore


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("allow", ["nothing", "set_float32_matmul_precision", "allow_tf32", "fp32_precision"])
def test_products_are_never_tf32_and_the_users_setting_stays(allow: str) -> None:
    """Whatever of torch's three ways TF32 was allowed by."""
    products, seen = torch.backends.cuda.matmul, []

    def older() -> str:
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:
            return "mixed"

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "matmul" in func.__name__:
                seen.append((products.fp32_precision, older()))
            return func(*args, **(kwargs or {}))

    try:
        if allow == "set_float32_matmul_precision":
            torch.set_float32_matmul_precision("medium")
        elif allow == "allow_tf32":
            products.allow_tf32 = True
        elif allow == "fp32_precision":
            products.fp32_precision = "tf32"
        before = products.fp32_precision, older()
        assert (before[0] == "tf32") is (allow != "nothing")
        with Seen():
            Factors(torch.ones(2, 3), torch.ones(4, 2)).delta()
        ((precision, legacy),) = seen
        assert precision != "tf32"
        assert legacy == "highest"  # torch checks that both say the same
        assert (products.fp32_precision, older()) == before
    finally:
        products.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
