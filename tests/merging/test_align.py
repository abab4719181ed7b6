"""Common spaces of low-rank updates: against dense linear algebra in fp64, and as properties of whole merges."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mot_lora.errors import UserError
from mot_lora.merging.align import SPACES, Aligned, core, knots
from mot_lora.merging.lowrank import Adapter, Factors
from mot_lora.merging.merged import combine
from mot_lora.merging.methods import METHODS, NEEDS_DENSITY, della, linear, ties

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)
methods = st.sampled_from(sorted(METHODS))
spaces = st.sampled_from(sorted(SPACES))
both_spaces = pytest.mark.parametrize("space", sorted(SPACES))
OUT, WIDTH = 14, 11


def random_parts(
    ranks: Sequence[int] = (2, 3, 1), *, seed: int = 0, out: int = OUT, width: int = WIDTH
) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Factors(torch.randn(r, width, generator=generator), torch.randn(out, r, generator=generator), 0.3 + i)
        for i, r in enumerate(ranks)
    ]


def adapters_of(parts: Sequence[Factors]) -> list[Adapter]:
    return [Adapter(f"t{i}", {"m": p}) for i, p in enumerate(parts)]


def dense(f: Factors) -> Tensor:
    return f.scaling * (f.b.double() @ f.a.double())


def density_of(method: str, density: float) -> float | None:
    return density if method in NEEDS_DENSITY else None


def distance(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y|."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def check_lossless(aligned: Aligned, parts: Sequence[Factors]) -> None:
    size = max(float(dense(p).norm()) for p in parts)
    assert len(aligned.coordinates) == len(parts)
    for part, coordinates in zip(parts, aligned.coordinates, strict=True):
        right = torch.eye(part.shape[-1]) if aligned.right is None else aligned.right
        again = aligned.left.double() @ coordinates.double() @ right.double()
        assert float((again - dense(part)).norm()) <= 2e-6 * size
        assert float((dense(aligned.factors(coordinates)) - dense(part)).norm()) <= 2e-6 * size
        assert aligned.factors(coordinates).rank <= sum(p.rank for p in parts)


# --- lossless ----------------------------------------------------------------------------------------


@quick
@given(seeds, spaces, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(2, 16), st.integers(2, 16))
def test_every_update_comes_back_from_its_coordinates(
    seed: int, space: str, ranks: list[int], out: int, width: int
) -> None:
    parts = random_parts(ranks, seed=seed, out=out, width=width)
    check_lossless(SPACES[space](parts), parts)


def test_the_core_space_has_orthonormal_bases_and_small_coordinates() -> None:
    parts = random_parts((2, 3, 1))
    aligned = core(parts)
    assert aligned.right is not None
    assert aligned.left.shape == (OUT, 6)
    assert aligned.right.shape == (6, WIDTH)
    assert {tuple(c.shape) for c in aligned.coordinates} == {(6, 6)}
    for gram in (aligned.left.mT @ aligned.left, aligned.right @ aligned.right.mT):
        torch.testing.assert_close(gram, torch.eye(6), rtol=0, atol=1e-6)


def test_the_joint_space_is_the_svd_of_the_updates_side_by_side() -> None:
    parts = random_parts((2, 3, 1))
    aligned = knots(parts)
    singular = torch.linalg.svdvals(torch.cat([dense(p) for p in parts], dim=1))[:6]
    assert aligned.left.shape == (OUT, 6)
    torch.testing.assert_close(aligned.left.double().norm(dim=0), singular, rtol=1e-5, atol=0)
    stacked = torch.cat(aligned.coordinates, dim=1)
    torch.testing.assert_close(stacked @ stacked.mT, torch.eye(6), rtol=0, atol=1e-5)


@both_spaces
@pytest.mark.parametrize(
    "change",
    [
        lambda parts: [parts[0], parts[0]],
        lambda parts: [parts[0], Factors(parts[0].a, -parts[0].b, parts[0].scaling), parts[1]],
        lambda parts: [parts[0], Factors(parts[1].a, 0 * parts[1].b)],
        lambda parts: [Factors(parts[0].a, 0 * parts[0].b), parts[1], parts[2]],
        lambda parts: [Factors(torch.cat([p.a, p.a]), torch.cat([p.b, p.b], 1)) for p in parts],
        lambda parts: [Factors(torch.cat([p.a, 0 * p.a]), torch.cat([p.b, p.b], 1)) for p in parts],
        lambda parts: [parts[0], Factors(parts[1].a, 1e-5 * parts[1].b)],
    ],
    ids=["identical", "opposite", "untrained", "first untrained", "repeated rows", "zero rows", "small"],
)
def test_rank_deficient_updates_come_back_too(space: str, change: Callable[[list[Factors]], list[Factors]]) -> None:
    parts = change(random_parts())
    check_lossless(SPACES[space](parts), parts)
    for method in METHODS:
        merged = combine(adapters_of(parts), method, density=density_of(method, 0.7), space=space)
        assert bool(merged.delta("m").isfinite().all())
    mean = sum((dense(p) for p in parts), torch.zeros(OUT, WIDTH, dtype=torch.float64)) / len(parts)
    assert float((combine(adapters_of(parts), space=space).delta("m") - mean).abs().max()) < 1e-5


@both_spaces
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_merge_of_nothing_is_nothing(space: str, method: str) -> None:
    parts = [Factors(p.a, 0 * p.b) for p in random_parts()]
    merged = combine(adapters_of(parts), method, density=density_of(method, 0.5), space=space)
    assert torch.equal(merged.delta("m"), torch.zeros(OUT, WIDTH))


# --- against dense arithmetic -------------------------------------------------------------------------


@quick
@given(seeds, spaces, st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_a_linear_merge_is_the_same_in_every_space(seed: int, space: str, ranks: list[int]) -> None:
    parts, weights = random_parts(ranks, seed=seed), [1.0 + i for i in range(len(ranks))]
    expected = sum((w * dense(p) for w, p in zip(weights, parts, strict=True)), torch.zeros(1)) / sum(weights) * 0.5
    merged = combine(adapters_of(parts), weights=weights, scale=0.5, space=space)
    assert distance(merged.delta("m"), expected) < 5e-6
    assert distance(dense(merged.factors("m")), expected) < 5e-6


@pytest.mark.parametrize("density", [1.0, 0.8, 0.3, 0.05])
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 5, 2)])
@pytest.mark.parametrize("shape", [(OUT, WIDTH), (5, 20), (20, 5)])
def test_knots_equals_the_papers_on_dense_updates(
    density: float, weights: Sequence[float], shape: tuple[int, int]
) -> None:
    """SVD of [D_1 | D_2 | D_3], TIES of the V_i, and back by U S (arXiv 2410.19735).

    The paper's own code merges S V_i, which changes what is trimmed; that of Core Space's authors merges the V_i as
    the paper says. Both leave out directions of no size, so that these do not count as entries.
    """
    parts = random_parts((2, 3, 2), seed=3, out=shape[0], width=shape[1])
    u, s, vh = torch.linalg.svd(torch.cat([dense(p) for p in parts], dim=1), full_matrices=False)
    k = int((s > 1e-5).sum())
    assert k == min(7, shape[0])
    v = vh[:k].split(shape[1], dim=1)
    expected = (u[:, :k] * s[:k]) @ ties(v, weights, density=density)
    merged = combine(adapters_of(parts), "ties", weights, density, space="knots")
    assert distance(merged.delta("m"), expected) < 1e-5


def half_power(gram: Tensor) -> Tensor:
    """The root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


@pytest.mark.parametrize("density", [1.0, 0.8, 0.3, 0.05])
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 5, 2)])
@pytest.mark.parametrize("shape", [(OUT, WIDTH), (6, 20), (20, 6)])
def test_the_core_space_equals_the_papers_on_dense_updates(
    density: float, weights: Sequence[float], shape: tuple[int, int]
) -> None:
    """Left singular vectors of [B_1 | B_2 | B_3], right ones of the A_i, TIES of U^T D_i V (arXiv 2509.17786).

    With B_i = U_i S_i^1/2 and A_i = S_i^1/2 V_i^T of an SVD of each dense update: these bases are the eigenvectors of
    sum_i (D_i D_i^T)^1/2 and sum_i (D_i^T D_i)^1/2. The paper takes B and A as they were trained.
    """
    parts = random_parts((2, 3, 2), seed=4, out=shape[0], width=shape[1])
    d = [dense(p) for p in parts]
    left = torch.linalg.eigh(sum((half_power(x @ x.mT) for x in d), torch.zeros(1))).eigenvectors.flip(-1)
    right = torch.linalg.eigh(sum((half_power(x.mT @ x) for x in d), torch.zeros(1))).eigenvectors.flip(-1)
    left, right = left[:, : min(7, shape[0])], right[:, : min(7, shape[1])]
    coordinates = [left.mT @ x @ right for x in d]
    expected = left @ ties(coordinates, weights, density=density) @ right.mT
    merged = combine(adapters_of(parts), "ties", weights, density, space="core")
    assert distance(merged.delta("m"), expected) < 1e-5


@both_spaces
def test_methods_merge_the_coordinates_and_nothing_else(space: str) -> None:
    parts = random_parts()
    aligned = SPACES[space](parts)
    merged = combine(adapters_of(parts), "sce", (1, 2, 3), 0.4, scale=2.0, space=space)
    expected = aligned.factors(METHODS["sce"](aligned.coordinates, (1, 2, 3), density=0.4, scale=2.0))
    torch.testing.assert_close(merged.delta("m"), expected.delta())

    shapes: list[torch.Size] = []

    def largest(deltas: Tensor, weights: Sequence[float]) -> Tensor:
        shapes.append(deltas.shape)
        assert list(weights) == [1, 2, 3]
        return deltas.amax(0)

    own = combine(adapters_of(parts), largest, (1, 2, 3), space=space)
    torch.testing.assert_close(own.delta("m"), aligned.factors(torch.stack(aligned.coordinates).amax(0)).delta())
    assert shapes == [(3, *aligned.coordinates[0].shape)]
    # the weights' own space gives something else
    assert distance(own.delta("m"), combine(adapters_of(parts), largest, (1, 2, 3)).delta("m")) > 0.01


# --- properties --------------------------------------------------------------------------------------


@quick
@given(seeds, methods, spaces, st.floats(0.1, 1))
def test_a_merge_in_a_space_has_factors_and_they_are_its_delta(
    seed: int, method: str, space: str, density: float
) -> None:
    parts = random_parts(seed=seed)
    merged = combine(adapters_of(parts), method, (1, 2, 3), density_of(method, density), seed=seed, space=space)
    factors = merged.factors("m")
    delta = merged.delta("m")
    torch.testing.assert_close(dense(factors), delta.double(), rtol=1e-5, atol=1e-5)
    assert factors.rank <= 6
    assert int(torch.linalg.matrix_rank(dense(factors))) <= 6
    assert torch.equal(dict(merged)["m"], delta)


@quick
@given(seeds, methods, spaces)
def test_one_adapter_comes_back(seed: int, method: str, space: str) -> None:
    parts = random_parts((1 + seed % 5,), seed=seed)
    merged = combine(adapters_of(parts), method, [7.0], density_of(method, 1.0), space=space)
    assert distance(merged.delta("m"), dense(parts[0])) < 2e-6


@quick
@given(seeds, methods, spaces, st.integers(2, 4))
def test_identical_adapters_come_back_as_themselves(seed: int, method: str, space: str, n: int) -> None:
    (part,) = random_parts((3,), seed=seed)
    merged = combine(adapters_of([part] * n), method, density=density_of(method, 1.0), space=space)
    assert distance(merged.delta("m"), dense(part)) < 5e-6


@quick
@given(seeds, methods, spaces, st.permutations(range(3)))
def test_the_order_of_adapters_does_not_matter(seed: int, method: str, space: str, order: list[int]) -> None:
    adapters, weights = adapters_of(random_parts(seed=seed)), [1.0, 2.0, 0.5]
    one = combine(adapters, method, weights, density_of(method, 0.6), seed=seed, space=space)
    shuffled = [adapters[i] for i in order], method, [weights[i] for i in order]
    other = combine(*shuffled, density_of(method, 0.6), seed=seed, space=space)
    assert distance(other.delta("m"), one.delta("m")) < 1e-4


def mixed(f: Factors, generator: torch.Generator) -> Factors:
    """The same update, B G^-1 and G A: every row of A and column of B is another."""
    g = torch.randn(f.rank, f.rank, generator=generator).double() + 3 * torch.eye(f.rank)
    return Factors(g @ f.a.double(), f.b.double() @ torch.linalg.inv(g), f.scaling)


def padded(f: Factors) -> Factors:
    """The same update as an adapter of twice the rank holds it."""
    return Factors(torch.cat([f.a, torch.randn_like(f.a)]), torch.cat([f.b, torch.zeros_like(f.b)], 1), f.scaling)


@both_spaces
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("how", ["negated", "shared otherwise", "scaled", "mixed", "padded"])
def test_how_an_update_is_factored_does_not_matter(space: str, method: str, how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = random_parts((2, 3, 2))
    others = {
        "negated": [Factors(-p.a, -p.b, p.scaling) for p in parts],
        "shared otherwise": [Factors(1e3 * p.a, 1e-3 * p.b, p.scaling) for p in parts],
        "scaled": [Factors(p.a, p.b * p.scaling) for p in parts],
        "mixed": [mixed(p, generator) for p in parts],
        "padded": [padded(p) for p in parts],
    }[how]
    density = density_of(method, 0.6)
    one = combine(adapters_of(parts), method, (1, 2, 3), density, seed=1, space=space).delta("m")
    other = combine(adapters_of(others), method, (1, 2, 3), density, seed=1, space=space).delta("m")
    assert distance(other, one) < 1e-4


@both_spaces
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_module_that_an_adapter_lacks_is_an_update_of_nothing(space: str, method: str) -> None:
    parts = random_parts()
    lacking = adapters_of(parts)
    lacking[1] = Adapter("t1", {"other": parts[1]})
    untrained = adapters_of([parts[0], Factors(parts[1].a, 0 * parts[1].b), parts[2]])
    density = density_of(method, 0.6)
    one, other = (combine(x, method, (1, 2, 3), density, space=space).delta("m") for x in (lacking, untrained))
    assert distance(one, other) < 1e-4


@both_spaces
def test_the_mean_of_dare_in_a_space_is_the_linear_merge(space: str) -> None:
    parts, density, draws, weights = random_parts(), 0.5, 300, (1, 2, 3)
    adapters = adapters_of(parts)
    exact = combine(adapters, weights=weights).delta("m").double()
    merges = [
        combine(adapters, "dare_linear", weights, density, seed=s, space=space).delta("m").double()
        for s in range(draws)
    ]
    aligned = SPACES[space](parts)
    back = torch.linalg.pinv(aligned.left.double())
    forth = torch.eye(WIDTH) if aligned.right is None else torch.linalg.pinv(aligned.right.double())
    coordinates = [w / 6 * c.double() for w, c in zip(weights, aligned.coordinates, strict=True)]
    spread = (sum(c**2 for c in coordinates) * (1 - density) / (density * draws)).sqrt()
    z = back @ (torch.stack(merges).mean(0) - exact) @ forth.double() / spread
    assert float(z.abs().max()) < 4.5
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / z.numel())


@both_spaces
@pytest.mark.parametrize("method", sorted(METHODS))
def test_inputs_and_global_random_state_stay_as_they_are(space: str, method: str) -> None:
    parts = random_parts()
    before = [(p.a.clone(), p.b.clone()) for p in parts]
    state = torch.get_rng_state()
    combine(adapters_of(parts), method, density=density_of(method, 0.5), space=space).factors("m")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.a, a) and torch.equal(p.b, b) for p, (a, b) in zip(parts, before, strict=True))


def test_drawing_methods_draw_on_the_coordinates_of_each_adapter_and_module() -> None:
    assert "generator" in inspect.signature(della).parameters
    parts = random_parts()
    adapters = [Adapter(f"t{i}", {"m": p, "n": p}) for i, p in enumerate(parts)]
    merged = combine(adapters, "della", density=0.5, space="core")
    assert torch.equal(merged.delta("m"), merged.delta("m"))
    assert not torch.equal(merged.delta("m"), merged.delta("n"))
    assert not torch.equal(merged.delta("m"), combine(adapters, "della", density=0.5, seed=1, space="core").delta("m"))


# --- errors ------------------------------------------------------------------------------------------


def test_an_unknown_space_is_named() -> None:
    with pytest.raises(UserError, match="unknown space `coer`: use core or knots"):
        combine(adapters_of(random_parts()), space="coer")


def test_the_errors_of_a_method_name_the_module() -> None:
    one: list[Any] = adapters_of(random_parts((2,)))
    with pytest.raises(UserError, match=r"^m: sce .* two or more"):
        combine(one, "sce", density=0.5, space="core").factors("m")


def test_a_space_needs_no_density_of_a_linear_merge() -> None:
    with pytest.raises(UserError, match="`linear` takes no density"):
        combine(adapters_of(random_parts()), density=0.5, space="knots")
    assert linear(torch.ones(2, 1, 1)).item() == 1
