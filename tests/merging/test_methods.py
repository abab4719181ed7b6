"""Merging against mergekit's own code, against plain fp64 arithmetic, and as properties."""

import inspect
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from mergekit.merge_methods.registry import get as mergekit_method
from mergekit.merge_methods.sce import sce_mask, sce_weight
from mergekit.sparsify import bernoulli, della_magprune, magnitude
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mot_lora.config import MERGE_METHODS
from mot_lora.errors import UserError
from mot_lora.merging.averages import check_weights, elect_sign, elected_mean, weighted_mean
from mot_lora.merging.methods import METHODS, NEEDS_DENSITY, dare_linear, dare_ties, della, linear, sce, ties
from mot_lora.merging.seeds import seed_for
from mot_lora.merging.sparsify import SAMPLE, drop, kth_largest, rank_densities, trim

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)
counts = st.integers(1, 4)
methods = st.sampled_from(sorted(METHODS))
WEIGHTS = [None, (1.0, 1.0, 1.0), (0.2, 0.5, 0.3), (3.0, 0.0, 1.0), (100.0, 7.0, 900.0)]
SELECTING = ["dare_linear", "dare_ties", "della"]  # those that draw


def random_deltas(n: int = 3, out: int = 24, width: int = 20, *, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(n, out, width, generator=torch.Generator().manual_seed(seed)) * size


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(n)]


def settings_of(method: str, n: int, density: float, seed: int = 0) -> dict[str, Any]:
    draws = "generator" in inspect.signature(METHODS[method]).parameters
    given_density = {"density": density} if method in NEEDS_DENSITY else {}
    return {**given_density, **({"generator": generators(n, seed)} if draws else {})}


def merge_with_mergekit(
    method: str, deltas: Sequence[Tensor], weights: Sequence[float] | None, *, density: float = 1.0, scale: float = 1.0
) -> Tensor:
    """What mergekit's class adds to a base when the models are base + delta, all in fp32."""
    base = random_deltas(1, *deltas[0].shape, seed=99, size=0.05)[0]
    models = [base + d for d in deltas]
    ids = range(1, len(models) + 1)
    merged = mergekit_method(method).merge_group(
        TensorGroup.from_tensors([base, *models], base_index=0),
        weight=dict(zip(ids, weights or [1.0] * len(models), strict=True)),
        density=dict.fromkeys(ids, density),
        int8_mask=False,
        normalize=True,
        rescale=False,
        **{"lambda": scale},
    )
    return merged - base


def test_every_method_can_be_asked_for_by_a_config() -> None:
    assert tuple(METHODS) == MERGE_METHODS
    assert {m for m in METHODS if "generator" in inspect.signature(METHODS[m]).parameters} == set(SELECTING)
    for name, method in METHODS.items():
        assert (name in NEEDS_DENSITY) == ("density" in inspect.signature(method).parameters)


# --- against mergekit ------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_linear_equals_mergekit(weights: Sequence[float] | None, scale: float) -> None:
    d = random_deltas(size=0.01)
    expected = merge_with_mergekit("task_arithmetic", d, weights, scale=scale)
    torch.testing.assert_close(linear(d, weights, scale=scale), expected, rtol=0, atol=5e-8)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("density", "scale"), [(1.0, 1.0), (0.7, 1.0), (0.2, 2.0), (0.01, 1.0), (0.0001, 0.5)])
def test_ties_equals_mergekit(weights: Sequence[float] | None, density: float, scale: float) -> None:
    d = random_deltas(size=0.01)
    expected = merge_with_mergekit("ties", d, weights, density=density, scale=scale)
    torch.testing.assert_close(ties(d, weights, density=density, scale=scale), expected, rtol=0, atol=5e-8)


def test_ties_of_large_updates_equals_mergekit() -> None:
    # more entries than are sampled to find the threshold
    d = random_deltas(2, 257, 311, size=0.01)
    for density in (0.9, 0.5, 0.03):
        expected = merge_with_mergekit("ties", d, (1.0, 2.0), density=density)
        torch.testing.assert_close(ties(d, (1, 2), density=density), expected, rtol=0, atol=5e-8)


@pytest.mark.parametrize("method", SELECTING)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_drawing_method_at_density_1_equals_mergekit(method: str, weights: Sequence[float] | None) -> None:
    d = random_deltas(size=0.01)
    # mergekit's DELLA wants an epsilon, and then prunes nothing at density 1: its class is TIES
    expected = merge_with_mergekit("ties" if method == "della" else method, d, weights, scale=1.5)
    merged = METHODS[method](d, weights, density=1.0, generator=generators(3), scale=1.5)
    torch.testing.assert_close(merged, expected, rtol=0, atol=5e-8)
    if method != "dare_linear":
        w = check_weights(weights, 3)
        torch.testing.assert_close(merged, 1.5 * elected_mean(d, w))


@pytest.mark.parametrize(("method", "after"), [("dare_linear", "task_arithmetic"), ("dare_ties", "ties")])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.9, 0.3])
def test_dare_equals_mergekit_on_the_same_mask(
    method: str, after: str, weights: Sequence[float] | None, density: float
) -> None:
    d = random_deltas(size=0.01)
    masks = torch.stack([torch.rand(d.shape[1:], generator=g) < density for g in generators(3)])
    expected = merge_with_mergekit(after, torch.where(masks, d / density, 0.0), weights)
    merged = METHODS[method](d, weights, density=density, generator=generators(3))
    torch.testing.assert_close(merged, expected, rtol=0, atol=5e-8)


def probabilities_of_mergekit(
    monkeypatch: pytest.MonkeyPatch, delta: Tensor, density: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """With which probabilities mergekit draws, and what it keeps, unscaled."""
    drawn: list[Tensor] = []

    def record(probabilities: Tensor, *, bernoulli: Callable[..., Tensor] = torch.bernoulli) -> Tensor:
        drawn.append(probabilities)
        return bernoulli(probabilities)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", record)
        kept = della_magprune(delta, density, epsilon)
    return drawn[0], kept


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.25), (0.3, 0.15), (0.9, 0.09), (0.1, 0.0)])
def test_della_keeps_with_the_probabilities_of_mergekit(
    monkeypatch: pytest.MonkeyPatch, density: float, epsilon: float
) -> None:
    # both rank within a row; a bias is one row
    for delta in (random_deltas(1, 24, 700)[0], random_deltas(1, 1, 33)[0, 0]):
        theirs, _ = probabilities_of_mergekit(monkeypatch, delta, density, epsilon)
        ours = rank_densities(delta, density, epsilon)
        torch.testing.assert_close(ours.view_as(theirs), theirs, rtol=0, atol=1e-6)
        assert float(ours.min()) == pytest.approx(density - epsilon, abs=1e-6)
        assert float(ours.max()) == pytest.approx(density + epsilon, abs=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, None), (0.2, 0.19), (0.8, 0.0)])
def test_della_equals_mergekit_on_the_same_mask(
    monkeypatch: pytest.MonkeyPatch, weights: Sequence[float] | None, density: float, epsilon: float | None
) -> None:
    """MagPrune's mask from mergekit's probabilities, 1/p as in the paper, then mergekit's TIES of all that is left.

    mergekit itself does not divide what it keeps by its probability: at most it brings the sum of absolute values back
    (`rescale`), one factor for all entries. Its epsilon is 0.15 unless given, whatever the density.
    """
    d = random_deltas(size=0.01)
    spread = min(density, 1 - density) / 2 if epsilon is None else epsilon
    p = [probabilities_of_mergekit(monkeypatch, x, density, spread)[0] for x in d]
    drawn = [torch.rand(d.shape[1:], generator=g) for g in generators(3)]
    kept = [torch.where(u < q, x / q, 0.0) for x, u, q in zip(d, drawn, p, strict=True)]
    expected = merge_with_mergekit("ties", kept, weights)
    merged = della(d, weights, density=density, epsilon=epsilon, generator=generators(3))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-7)


def test_mergekits_della_shrinks_its_mean_and_ours_does_not() -> None:
    """The difference that dividing by the probability makes: mergekit's mean over draws is p times the update."""
    torch.manual_seed(0)
    d, density, epsilon, draws = random_deltas(1, 4, 16)[0], 0.5, 0.3, 2000
    p = rank_densities(d, density, epsilon).double()
    generator = torch.Generator().manual_seed(0)
    theirs = torch.stack([della_magprune(d, density, epsilon) for _ in range(draws)]).double().mean(0)
    ours = [della(d[None], density=density, epsilon=epsilon, generator=generator) for _ in range(draws)]
    noise = d.abs() * (p * (1 - p) / draws).sqrt()
    assert float(((theirs - p * d) / noise).abs().max()) < 4.5
    assert float(((torch.stack(ours).double().mean(0) - d) / (noise / p)).abs().max()) < 4.5


def sce_with_mergekit(base: Tensor, models: Tensor, density: float) -> Tensor:
    merged = mergekit_method("sce").merge_group(
        TensorGroup.from_tensors([base, *models], base_index=0), int8_mask=False, select_topk=density
    )
    return merged - base


@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_sce_equals_mergekit(density: float, n: int) -> None:
    """On updates of unlike sizes, so that the weights that are calculated differ.

    Two rules of mergekit's are left out: a sum of weights below 1e-6 is not raised to it (an entry of which only a far
    smaller update is left would shrink), and updates of all 0 give 0 rather than weights of 1/n.
    """
    base = random_deltas(1, seed=99, size=0.05)[0]
    sizes = torch.tensor([1.0, 0.4, 2.0, 0.7, 1.5])[:n, None, None]
    models = base + 0.01 * sizes * random_deltas(n, seed=n)
    d = models - base
    torch.testing.assert_close(sce(d, density=density), sce_with_mergekit(base, models, density), rtol=0, atol=5e-8)


def test_the_pieces_of_sce_are_those_of_mergekit() -> None:
    d = random_deltas(4, size=0.01) * torch.tensor([1.0, 3.0, 0.5, 2.0])[:, None, None]
    for density in (0.9, 0.5, 0.1):
        mask = sce_mask(d, density)
        merged = sce(d, density=density)
        assert torch.equal(merged != 0, mask != 0)  # with four random updates somebody agrees everywhere
        energy = sce_weight(d * mask)
        w = energy[:, None, None] * get_mask(d * mask, "sum")
        torch.testing.assert_close(merged, (w * d * mask).sum(0) / w.sum(0).clamp(min=1e-30))
        # a weight that is given multiplies the one that is calculated
        alone = sce(d, (0, 0, 1, 0), density=density)
        torch.testing.assert_close(alone, d[2] * mask)


def test_drop_keeps_as_mergekit_does_on_average() -> None:
    torch.manual_seed(0)
    d, density, draws = random_deltas(1, 10, 10)[0], 0.3, 400
    generator = torch.Generator().manual_seed(0)
    ours = torch.stack([drop(d, density, generator) for _ in range(draws)])
    theirs = torch.stack([bernoulli(d, density) / density for _ in range(draws)])
    # what is kept has the same size; how often differs by chance alone (4.5 standard errors of 40,000 draws)
    torch.testing.assert_close(ours.abs().amax(0), theirs.abs().amax(0))
    spread = math.sqrt(2 * density * (1 - density) / ours.numel())
    assert abs(float((ours != 0).float().mean() - (theirs != 0).float().mean())) < 4.5 * spread


@quick
@given(seeds, st.floats(0.001, 1))
def test_trim_keeps_what_mergekit_keeps(seed: int, density: float) -> None:
    d = random_deltas(1, 9, 11, seed=seed)[0]
    assert torch.equal(trim(d, density), magnitude(d, density))


@quick
@given(seeds, counts)
def test_elected_sign_is_that_of_mergekit(seed: int, n: int) -> None:
    weighted = random_deltas(n, 6, 8, seed=seed)
    assert torch.equal(weighted.sign() == torch.where(elect_sign(weighted), 1, -1), get_mask(weighted, "sum"))
    assert torch.equal(elect_sign(list(weighted)), elect_sign(weighted))


# --- against plain arithmetic ------------------------------------------------------------------------


def elected_mean_by_hand(deltas: Tensor, weights: Sequence[float]) -> Tensor:
    """One entry after the other, in Python's own fp64."""
    n, out, width = deltas.shape
    result = torch.zeros(out, width, dtype=torch.float64)
    for i in range(out):
        for j in range(width):
            values = [(weights[k], float(deltas[k, i, j])) for k in range(n)]
            positive = sum(w * v for w, v in values) >= 0
            agree = [(w, v) for w, v in values if (v > 0 if positive else v < 0)]
            if sum(w for w, _ in agree) > 0:
                result[i, j] = sum(w * v for w, v in agree) / sum(w for w, _ in agree)
    return result


def elected_mean_dense(deltas: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """All at once in fp64: the result, and by how much of the sum of absolute values each sign was elected."""
    d = deltas.double()
    w = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (d.ndim - 1))
    total = (w * d).sum(0)
    agree = (d.sign() == torch.where(total >= 0, 1.0, -1.0)) * w
    votes = agree.sum(0)
    result = torch.where(votes > 0, (agree * d).sum(0) / votes.clamp(min=1e-300), 0.0)
    return result, total.abs() / (w * d).abs().sum(0).clamp(min=1e-300)


def trim_by_hand(delta: Tensor, density: float) -> Tensor:
    values = delta.flatten().tolist()
    kept = sorted(range(len(values)), key=lambda i: -abs(values[i]))[: max(1, int(density * len(values)))]
    return torch.tensor([v if i in set(kept) else 0.0 for i, v in enumerate(values)]).view_as(delta)


def sce_by_hand(deltas: Tensor, weights: Sequence[float], density: float) -> Tensor:
    """Select by variance, calculate by what is left, erase by the sign of the sum with the weights given: fp64."""
    d, w = deltas.double(), torch.tensor(weights, dtype=torch.float64)[:, None, None]
    if density < 1:
        variance = d.var(0, unbiased=False)
        kept = max(1, int(density * int((variance > 0).sum())))
        d = d * (variance >= variance.flatten().sort(descending=True).values[kept - 1])
    energy = d.square().mean((1, 2), keepdim=True)
    agree = (d.sign() == torch.where((w * d).sum(0) >= 0, 1.0, -1.0)) * w * energy
    return (agree * d).sum(0) / agree.sum(0).clamp(min=1e-300)


@quick
@given(seeds, counts, st.floats(0.05, 1), st.floats(0.1, 3))
def test_methods_equal_plain_fp64_arithmetic(seed: int, n: int, density: float, scale: float) -> None:
    d = random_deltas(n, 4, 6, seed=seed)
    w = [0.5 + (seed + i) % 3 for i in range(n)]
    mean = sum((x * d[i].double() for i, x in enumerate(w)), torch.zeros(4, 6, dtype=torch.float64)) / sum(w)
    masks = [torch.rand(4, 6, generator=g) < density for g in generators(n)]
    dropped = (
        torch.stack([torch.where(m, x / density, 0.0) for m, x in zip(masks, d, strict=True)]) if density < 1 else d
    )
    trimmed = torch.stack([trim_by_hand(x, density) for x in d])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(linear(d, w, scale=scale).double(), scale * mean, **close)
    torch.testing.assert_close(
        ties(d, w, density=density, scale=scale).double(), scale * elected_mean_by_hand(trimmed, w), **close
    )
    torch.testing.assert_close(
        dare_linear(d, w, density=density, generator=generators(n), scale=scale).double(),
        scale * (dropped.double() * torch.tensor(w).view(-1, 1, 1)).sum(0) / sum(w),
        **close,
    )
    torch.testing.assert_close(
        dare_ties(d, w, density=density, generator=generators(n), scale=scale).double(),
        scale * elected_mean_by_hand(dropped, w),
        **close,
    )
    if n > 1:
        expected = scale * sce_by_hand(d, w, density)
        torch.testing.assert_close(sce(d, w, density=density, scale=scale).double(), expected, **close)


def test_ties_of_equal_weights_is_the_papers_disjoint_mean() -> None:
    d = torch.tensor([[[3.0, -1.0, 0.0, 2.0]], [[1.0, -3.0, 0.0, -2.0]], [[-2.0, 2.0, 0.0, 0.0]]])
    assert ties(d, density=1.0).tolist() == [[2.0, -2.0, 0.0, 2.0]]


def test_weights_count_before_the_sign_is_elected() -> None:
    d = torch.tensor([[[1.0]], [[-2.0]]])
    assert ties(d, (1, 1), density=1.0).item() == -2
    assert ties(d, (3, 1), density=1.0).item() == 1


def test_an_exact_tie_goes_to_the_positive() -> None:
    d = torch.tensor([[[1.0, -2.0]], [[-1.0, 2.0]]])
    assert ties(d, density=1.0).tolist() == [[1.0, 2.0]]
    assert torch.equal(d.sign() == torch.where(elect_sign(d), 1, -1), get_mask(d, "sum"))


# the means --------------------------------------------------------------------------------------------


@quick
@given(
    seeds,
    st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.0, 3.7, 900.0]), min_size=1, max_size=6).filter(any),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.floats(0, 0.9),
)
def test_the_elected_mean_equals_the_dense_one(
    seed: int, weights: list[float], dtype: torch.dtype, empty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(len(weights), 7, 9, generator=generator, dtype=torch.float64)
    d = (d * (torch.rand(d.shape, generator=generator) >= empty)).to(dtype)
    d[:, 0] = 0  # a row for which nobody votes
    before = d.clone()
    expected, margin = elected_mean_dense(d, weights)
    result = elected_mean(d, [w / max(weights) for w in weights])
    assert result.dtype == dtype
    assert torch.equal(d, before)
    assert not result[0].any()
    unit = torch.finfo(dtype).eps * len(weights)
    clear = (margin > 4 * unit) | (margin == 0)  # where rounding cannot turn the sign
    assert clear.double().mean() > 0.8
    torch.testing.assert_close(result.double()[clear], expected[clear], rtol=4 * unit, atol=0)


@quick
@given(seeds, st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3))
def test_the_weighted_mean_equals_the_dense_one(seed: int, weights: list[float]) -> None:
    d = random_deltas(len(weights), 5, 7, seed=seed)
    w = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    expected = (w * d.double()).sum(0) / w.sum()
    torch.testing.assert_close(weighted_mean(iter(d), weights).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_mean_over_nobody_is_nothing() -> None:
    nobody = torch.tensor([[[0.0, -0.0, -1.0]], [[0.0, 0.0, -2.0]], [[5.0, 0.0, 9.0]]])
    assert elected_mean(nobody, [1, 1, 0]).tolist() == [[0.0, 0.0, -1.5]]


@pytest.mark.parametrize("mean", [weighted_mean, elected_mean])
def test_a_mean_of_no_updates_is_refused(mean: Callable[..., Tensor]) -> None:
    with pytest.raises(UserError, match="at least one"):
        mean(iter(()), [])


def test_a_sequence_merges_like_a_stack() -> None:
    d = random_deltas()
    assert torch.equal(linear(list(d)), linear(d))
    for method in METHODS:
        one, other = (METHODS[method](x, **settings_of(method, 3, 0.5)) for x in (d, tuple(d)))
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_bias_merges_like_a_matrix_of_one_row(method: str) -> None:
    d = random_deltas(3, 1, 40)
    one, other = (METHODS[method](x, (1, 2, 3), **settings_of(method, 3, 0.5)) for x in (d[:, 0], d))
    assert one.shape == (40,)
    assert torch.equal(one, other[0])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_inputs_stay_as_they_are(method: str) -> None:
    d = random_deltas()
    before = d.clone()
    for density in (0.5, 1.0):
        merged = METHODS[method](d, (1, 2, 3), **settings_of(method, 3, density), scale=2.0)
        assert torch.equal(d, before)
        merged.zero_()  # nor is the result a view of one
        assert torch.equal(d, before)


# --- one update at a time --------------------------------------------------------------------------------


@dataclass
class OnDemand(Sequence[Tensor]):
    """Updates that are made when they are asked for, and how many of them were ever held at once."""

    n: int
    made: list["weakref.ref[Tensor]"] = field(default_factory=list)
    most: int = 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Tensor:  # pyright: ignore
        if i >= self.n:
            raise IndexError(i)
        delta = random_deltas(1, 200, 150, seed=i)[0].clone()
        self.made = [r for r in self.made if r() is not None] + [weakref.ref(delta)]
        self.most = max(self.most, len(self.made))
        return delta


class Peak(TorchDispatchMode):
    """How many bytes of tensors were at most alive after an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref[Tensor]] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive += [weakref.ref(x) for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x)]
        tensors = [x for r in self.alive if (x := r()) is not None]
        self.alive = [weakref.ref(x) for x in tensors]
        self.bytes = max(
            self.bytes, sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())
        )
        return out


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_merge_holds_a_few_updates_however_many_there_are(method: str) -> None:
    most: list[int] = []
    peak: list[int] = []
    for n in (3, 12):
        deltas = OnDemand(n)
        with Peak() as measured:
            merged = METHODS[method](deltas, range(1, n + 1), **settings_of(method, n, 0.4))
        most.append(deltas.most)
        peak.append(measured.bytes)
        stacked = torch.stack(list(deltas))
        assert torch.equal(merged, METHODS[method](stacked, range(1, n + 1), **settings_of(method, n, 0.4)))
    assert most[0] == most[1] <= 3
    one = 4 * 200 * 150
    assert 2 * one < peak[1] <= peak[0] + one / 2
    # each update, two sums and two counts of votes, and what a draw or a selection takes
    assert peak[1] < 16 * one


# --- trim and drop -----------------------------------------------------------------------------------


@quick
@given(seeds, st.floats(1e-6, 1))
def test_trim_keeps_the_right_number_and_the_largest(seed: int, density: float) -> None:
    d = random_deltas(1, 13, 17, seed=seed)[0]
    kept = trim(d, density)
    assert int((kept != 0).sum()) == max(1, math.floor(density * d.numel()))
    assert torch.equal(kept[kept != 0], d[kept != 0])
    assert density == 1 or not (kept == 0).any() or d[kept == 0].abs().max() < kept[kept != 0].abs().min()


def test_trim_keeps_all_that_tie() -> None:
    assert trim(torch.tensor([[2.0, -2.0, 2.0, 1.0]]), 0.25).tolist() == [[2.0, -2.0, 2.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.999, 0.5, 0.02, 1e-6])
def test_trim_of_a_large_update_equals_sorting(dtype: torch.dtype, density: float) -> None:
    low_rank = random_deltas(1, 307, 3)[0] @ random_deltas(1, 3, 401, seed=1)[0]
    tied = (3 * random_deltas(1, 307, 401)[0]).round()
    for delta in (random_deltas(1, 307, 401)[0], low_rank, tied, torch.zeros(307, 401), torch.full((307, 401), -2.0)):
        d = delta.to(dtype)
        threshold = d.abs().flatten().sort(descending=True).values[max(1, int(density * d.numel())) - 1]
        assert torch.equal(trim(d, density), torch.where(d.abs() >= threshold, d, 0))


KINDS = ("random", "low rank", "tied", "constant", "rising", "falling", "zeros where sampled", "sample below the rest")
KINDS += ("sample above the rest", "sample narrower than the rest", "heavy tail", "infinities")


def vector(kind: str, n: int, seed: int) -> Tensor:
    """Of every kind that a selection by a sample may stumble over; `n // SAMPLE | 1` entries lie between samples."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator)
    sampled = slice(None, None, n // SAMPLE | 1)
    if kind == "low rank":
        values = (values[: n // 50 + 1, None] * torch.randn(50, generator=generator)).flatten()[:n]
    elif kind == "tied":
        values = values.round()
    elif kind == "constant":
        values.fill_(float(values[0]))
    elif kind == "rising":
        values = values.sort().values
    elif kind == "falling":
        values = values.sort(descending=True).values
    elif kind == "zeros where sampled":
        values[sampled] = 0
    elif kind == "sample below the rest":
        values[sampled] -= 9
    elif kind == "sample above the rest":
        values[sampled] += 9
    elif kind == "sample narrower than the rest":
        values[sampled] *= 1e-3
    elif kind == "heavy tail":
        values = values**9
    elif kind == "infinities":
        values = torch.where(values.abs() > 1.5, values * torch.inf, values)
    return values


@settings(quick, max_examples=150)
@given(seeds, st.sampled_from(KINDS), st.integers(1, 4 * SAMPLE), st.floats(0, 1))
def test_the_kth_largest_is_exact(seed: int, kind: str, n: int, at: float) -> None:
    values = vector(kind, n, seed)
    k = min(n, 1 + int(at * n))
    result = kth_largest(values, k)
    assert torch.equal(result, values.kthvalue(n - k + 1).values)
    assert float(result) == values.topk(k).values[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [SAMPLE, SAMPLE + 1, 2 * SAMPLE - 1, 2 * SAMPLE, 7 * SAMPLE + 5])
def test_the_kth_largest_is_exact_at_every_k(kind: str, n: int) -> None:
    values = vector(kind, n, seed=n)
    ordered = values.sort(descending=True).values
    for k in {1, 2, 3, n // 100, n // 10, n // 3, n // 2, 9 * n // 10, n - 1, n}:
        assert float(kth_largest(values, k)) == float(ordered[k - 1])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_mean_of_drop_is_the_delta(density: float) -> None:
    d, draws = random_deltas(1, 10, 12)[0], 2000
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([drop(d, density, generator) for _ in range(draws)]).double().mean(0)
    # each entry is d/p times a Bernoulli(p): its mean over draws has standard error |d| sqrt((1 - p) / (p draws))
    z = (mean - d) / (d.abs() * math.sqrt((1 - density) / (density * draws)))
    assert float(z.abs().max()) < 4.5
    # and the spread is the right one too: z^2 has mean 1 and variance about 2
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / z.numel())


def test_drop_takes_a_density_of_its_own_for_each_entry() -> None:
    p = torch.tensor([0.125, 0.25, 0.5, 1.0]).repeat(4000, 1)
    kept = drop(torch.ones_like(p), p, torch.Generator().manual_seed(0))
    assert all(set(kept[:, i].tolist()) <= {0.0, 1 / float(p[0, i])} for i in range(4))
    share = (kept != 0).double().mean(0)
    assert float(((share - p[0]).abs() / (p[0] * (1 - p[0]) / 4000).sqrt().clamp(min=1e-9)).max()) < 4.5


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.floats(0.01, 0.99), st.floats(0, 0.999))
def test_rank_densities_grow_with_magnitude_and_average_to_the_density(
    seed: int, rows: int, width: int, density: float, share: float
) -> None:
    epsilon = share * min(density, 1 - density)
    d = random_deltas(1, rows, width, seed=seed)[0]
    p = rank_densities(d, density, epsilon)
    assert float(p.min()) > 0
    assert float(p.max()) < 1
    if width > 1:  # so that as many are kept as asked for
        torch.testing.assert_close(p.mean(-1), torch.full((rows,), density), rtol=1e-4, atol=1e-5)
    by_size = p.gather(-1, d.abs().argsort(-1))
    assert bool((by_size.diff(dim=-1) >= 0).all())


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.5, 0.5), (0.3, 0.3), (0.9, 0.2), (0.5, -0.1), (0.5, math.nan), (1.0, 0.1)]
)
def test_an_epsilon_that_leaves_no_probability_is_named(density: float, epsilon: float) -> None:
    with pytest.raises(UserError, match=rf"epsilon {epsilon} with density {density}"):
        della(random_deltas(), density=density, epsilon=epsilon, generator=generators(3))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, 2.0, math.nan, math.inf])
def test_density_bounds(density: float) -> None:
    d = random_deltas()
    for call in (
        lambda: trim(d[0], density),
        lambda: drop(d[0], density, torch.Generator()),
        lambda: ties(d, density=density),
        lambda: sce(d, density=density),
        lambda: dare_linear(d, density=density, generator=torch.Generator()),
        lambda: dare_ties(d, density=density, generator=torch.Generator()),
        lambda: della(d, density=density, generator=torch.Generator()),
    ):
        with pytest.raises(UserError, match=rf"density must be in \(0, 1\], not {density}"):
            call()


# --- selecting by variance ---------------------------------------------------------------------------


def test_sce_selects_nothing_on_which_all_agree() -> None:
    d = random_deltas(1, 6, 8)[0]
    for third in (1 / 3, 0.1, 7e-4):  # values whose mean rounds
        assert not sce([d * third] * 3, density=0.5).any()
    one, two = torch.tensor([[1.0, 5.0, 2.0, 1.0]]), torch.tensor([[1.0, 5.0, 3.0, 4.0]])
    # two of four entries vary, and half of these is one
    assert sce([one, two], density=0.5)[0, :3].tolist() == [0, 0, 0]
    assert sce([one, two], density=0.9)[0].count_nonzero() == 1
    assert sce([one, two], density=1)[0].count_nonzero() == 4


def test_sce_needs_two_updates_to_select_by_variance() -> None:
    with pytest.raises(UserError, match="two or more"):
        sce(random_deltas(1), density=0.5)


def test_sce_of_nothing_is_nothing() -> None:
    for density in (0.5, 1.0):
        assert not sce(torch.zeros(3, 4, 5), density=density).any()


@quick
@given(seeds, st.floats(-12, 6), st.sampled_from([1.0, 0.5]))
def test_sce_grows_with_its_updates(seed: int, exponent: float, density: float) -> None:
    d, c = random_deltas(3, 5, 6, seed=seed), 2.0 ** round(exponent * 3)
    torch.testing.assert_close(sce(c * d, density=density) / c, sce(d, density=density))


# --- properties --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SELECTING)
def test_a_generator_each_makes_the_order_of_updates_matter_no_more(method: str) -> None:
    d, w, order = random_deltas(), torch.tensor([1.0, 2.0, 3.0]), [2, 0, 1]
    one = METHODS[method](d, w.tolist(), density=0.5, generator=generators(3))
    g = generators(3)
    other = METHODS[method](d[order], w[order].tolist(), density=0.5, generator=[g[i] for i in order])
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", SELECTING)
def test_one_generator_serves_all_updates_in_turn(method: str) -> None:
    d, shared = random_deltas(), torch.Generator().manual_seed(5)
    one = METHODS[method](d, density=0.5, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, METHODS[method](list(d), density=0.5, generator=[shared] * 3))
    assert not torch.equal(one, METHODS[method](d, density=0.5, generator=torch.Generator().manual_seed(6)))
    same_draw = [torch.Generator().manual_seed(5) for _ in d]
    assert not torch.equal(one, METHODS[method](d, density=0.5, generator=same_draw))


@quick
@given(seeds, methods, st.floats(1e-6, 1e6))
def test_only_the_ratio_of_weights_counts(seed: int, method: str, c: float) -> None:
    d, w = random_deltas(3, 5, 6, seed=seed), [0.5, 2.0, 1.0]
    one = METHODS[method](d, w, **settings_of(method, 3, 0.5))
    other = METHODS[method](d, [c * x for x in w], **settings_of(method, 3, 0.5))
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("size", [1e-50, 1e39, 1e300])
def test_weights_of_any_finite_size_are_fine(method: str, size: float) -> None:
    d = random_deltas()
    merged = METHODS[method](d, [size, size, 2 * size], **settings_of(method, 3, 0.5))
    torch.testing.assert_close(merged, METHODS[method](d, [1, 1, 2], **settings_of(method, 3, 0.5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_of_traces_weigh_half_precision_updates(dtype: torch.dtype) -> None:
    # 70,000 is more than fp16 holds
    d = random_deltas(2).to(dtype)
    merged = linear(d, [70_000, 140_000])
    torch.testing.assert_close(merged.float(), (d[0].float() + 2 * d[1].float()) / 3, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_updates_of_an_adapters_size_merge_like_fp32(method: str, dtype: torch.dtype) -> None:
    d = random_deltas(3, size=3e-4).to(dtype)
    w = (1, 2, 3)
    exact = METHODS[method](d.float(), w, **settings_of(method, 3, 0.5))
    merged = METHODS[method](d, w, **settings_of(method, 3, 0.5))
    assert merged.dtype == dtype
    # but for entries close to a threshold, or to a tie
    close = (merged.float() - exact).abs() <= 0.04 * exact.abs() + 1e-7
    assert float(close.float().mean()) > 0.97


@quick
@given(seeds, methods, st.floats(-3, 3))
def test_scale_multiplies_the_result(seed: int, method: str, scale: float) -> None:
    d = random_deltas(3, 5, 6, seed=seed)
    one = METHODS[method](d, **settings_of(method, 3, 0.5))
    torch.testing.assert_close(METHODS[method](d, **settings_of(method, 3, 0.5), scale=scale), scale * one)


@quick
@given(seeds, methods, st.sampled_from([1.0, 0.5]))
def test_a_method_does_not_know_plus_from_minus(seed: int, method: str, density: float) -> None:
    d = random_deltas(3, 5, 6, seed=seed)
    one, other = (METHODS[method](x, (1, 2, 4), **settings_of(method, 3, density)) for x in (d, -d))
    torch.testing.assert_close(other, -one)


def test_the_seed_is_the_one_of_earlier_versions() -> None:
    # a run that is taken up again, or merged again by a later version, has to draw the same masks
    assert seed_for(0, 1, "a") == 3768550248782271056
    assert seed_for(7, "steps", "model.layers.0.self_attn.q_proj") == 8278038140235524334
    assert seed_for("ab", "c") != seed_for("a", "bc")


# --- errors ------------------------------------------------------------------------------------------

WRONG_WEIGHTS = [
    ((1,), "1 weights for 3 adapters"),
    ((1, 1, 1, 1), "4 weights for 3 adapters"),
    ((), "0 weights for 3 adapters"),
    ((1, math.nan, 1), "nan"),
    ((1, math.inf, 1), "inf"),
    ((1, -math.inf, 1), "inf"),
    ((0, 0, 0), "not all 0"),
]


@pytest.mark.parametrize(("weights", "named"), WRONG_WEIGHTS)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_wrong_weights_are_named(method: str, weights: Sequence[float], named: str) -> None:
    with pytest.raises(UserError) as e:
        METHODS[method](random_deltas(), weights, **settings_of(method, 3, 1.0))
    assert named in str(e.value)


def test_weights_of_nothing_are_all_1() -> None:
    assert check_weights(None, 3) == [1, 1, 1]
    assert check_weights([0, 2], 2) == [0, 2]


@pytest.mark.parametrize(
    ("deltas", "named"),
    [
        ([torch.ones(2, 3), torch.ones(3, 2)], "[[2, 3], [3, 2]]"),
        ([torch.ones(2), torch.ones(3)], "[[2], [3]]"),
        ([torch.ones(1, 2), torch.ones(2)], "[[1, 2], [2]]"),
        ([], "[]"),
        (torch.ones(0, 2, 3), "[]"),
    ],
)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_updates_of_other_shapes_are_named(method: str, deltas: Any, named: str) -> None:
    with pytest.raises(UserError) as e:
        METHODS[method](deltas, **settings_of(method, 2, 1.0))
    assert named in str(e.value)
