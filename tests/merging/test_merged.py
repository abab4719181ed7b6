"""Whole adapters merged: which settings reach which module, and what holds of every method."""

import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mot_lora.errors import UserError
from mot_lora.merging.lowrank import Adapter, Dense, Factors, concatenate
from mot_lora.merging.merged import Merged, combine
from mot_lora.merging.methods import METHODS, NEEDS_DENSITY, linear, ties
from mot_lora.merging.seeds import seed_for
from mot_lora.merging.sparsify import rank_densities, trim

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)
counts = st.integers(1, 4)
methods = st.sampled_from(sorted(METHODS))
every_method = pytest.mark.parametrize("method", sorted(METHODS))
DRAWING = [m for m in METHODS if "generator" in inspect.signature(METHODS[m]).parameters]


def random_adapters(n: int, *, seed: int = 0, modules: Sequence[str] = ("m", "n")) -> list[Adapter]:
    """Adapters of different ranks and scalings."""
    generator = torch.Generator().manual_seed(seed)
    adapters: list[Adapter] = []
    for i in range(n):
        r = 1 + (seed + i) % 4
        alpha = 2.0 * i + 3
        factors = {
            m: Factors(
                torch.randn(r, 7, generator=generator),
                torch.randn(5, r, generator=generator),
                alpha / (math.sqrt(r) if i % 2 else r),
            )
            for m in modules
        }
        adapters.append(Adapter(f"t{i}", factors))
    return adapters


def random_experts(n: int, experts: int = 3) -> list[Adapter]:
    """Adapters of stacked experts `e`, and of a layer `m` beside them."""
    adapters: list[Adapter] = []
    for i, adapter in enumerate(random_adapters(n, seed=9)):
        generator = torch.Generator().manual_seed(i)
        a = torch.randn(experts, i + 1, 8, generator=generator)
        b = torch.randn(experts, 6, i + 1, generator=generator)
        adapters.append(replace(adapter, updates={**adapter.updates, "e": Factors(a, b, 0.5 + i, "parameter")}))
    return adapters


def dense(f: Any) -> Tensor:
    return f.scaling * torch.einsum("...or,...ri->...oi", f.b.double(), f.a.double())


def density_of(method: str, density: float) -> float | None:
    return density if method in NEEDS_DENSITY else None


def settings_of(method: str, adapters: Sequence[Adapter], module: str, density: float, seed: int = 0) -> dict[str, Any]:
    given_density = {"density": density} if method in NEEDS_DENSITY else {}
    drawn = [torch.Generator().manual_seed(seed_for(seed, a.name, module)) for a in adapters]
    return {**given_density, **({"generator": drawn} if method in DRAWING else {})}


# --- what a merge is -----------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_merge_is_its_method_on_the_true_updates(method: str, density: float) -> None:
    adapters, weights = random_adapters(3), [1.0, 2.0, 4.0]
    merged = combine(adapters, method, weights, density_of(method, density), scale=0.7, seed=3)
    for module, delta in merged:
        updates = [dense(a.updates[module]).float() for a in adapters]
        expected = 0.7 * METHODS[method](updates, weights, **settings_of(method, adapters, module, density, seed=3))
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
        assert delta.dtype == torch.float32


@every_method
def test_a_merge_in_fp64_is_exact(method: str) -> None:
    adapters = random_adapters(3)
    merged = combine(adapters, method, density=density_of(method, 0.5))
    updates = [dense(a.updates["m"]) for a in adapters]
    expected = METHODS[method](updates, **settings_of(method, adapters, "m", 0.5))
    tight = 1e-6 if method == "linear" else 1e-12  # a linear merge stays in fp32 factors
    torch.testing.assert_close(merged.delta("m", torch.float64), expected, rtol=tight, atol=tight)


@quick
@given(seeds, counts)
def test_factors_of_a_linear_merge_are_its_delta(seed: int, n: int) -> None:
    adapters = random_adapters(n, seed=seed)
    weights = [1.0 + i for i in range(n)]
    merged = combine(adapters, weights=weights, scale=0.7)
    expected = 0.7 * sum(
        (w * dense(a.updates["m"]) for a, w in zip(adapters, weights, strict=True)),
        torch.zeros(5, 7, dtype=torch.float64),
    )
    expected /= sum(weights)
    assert merged.factors("m").rank == sum(a.updates["m"].rank for a in adapters)  # pyright: ignore
    torch.testing.assert_close(dense(merged.factors("m")), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.delta("m", torch.float64), expected, rtol=1e-6, atol=1e-6)


def test_a_merge_computes_one_module_at_a_time() -> None:
    calls: list[int] = []

    def counted(deltas: Tensor, weights: Sequence[float]) -> Tensor:
        calls.append(len(deltas))
        return linear(deltas, weights)

    merged = combine(random_adapters(2), counted)
    assert isinstance(merged, Merged)
    assert calls == []
    next(iter(merged))
    assert calls == [2]


class Counted(Mapping[str, Dense]):
    """The updates of an adapter, of which `alive` knows every dense one that is still held."""

    def __init__(self, seed: int, alive: list["weakref.ref[Tensor]"], most: list[int]) -> None:
        self.seed, self.alive, self.most = seed, alive, most

    def __getitem__(self, module: str) -> Dense:
        if module not in ("m", "n"):
            raise KeyError(module)
        return Dense(torch.Size([40, 30]), self.make)

    def make(self, dtype: torch.dtype) -> Tensor:
        delta = torch.randn(40, 30, generator=torch.Generator().manual_seed(self.seed), dtype=dtype)
        self.alive[:] = [r for r in self.alive if r() is not None] + [weakref.ref(delta)]
        self.most[0] = max(self.most[0], len(self.alive))
        return delta

    def __iter__(self) -> Iterator[str]:
        return iter(("m", "n"))

    def __len__(self) -> int:
        return 2


@every_method
def test_a_merge_holds_a_few_updates_however_many_adapters_there_are(method: str) -> None:
    most_of: list[int] = []
    for n in (3, 12):
        alive: list[weakref.ref[Tensor]] = []
        most = [0]
        adapters = [Adapter(f"t{i}", Counted(i, alive, most)) for i in range(n)]
        merged = combine(adapters, method, density=density_of(method, 0.5))
        assert most == [0]  # nothing is made before it is asked for
        for _ in merged:
            pass
        most_of.append(most[0])
    assert most_of[0] == most_of[1] <= 3


def test_updates_that_are_not_low_rank_merge_too() -> None:
    bias = {
        name: Dense(torch.Size([5]), lambda dtype, i=i: torch.arange(5, dtype=dtype) * (i + 1), "bias")
        for i, name in enumerate("ab")
    }
    adapters = [
        replace(adapter, name=name, updates={**adapter.updates, "m.bias": bias[name]})
        for name, adapter in zip("ab", random_adapters(2), strict=True)
    ]
    merged = combine(adapters, weights=(1, 3))
    assert merged.forms["m.bias"] == "bias"
    torch.testing.assert_close(merged.delta("m.bias"), torch.arange(5) * 7 / 4)
    with pytest.raises(UserError, match=r"m\.bias is not low-rank"):
        merged.factors("m.bias")
    # where one adapter holds the whole of it, the others' factors are made dense, in any space
    whole = Adapter("c", {"m": Dense(torch.Size([5, 7]), lambda dtype: torch.ones(5, 7, dtype=dtype), "whole")})
    for space in (None, "core", "knots"):
        mixed = combine([*adapters, whole], space=space)
        expected = (dense(adapters[0].updates["m"]) + dense(adapters[1].updates["m"]) + 1) / 3
        torch.testing.assert_close(mixed.delta("m").double(), expected, rtol=1e-5, atol=1e-5)
        assert mixed.forms["m"] == "whole"
        with pytest.raises(UserError, match="m is not low-rank"):
            mixed.factors("m")
        assert mixed.factors("n").rank <= 3


# --- properties of every method -------------------------------------------------------------------------


@quick
@given(seeds, methods, st.permutations(range(4)))
def test_the_order_of_adapters_does_not_matter(seed: int, method: str, order: list[int]) -> None:
    adapters, weights = random_adapters(4, seed=seed), [1.0, 2.0, 0.5, 3.0]
    density = density_of(method, 0.6)
    one = dict(combine(adapters, method, weights, density, seed=seed))
    other = dict(combine([adapters[i] for i in order], method, [weights[i] for i in order], density, seed=seed))
    for module, delta in one.items():
        torch.testing.assert_close(other[module], delta, rtol=1e-5, atol=1e-5)


@quick
@given(seeds, methods, st.floats(0.01, 100))
def test_one_adapter_comes_back(seed: int, method: str, weight: float) -> None:
    (adapter,) = random_adapters(1, seed=seed)
    merged = combine([adapter], method, [weight], density_of(method, 1.0))
    for module, factors in adapter.updates.items():
        torch.testing.assert_close(merged.delta(module).double(), dense(factors), rtol=1e-5, atol=1e-5)


@quick
@given(seeds, methods, st.integers(2, 5), st.booleans())
def test_identical_adapters_come_back_as_themselves(seed: int, method: str, n: int, thirds: bool) -> None:
    # adding up A and B apart gives these back n times too large, or too small
    f = random_adapters(2, seed=seed)[seed % 2].updates
    copies = [Adapter(f"t{i}", f) for i in range(n)]
    weights = [1 / n] * n if thirds else None
    merged = combine(copies, method, weights, density_of(method, 1.0))
    for module, factors in f.items():
        torch.testing.assert_close(merged.delta(module).double(), dense(factors), rtol=1e-5, atol=1e-5)
        if method == "linear":
            torch.testing.assert_close(dense(merged.factors(module)), dense(factors), rtol=1e-5, atol=1e-5)


def test_ties_of_identical_adapters_is_the_trimmed_update() -> None:
    f = random_adapters(1)[0].updates
    merged = combine([Adapter(name, f) for name in "abc"], "ties", density=0.3)
    torch.testing.assert_close(merged.delta("m"), trim(f["m"].delta(), 0.3))


@quick
@given(seeds, methods, st.floats(1e-6, 1e6))
def test_only_the_ratio_of_weights_counts(seed: int, method: str, c: float) -> None:
    adapters, weights = random_adapters(3, seed=seed), [0.5, 2.0, 1.0]
    density = density_of(method, 0.5)
    one = combine(adapters, method, weights, density, seed=seed).delta("m")
    other = combine(adapters, method, [c * w for w in weights], density, seed=seed).delta("m")
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@quick
@given(seeds, methods, st.permutations(range(4)), st.sampled_from([-1.0, 1e-3, 30.0]))
def test_other_factors_of_the_same_update_merge_alike(seed: int, method: str, order: list[int], c: float) -> None:
    adapters = random_adapters(4, seed=seed)

    def rewritten(f: Any) -> Factors:
        components = [i for i in order if i < f.rank]
        return Factors(c * f.a[components], f.b[:, components] / c, f.scaling)

    others = [Adapter(a.name, {m: rewritten(f) for m, f in a.updates.items()}) for a in adapters]
    density = density_of(method, 0.6)
    merged = dict(combine(adapters, method, density=density))
    for module, delta in combine(others, method, density=density):
        torch.testing.assert_close(delta, merged[module], rtol=1e-4, atol=1e-5)


@every_method
def test_a_module_that_an_adapter_lacks_is_an_update_of_nothing(method: str) -> None:
    a = random_adapters(1, modules=("m", "n"))[0]
    b = Adapter("other", random_adapters(1, seed=5, modules=("n",))[0].updates)
    density = density_of(method, 0.6)
    merged = combine([a, b], method, (1, 3), density)
    assert list(dict(merged)) == ["m", "n"]
    nothing = Factors(torch.ones(1, 7), torch.zeros(5, 1))
    told = combine([a, replace(b, updates={**b.updates, "m": nothing})], method, (1, 3), density)
    torch.testing.assert_close(merged.delta("m"), told.delta("m"))
    if method == "linear":
        torch.testing.assert_close(merged.delta("m").double(), dense(a.updates["m"]) / 4, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dense(merged.factors("m")), dense(a.updates["m"]) / 4, rtol=1e-5, atol=1e-6)
    if method == "ties":  # it has no voice
        torch.testing.assert_close(merged.delta("m"), trim(a.updates["m"].delta(), 0.6))


@every_method
def test_inputs_stay_as_they_are(method: str) -> None:
    adapters = random_adapters(3)
    before = [x.clone() for a in adapters for f in a.updates.values() if isinstance(f, Factors) for x in (f.a, f.b)]
    dict(combine(adapters, method, density=density_of(method, 0.5), scale=2.0))
    after = [x for a in adapters for f in a.updates.values() if isinstance(f, Factors) for x in (f.a, f.b)]
    assert len(before) == 12
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


# --- chance ------------------------------------------------------------------------------------------


def check_mean(draws: list[Tensor], exact: Tensor, spread: Tensor) -> None:
    """Whether draws of a known standard deviation average to what they should, entry by entry."""
    z = (torch.stack(draws).double().mean(0) - exact) / (spread / math.sqrt(len(draws)))
    assert float(z.abs().max()) < 4.5
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / z.numel())


def test_the_mean_of_dare_merges_is_the_linear_merge() -> None:
    adapters, density, weights = random_adapters(3), 0.5, (1, 2, 3)
    exact = combine(adapters, weights=weights).delta("m").double()
    merges = [combine(adapters, "dare_linear", weights, density, seed=s).delta("m") for s in range(800)]
    parts = torch.stack([dense(a.updates["m"]) * w / 6 for a, w in zip(adapters, weights, strict=True)])
    check_mean(merges, exact, (parts.square().sum(0) * (1 - density) / density).sqrt())


@pytest.mark.parametrize("method", DRAWING)
@pytest.mark.parametrize("density", [0.3, 0.8])
def test_the_mean_of_draws_from_one_adapter_is_the_adapter(method: str, density: float) -> None:
    (adapter,) = random_adapters(1, seed=2)
    delta = dense(adapter.updates["m"])
    p = torch.full_like(delta, density)
    if method == "della":
        p = rank_densities(delta, density, min(density, 1 - density) / 2)
    merges = [combine([adapter], method, density=density, seed=s).delta("m") for s in range(800)]
    check_mean(merges, delta, delta.abs() * ((1 - p) / p).sqrt())


@pytest.mark.parametrize("method", DRAWING)
def test_draws_differ_for_each_seed_adapter_and_module(method: str) -> None:
    f = Factors(torch.ones(1, 8), torch.ones(8, 1))
    one, two = Adapter("one", {"m": f, "n": f}), Adapter("two", {"m": f, "n": f})

    def mask(adapter: Adapter, module: str, seed: int = 0) -> Tensor:
        return combine([adapter], method, density=0.5, seed=seed).delta(module) != 0

    first = mask(one, "m")
    assert torch.equal(first, mask(one, "m"))
    for other in (mask(one, "n"), mask(two, "m"), mask(one, "m", seed=1)):
        assert not torch.equal(first, other)


@every_method
def test_merging_neither_reads_nor_moves_the_global_generator(method: str) -> None:
    merged = combine(random_adapters(2), method, density=density_of(method, 0.5))
    torch.manual_seed(1)
    one = dict(merged)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = dict(merged)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[m], other[m]) for m in one)


# --- settings by module ---------------------------------------------------------------------------------

LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head")


def test_weights_density_and_scale_may_differ_by_module() -> None:
    adapters = random_adapters(2, modules=LAYERS)
    weights: list[Any] = [{"mlp.*": 3.0, "layers.0.*": 5.0}, 2.0]
    density = {r"layers\.1\..*": 0.25, "up_proj": 0.5}
    scale = {"q_proj": 2.0, "model.*": 0.5}
    merged = combine(adapters, "ties", weights, density, scale)
    expected = {
        LAYERS[0]: ((3, 2), 0.5, 0.5),  # the first pattern that matches counts
        LAYERS[1]: ((5, 2), 1.0, 2.0),  # no match is 1
        LAYERS[2]: ((3, 2), 0.25, 0.5),
        LAYERS[3]: ((1, 2), 1.0, 1.0),
    }
    for module, (w, d, s) in expected.items():
        updates = [dense(a.updates[module]).float() for a in adapters]
        torch.testing.assert_close(merged.delta(module), s * ties(updates, w, density=d), rtol=1e-5, atol=1e-5)
        assert merged.weights_of(module) == list(w)


def test_settings_by_module_reach_the_factors_of_a_linear_merge() -> None:
    adapters = random_adapters(2, modules=LAYERS)
    merged = combine(adapters, weights=[{"up_proj": 3.0}, {"up_proj": 0.0}], scale={"lm_head": 4.0})
    for module, w, s in ((LAYERS[0], (1, 0), 1), (LAYERS[1], (0.5, 0.5), 1), (LAYERS[3], (0.5, 0.5), 4)):
        expected = s * sum(x * dense(a.updates[module]) for x, a in zip(w, adapters, strict=True))
        torch.testing.assert_close(dense(merged.factors(module)), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged.delta(module).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_pattern_matches_the_end_of_a_name_at_a_dot() -> None:
    adapters = random_adapters(1, modules=("q_proj", "a.q_proj", "a.eq_proj", "q_proj.b"))
    merged = combine(adapters, scale={"q_proj": 2.0})
    for module, scale in (("q_proj", 2), ("a.q_proj", 2), ("a.eq_proj", 1), ("q_proj.b", 1)):
        expected = scale * dense(adapters[0].updates[module])
        torch.testing.assert_close(merged.delta(module).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"scale": {"up_proj": 1.0, "down_proj": 2.0}}, ["scale pattern `down_proj` matches no module", LAYERS[0]]),
        ({"weights": [1.0, {"qq": 1.0}]}, ["weight pattern `qq` matches no module"]),
        ({"method": "ties", "density": {"layers": 0.5}}, ["density pattern `layers` matches no module"]),
        ({"method": "ties", "density": {"lm_head": 1.5}}, ["density must be in (0, 1], not 1.5"]),
        ({"density": {"lm_head": 0.5}}, ["`linear` takes no density"]),
        ({"weights": [{"lm_head": 0.0}, {"lm_head": 0.0}]}, ["lm_head", "not all 0"]),
        (
            {"method": "ties", "density": 0.5, "weights": [{"lm_head": -1.0}, 1.0]},
            ["lm_head", "must not be negative where a sign is elected"],
        ),
        ({"scale": {"(": 1.0}}, ["scale", "`(`"]),
        ({"weights": [1.0, {"(?i)Q_PROJ": 1.0}]}, ["weight", "`(?i)Q_PROJ`"]),
    ],
)
def test_a_setting_that_fits_no_module_is_named(arguments: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as e:
        combine(random_adapters(2, modules=LAYERS), **arguments)
    assert all(n in str(e.value) for n in named), str(e.value)
    assert "\n" not in str(e.value)


# --- stacked experts ----------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("lacking", [False, True])
def test_each_expert_is_merged_as_a_matrix_of_its_own(method: str, density: float, lacking: bool) -> None:
    adapters = random_experts(3)
    if lacking:
        adapters[1] = replace(adapters[1], updates={"m": adapters[1].updates["m"]})
    merged = combine(adapters, method, (1, 2, 4), density_of(method, density), scale=0.5, seed=7)
    delta = merged.delta("e")
    assert delta.shape == merged.shapes["e"] == (3, 6, 8)
    assert torch.equal(delta, merged.delta("e"))
    # an adapter's draws go on from one expert to the next
    settings = settings_of(method, adapters, "e", density, seed=7)
    for e in range(3):
        updates = [dense(u)[e].float() if (u := a.updates.get("e")) else torch.zeros(6, 8) for a in adapters]
        expected = 0.5 * METHODS[method](updates, (1, 2, 4), **settings)
        torch.testing.assert_close(delta[e], expected, rtol=1e-4, atol=1e-5)


def test_a_linear_merge_of_experts_has_factors() -> None:
    adapters = random_experts(3)
    merged = combine(adapters, weights=(1, 2, 4), scale=0.5)
    factors = merged.factors("e")
    expected = 0.5 * sum(w / 7 * dense(a.updates["e"]) for w, a in zip((1, 2, 4), adapters, strict=True))
    assert (factors.rank, factors.shape, factors.form) == (6, (3, 6, 8), "parameter")
    torch.testing.assert_close(dense(factors), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.delta("e").double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("method", ["linear", "ties", "sce"])
def test_each_expert_has_a_space_of_its_own(space: str, method: str) -> None:
    adapters, density = random_experts(3), density_of(method, 0.5)
    # one expert that only one adapter trained, and one that none did
    for i, a in enumerate(adapters):
        assert isinstance(a.updates["e"], Factors)
        a.updates["e"].b[1:] *= torch.tensor([float(i == 0), 0.0])[:, None, None]
    merged = combine(adapters, method, (1, 2, 4), density, 0.5, space=space)
    factors = merged.factors("e")
    assert (factors.shape, factors.form) == ((3, 6, 8), "parameter")
    assert factors.rank <= 6
    torch.testing.assert_close(dense(factors).float(), merged.delta("e"), rtol=1e-4, atol=1e-5)
    for e in range(3):
        alone = [
            Adapter(a.name, {"e": Factors(u.a[e], u.b[e], u.scaling)})
            for a in adapters
            if isinstance(u := a.updates["e"], Factors)
        ]
        expected = combine(alone, method, (1, 2, 4), density, 0.5, space=space).delta("e")
        torch.testing.assert_close(merged.delta("e")[e], expected, rtol=1e-4, atol=1e-5)
    assert not merged.delta("e")[2].any()
    assert merged.delta("m").shape == (5, 7)


def test_a_users_own_function_gets_one_expert_after_the_other() -> None:
    shapes: list[torch.Size] = []

    def largest(deltas: Tensor, weights: Sequence[float]) -> Tensor:  # noqa: ARG001
        shapes.append(deltas.shape)
        return deltas.amax(0)

    adapters = random_experts(2)
    expected = torch.maximum(*(dense(a.updates["e"]) for a in adapters))
    torch.testing.assert_close(combine(adapters, largest).delta("e").double(), expected, rtol=1e-5, atol=1e-5)
    assert shapes == [(2, 6, 8)] * 3


# --- functions of one's own ------------------------------------------------------------------------------


def test_a_users_own_function_is_a_method() -> None:
    def largest(deltas: Tensor, weights: Sequence[float], *, density: float) -> Tensor:
        assert deltas.shape == (2, 5, 7)
        assert list(weights) == [2.0, 1.0]
        return density * deltas.amax(0)

    adapters = random_adapters(2)
    merged = combine(adapters, largest, (2, 1), density={"n": 0.25}, scale={"n": 4.0, "m": 3.0})
    for module, factor in (("n", 0.25 * 4), ("m", 3)):  # the scale is applied to what it gives
        expected = factor * torch.maximum(*(dense(a.updates[module]) for a in adapters))
        torch.testing.assert_close(dict(merged)[module].double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="largest") as e:
        merged.factors("n")
    assert "0x" not in str(e.value)  # its name, not its address


def test_a_users_own_function_needs_no_density() -> None:
    def total(deltas: Tensor, weights: Sequence[float]) -> Tensor:
        return sum(w * d for w, d in zip(weights, deltas, strict=True))  # pyright: ignore

    adapters = random_adapters(2)
    expected = dense(adapters[0].updates["m"]) + dense(adapters[1].updates["m"])
    torch.testing.assert_close(combine(adapters, total).delta("m").double(), expected, rtol=1e-5, atol=1e-5)


def test_a_users_own_function_gets_generators_where_it_names_them() -> None:
    adapters = random_adapters(2)

    def noise(deltas: Tensor, weights: Sequence[float], *, generator: Sequence[torch.Generator]) -> Tensor:
        return sum(w * torch.rand(deltas.shape[1:], generator=g) for w, g in zip(weights, generator, strict=True))  # pyright: ignore

    def others(deltas: Tensor, weights: Sequence[float], **settings: Any) -> Tensor:  # noqa: ARG001
        assert settings == {"density": 0.5}
        return deltas[0]

    drawn = [torch.Generator().manual_seed(seed_for(4, a.name, "m")) for a in adapters]
    expected = 2 * torch.rand(5, 7, generator=drawn[0]) + torch.rand(5, 7, generator=drawn[1])
    assert torch.equal(combine(adapters, noise, (2, 1), seed=4).delta("m"), expected)
    torch.testing.assert_close(combine(adapters, others, density=0.5).delta("m"), adapters[0].updates["m"].delta())


@pytest.mark.parametrize(
    ("given", "gave"),
    [
        (lambda d, _: d, "torch.Size([2, 5, 7])"),
        (lambda d, _: d[0, 0], "torch.Size([7])"),
        (lambda *_: None, "None"),
    ],
)
def test_a_function_that_gives_no_update_is_named(given: Callable[..., Any], gave: str) -> None:
    def mine(deltas: Tensor, weights: Sequence[float]) -> Any:
        return given(deltas, weights)

    with pytest.raises(UserError) as e:
        combine(random_adapters(2), mine).delta("m")
    assert all(n in str(e.value) for n in ("m: ", "mine`", gave, "an update of [5, 7]")), str(e.value)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module on the path that has functions of one's own."""
    (tmp_path / "own_merges_for_tests.py").write_text(
        "import torch\n"
        "def smallest(deltas, weights):\n"
        "    return deltas.gather(0, deltas.abs().argmin(0, keepdim=True))[0]\n"
        "class Merges:\n"
        "    @staticmethod\n"
        "    def last(deltas, weights):\n"
        "        return deltas[-1]\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "own_merges_for_tests"


def test_a_function_may_be_given_by_its_place(own_module: str) -> None:
    adapters = random_adapters(2)
    d = torch.stack([dense(a.updates["m"]) for a in adapters])
    expected = torch.where(d[0].abs() < d[1].abs(), d[0], d[1])
    merged = combine(adapters, f"{own_module}:smallest", scale=2.0)
    torch.testing.assert_close(merged.delta("m").double(), 2 * expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(combine(adapters, f"{own_module}:Merges.last").delta("m").double(), d[1])
    with pytest.raises(UserError, match=f"{own_module}:smallest merge of m is not low-rank"):
        merged.factors("m")
    assert combine(adapters, f"{own_module}:smallest", space="core").factors("m").rank <= 3


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("no_such_module_here:f", ["`no_such_module_here:f`", "No module named", "PYTHONPATH"]),
        ("own_merges_for_tests:largest", ["`own_merges_for_tests:largest`", "no attribute 'largest'"]),
        ("own_merges_for_tests:number", ["`own_merges_for_tests:number` is not a function"]),
        ("own_merges_for_tests:", ["`own_merges_for_tests:`"]),
        (":smallest", ["`:smallest`"]),
        (".own_merges_for_tests:smallest", ["`.own_merges_for_tests:smallest`"]),
        ("own_merges_for_tests.smallest", ["unknown merge method `own_merges_for_tests.smallest`", "module:function"]),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_a_place_without_a_function_is_named(method: str, named: list[str]) -> None:
    with pytest.raises(UserError) as e:
        combine(random_adapters(2), method)
    assert all(n in str(e.value) for n in named), str(e.value)


def test_a_methods_own_function_is_the_method() -> None:
    adapters = random_adapters(3)
    for name, method in METHODS.items():
        one, other = (combine(adapters, m, (1, 2, 3), density_of(name, 0.5)).delta("m") for m in (name, method))
        torch.testing.assert_close(one, other)
    assert combine(adapters, linear).factors("m").rank == combine(adapters).factors("m").rank
    with pytest.raises(UserError, match="needs a density"):
        combine(adapters, ties)


# --- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ((1,), "1 weights for 3 adapters"),
        ((1, 1, 1, 1), "4 weights for 3 adapters"),
        ((), "0 weights for 3 adapters"),
        ((1, math.nan, 1), "nan"),
        ((1, math.inf, 1), "inf"),
        ((0, 0, 0), "not all 0"),
    ],
)
@every_method
def test_wrong_weights_are_named(method: str, weights: Sequence[float], named: str) -> None:
    with pytest.raises(UserError) as e:
        combine(random_adapters(3), method, weights, density_of(method, 1.0))
    assert named in str(e.value)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, 2.0, math.nan, math.inf])
@pytest.mark.parametrize("method", sorted(NEEDS_DENSITY))
def test_density_bounds(method: str, density: float) -> None:
    with pytest.raises(UserError, match=rf"density must be in \(0, 1\], not {density}"):
        combine(random_adapters(2), method, density=density)


def adapter_of(name: str, out: int = 5, module: str = "layers.0.q") -> Adapter:
    return Adapter(name, {module: Factors(torch.ones(1, 4), torch.ones(out, 1))})


@pytest.mark.parametrize(
    ("adapters", "arguments", "named"),
    [
        ([], {}, ["at least one"]),
        ([adapter_of("same"), adapter_of("same")], {}, ["different names", "same"]),
        ([adapter_of("a")], {"method": "tiess"}, ["`tiess`", "linear, ties, dare_linear, dare_ties, della, sce"]),
        ([adapter_of("a")], {"density": 0.5}, ["`linear`", "no density"]),
        *(([adapter_of("a")], {"method": m}, [f"`{m}`", "needs a density"]) for m in sorted(NEEDS_DENSITY)),
        ([adapter_of("a"), adapter_of("b", out=6)], {}, ["`b`", "layers.0.q", "[6, 4]", "[5, 4]"]),
        ([adapter_of("a"), adapter_of("b", module="layers.0.q.weight")], {}, ["layers.0.q", "bare parameter"]),
    ],
)
def test_what_cannot_be_merged_is_named(adapters: list[Adapter], arguments: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as e:
        combine(adapters, **arguments)
    assert all(n in str(e.value) for n in named), str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("method", sorted(NEEDS_DENSITY))
def test_only_a_linear_merge_has_factors(method: str) -> None:
    merged = combine(random_adapters(2), method, density=0.5)
    with pytest.raises(UserError, match=f"{method} merge of m is not low-rank"):
        merged.factors("m")


def test_the_errors_of_a_method_name_the_module() -> None:
    with pytest.raises(UserError, match=r"^m: sce .* two or more"):
        combine(random_adapters(1), "sce", density=0.5).delta("m")


def test_concatenation_takes_what_a_merge_gives() -> None:
    merged = combine(random_adapters(2))
    twice = concatenate([merged.factors("m"), merged.factors("m")], [0.5, 0.5])
    torch.testing.assert_close(twice.delta(), merged.delta("m"))
