"""The agreement over a fold against dense arithmetic in fp64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from mot_lora.merging.agreement import Agreement, agreement_of, fold_record, layer_of, summed
from mot_lora.merging.lowrank import Adapter, Dense, Factors

OUT, WIDTH = 6, 9


def random_adapter(name: str, seed: int, modules: tuple[str, ...] = ("m", "n")) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        m: Factors(
            torch.randn(seed + 1, WIDTH, generator=generator),
            torch.randn(OUT, seed + 1, generator=generator),
            0.01 * (seed + 1),
        )
        for m in modules
    }
    return Adapter(name, factors)


def random_matrices(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A base, an update of about 1 % of it, and a change that has most of the update."""
    generator = torch.Generator().manual_seed(seed)
    base, update, noise = torch.randn(3, OUT, WIDTH, generator=generator)
    return base, 0.01 * update, 0.009 * update + 0.001 * noise


def dense(adapter: Adapter, module: str) -> Tensor:
    f = adapter.updates.get(module)
    return torch.zeros(OUT, WIDTH, dtype=torch.float64) if f is None else f.scaling * (f.b.double() @ f.a.double())


def conflicts(updates: list[Tensor]) -> int:
    """Entries that one branch raises and another lowers, one by one."""
    columns = zip(*(u.flatten().tolist() for u in updates), strict=True)
    return sum(any(x * y < 0 for x, y in itertools.combinations(entry, 2)) for entry in columns)


def check(t: Agreement, updates: list[Tensor], base: Tensor, update: Tensor, change: Tensor) -> None:
    base, update, change = base.double(), update.double(), change.double()
    assert t.entries == base.numel()
    assert t.relative_norm == pytest.approx(float(update.norm() / base.norm()), rel=1e-6)
    assert t.survived == pytest.approx(float((change * update).sum() / (update * update).sum()), rel=1e-6)
    assert t.conflicts == conflicts(updates)
    assert t.sign_conflict == conflicts(updates) / base.numel()
    for i, x in enumerate(updates):
        for j, y in enumerate(updates):
            assert t.gram[i][j] == pytest.approx(float((x * y).sum()), rel=1e-9, abs=1e-12)
            norms = float(x.norm() * y.norm())
            assert t.cosine[i][j] == pytest.approx(float((x * y).sum()) / norms if norms else 0, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_agreement_equals_dense_arithmetic(n: int) -> None:
    adapters = [random_adapter(f"t{i}", i) for i in range(n)]
    matrices = random_matrices(n)
    t = agreement_of(adapters, "m", *matrices)
    check(t, [dense(a, "m") for a in adapters], *matrices)
    assert (t.conflicts > 0) == (n > 1)


def test_a_missing_module_conflicts_with_nothing() -> None:
    adapters = [random_adapter("a", 0), random_adapter("b", 1, modules=("n",)), random_adapter("c", 2)]
    matrices = random_matrices(0)
    t = agreement_of(adapters, "m", *matrices)
    check(t, [dense(a, "m") for a in adapters], *matrices)
    assert t.cosine[1] == (0, 0, 0)
    assert t.conflicts == agreement_of([adapters[0], adapters[2]], "m", *matrices).conflicts > 0


def test_adapters_alone_have_the_agreement_too() -> None:
    adapters = [random_adapter(f"t{i}", i) for i in range(3)]
    alone = agreement_of(adapters, "m")
    fold = agreement_of(adapters, "m", *random_matrices(0))
    assert (alone.entries, alone.conflicts, alone.gram) == (fold.entries, fold.conflicts, fold.gram)
    assert (alone.base_sq, alone.update_sq, alone.kept, alone.survived) == (0, 0, 0, None)
    # and on a base, before anything is merged
    base = random_matrices(0)[0]
    assert agreement_of(adapters, "m", base).base_sq == fold.base_sq
    assert agreement_of(adapters, "m", base, base).kept == 0


@pytest.mark.parametrize("factored", [2, 1, 0])
def test_the_agreement_of_experts_and_of_dense_updates(factored: int) -> None:
    generator = torch.Generator().manual_seed(0)
    stacked = [
        Factors(torch.randn(4, i + 1, WIDTH, generator=generator), torch.randn(4, OUT, i + 1, generator=generator), 0.3)
        for i in range(2)
    ]
    updates = [f.scaling * (f.b.double() @ f.a.double()) for f in stacked]
    adapters = [Adapter(f"t{i}", {"m": f if i < factored else Dense(f.shape, f.delta)}) for i, f in enumerate(stacked)]
    base = torch.randn(4, OUT, WIDTH, generator=generator)
    t = agreement_of(adapters, "m", base, 0.01 * base, 0.009 * base)
    assert (t.entries, t.conflicts) == (base.numel(), conflicts(updates))
    assert t.survived == pytest.approx(0.9, rel=1e-6)
    for i, j in itertools.product(range(2), repeat=2):
        assert t.gram[i][j] == pytest.approx(float((updates[i] * updates[j]).sum()), rel=1e-5, abs=1e-4)


def test_a_bias_is_tallied() -> None:
    one, two = (
        Adapter(name, {"m.bias": Dense(torch.Size([3]), lambda dtype, v=v: torch.tensor(v).to(dtype), "bias")})
        for name, v in (("one", [1.0, -2.0, 0.0]), ("two", [1.0, 2.0, 5.0]))
    )
    t = agreement_of([one, random_adapter("lacks it", 0), two], "m.bias", torch.ones(3))
    assert (t.entries, t.conflicts) == (3, 1)
    assert t.gram == ((5, 0, -3), (0, 0, 0), (-3, 0, 30))


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3"),
        ("model.layers.12.mlp.experts.7.up_proj", "model.layers.12"),
        ("model.layers.0.self_attn.q_proj.bias", "model.layers.0"),
        ("transformer.h.0.attn", "transformer.h.0"),
        ("lm_head", "lm_head"),
        ("model.embed_tokens", "model.embed_tokens"),
    ],
)
def test_a_module_belongs_to_a_layer(module: str, layer: str) -> None:
    assert layer_of(module) == layer


def test_equal_and_opposite_branches() -> None:
    a = random_adapter("a", 1)
    minus = Adapter("minus", {m: Factors(f.a, f.b, -f.scaling) for m, f in a.updates.items()})
    matrices = random_matrices(0)
    same = agreement_of([a, Adapter("twin", a.updates)], "m", *matrices)
    assert same.sign_conflict == 0
    assert same.cosine[0][1] == pytest.approx(1)
    opposite = agreement_of([a, minus], "m", *matrices)
    assert opposite.sign_conflict == 1
    assert opposite.cosine[0][1] == pytest.approx(-1)


def test_summed_modules_agree_as_they_do_together() -> None:
    adapters = [random_adapter("a", 0), random_adapter("b", 1, modules=("n",)), random_adapter("c", 2)]
    parts = {m: random_matrices(i) for i, m in enumerate("mn")}
    total = summed(agreement_of(adapters, m, *matrices) for m, matrices in parts.items())
    updates = [torch.cat([dense(a, m) for m in parts]) for a in adapters]
    together = [torch.cat(matrices) for matrices in zip(*parts.values(), strict=True)]
    check(total, updates, *together)
    record = fold_record(total)
    assert record.relative_norm == pytest.approx(float(together[1].norm() / together[0].norm()), rel=1e-6)
    assert (record.survived, record.sign_conflict, record.cosine) == (
        total.survived,
        total.sign_conflict,
        total.cosine,
    )


def test_adding_up_one_module_or_none() -> None:
    one = agreement_of([random_adapter("a", 0)], "m", *random_matrices(0))
    assert summed([one]) == one
    with pytest.raises(ValueError, match="nothing to add"):
        summed([])


def test_an_update_of_nothing_has_no_survival() -> None:
    base, nothing = torch.ones(OUT, WIDTH), torch.zeros(OUT, WIDTH)
    f = Factors(torch.ones(1, WIDTH), torch.zeros(OUT, 1))
    t = agreement_of([Adapter("a", {"m": f}), Adapter("b", {"m": f})], "m", base, nothing, nothing)
    assert (t.survived, t.relative_norm, t.sign_conflict, t.cosine) == (None, 0, 0, ((0, 0), (0, 0)))
    on_zeros = agreement_of([random_adapter("a", 0)], "m", nothing, base, base)
    assert on_zeros.relative_norm == math.inf
    assert on_zeros.survived == 1


def test_a_change_that_rounding_took_away_did_not_survive() -> None:
    base, update, _ = random_matrices(0)
    adapters = [random_adapter("a", 0)]
    assert agreement_of(adapters, "m", base, update, torch.zeros_like(base)).survived == 0
    assert agreement_of(adapters, "m", base, update, -0.5 * update).survived == pytest.approx(-0.5)
