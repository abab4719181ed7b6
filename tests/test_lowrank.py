"""Low-rank arithmetic against dense linear algebra in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mot_lora.errors import UserError
from mot_lora.lowrank import Adapter, Factors, concatenate, inner, truncate

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)


def random_factors(out: int, width: int, rank: int, *, seed: int = 0, scaling: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, width, generator=generator)
    b = torch.randn(out, rank, generator=generator)
    return Factors(a, b, scaling)


def dense(f: Factors) -> Tensor:
    return f.scaling * torch.einsum("or,ri->oi", f.b.double(), f.a.double())


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


@pytest.mark.parametrize(
    ("a", "b"), [((2, 3), (4, 3)), ((3,), (4, 3)), ((2, 3), (4, 2, 1)), ((2, 3, 1), (4, 2)), ((0,), (2, 0))]
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


def test_an_adapter_cannot_be_changed_by_accident() -> None:
    adapter = Adapter("a", {"m": random_factors(2, 2, 1)})
    with pytest.raises(AttributeError):
        adapter.name = "b"  # pyright: ignore
