"""A merge added to a live PEFT model, whatever its base is held in, against sums taken by hand."""

import math
import random
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import apart, files_of, fresh, logits_of, peft_adapter, peft_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mot_lora import UserError, adapter_from_peft, add_merged_adapter, load_adapter, merge_adapters, save_adapter
from mot_lora.merging.methods import ties

MakeAdapter = Callable[..., Path]

# different ranks, alphas and modules, rsLoRA, patterns
SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "b": {"r": 5, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "c": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {r"0\.self_attn\.q_proj": 1, "o_proj": 6},
        "alpha_pattern": {"o_proj": 2},
    },
}
# what each one's update is multiplied with, by hand
SCALINGS: dict[str, Callable[[str], float]] = {
    "a": lambda _: 7 / 3,
    "b": lambda _: 4 / math.sqrt(5),
    "c": lambda m: 2 / 6 if "o_proj" in m else 6 if ".0.self_attn.q_proj" in m else 6 / 4,
}
BASES = ["nf4", "int8", "bf16", "fp32"]


def load_in(path: Path, held: str) -> Any:
    """The student as a notebook loads it."""
    settings: dict[str, Any] = {"dtype": torch.bfloat16 if held == "bf16" else torch.float32}
    if held == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    elif held == "int8":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(path, **settings)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # FACTS: it repacks weights in place
    return model


def with_adapters(model: Any, settings: dict[str, dict[str, Any]] = SETTINGS) -> PeftModel:
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, said in settings.items():
            config = LoraConfig(task_type="CAUSAL_LM", **said)
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.eval()


def layers_of(model: PeftModel) -> dict[str, Any]:
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def deltas_by_hand(model: PeftModel, names: Sequence[str] = "abc") -> dict[str, list[Tensor]]:
    """alpha / r * B @ A in fp64, 0 where an adapter has none."""
    found: dict[str, list[Tensor]] = {}
    for module, layer in layers_of(model).items():
        weight = dequantized(layer.get_base_layer())
        deltas = [
            SCALINGS[n](module) * (layer.lora_B[n].weight.double() @ layer.lora_A[n].weight.double())
            if n in layer.lora_A
            else torch.zeros(weight.shape, dtype=torch.float64)
            for n in names
        ]
        found[module] = [d.detach() for d in deltas]
    return found


def dequantized(layer: torch.nn.Module) -> Tensor:
    weight: Any = layer.weight
    if isinstance(layer, Linear4bit):
        return bnb.dequantize_4bit(weight.data, weight.quant_state).double()
    if isinstance(layer, Linear8bitLt):
        codes, scales = (weight.CB, weight.SCB) if weight.CB is not None else (layer.state.CB, layer.state.SCB)
        return codes.double() * scales[:, None].double() / 127
    return weight.detach().double()


def snapshot(model: PeftModel, but: str = "m") -> Any:
    """All that adding an adapter must leave alone."""
    return (
        {n: (p.requires_grad, p.dtype, p.detach().clone()) for n, p in model.named_parameters() if f".{but}." not in n},
        {n: b.clone() for n, b in model.named_buffers()},
        {n: m.training for n, m in model.named_modules() if not n.endswith(f".{but}")},
        {n: m.active_adapters for n, m in layers_of(model).items()},
        model.active_adapter,
        {n: c.to_dict() for n, c in model.peft_config.items() if n != but},
        (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
    )


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(params=BASES)
def live(request: pytest.FixtureRequest, qwen3: Path) -> PeftModel:
    return with_adapters(load_in(qwen3, request.param))


@pytest.fixture
def small(bases: dict[str, Path]) -> PeftModel:
    return with_adapters(fresh(bases["tied"]))


# --- what it computes ------------------------------------------------------------------------------------


def test_it_computes_with_the_sum_of_the_true_updates(live: PeftModel) -> None:
    weights, scale = [3.0, 1.0, 2.0], 1.5
    deltas = deltas_by_hand(live)
    record = add_merged_adapter(live, ["a", "b", "c"], "m", weights=weights, scale=scale)
    assert record.method == "linear"
    assert record.lost == 0
    assert record.ranks.keys() == deltas.keys()
    live.set_adapter("m")
    generator = torch.Generator().manual_seed(7)
    for module, layer in layers_of(live).items():
        expected = sum(d.any() * r for d, r in zip(deltas[module], (3, 5, rank_of_c(module)), strict=True))
        assert record.ranks[module] == layer.lora_A["m"].weight.shape[0] == expected
        assert record.modules[module] == 0

        delta = scale * sum(w * d for w, d in zip(weights, deltas[module], strict=True)) / sum(weights)
        base = layer.get_base_layer()
        x = torch.randn(6, delta.shape[1], generator=generator)
        x = x.to(torch.bfloat16) if base.weight.dtype == torch.bfloat16 else x
        with torch.no_grad():
            got, alone = layer(x).double(), base(x).double()
        # what the adapter adds; in bf16 the sum is rounded
        rounding = 2**-8 * float(got.abs().max()) if x.dtype == torch.bfloat16 else 0.0
        want = x.double() @ delta.T
        assert (got - alone - want).abs().max() < 1e-5 * want.abs().max() + 2 * rounding
        # and all of it, on the weights as they are; int8 rounds its inputs to eight bits too
        want = x.double() @ (dequantized(base) + delta).T
        bound = 0.03 if isinstance(base, Linear8bitLt) else 0.01 if rounding else 1e-5
        assert (got - want).abs().max() < bound * want.abs().max()
        assert (want - alone).abs().max() > 0.1 * alone.abs().max()


def rank_of_c(module: str) -> int:
    return 6 if "o_proj" in module else 1 if ".0.self_attn.q_proj" in module else 4


def test_logits_are_those_of_weights_that_were_summed_by_hand(small: PeftModel, bases: dict[str, Path]) -> None:
    deltas = deltas_by_hand(small)
    add_merged_adapter(small, ["c", "a"], "m", weights=[1, 4])
    small.set_adapter("m")
    model = fresh(bases["tied"]).double()
    with torch.no_grad():
        for module, (a, _, c) in deltas.items():
            model.get_submodule(module).weight += 0.8 * a + 0.2 * c
    assert apart(logits_of(small), logits_of(model), logits_of(fresh(bases["tied"]))) < 1e-5


@pytest.mark.parametrize("rank", [2, 7])
def test_a_rank_costs_what_the_record_says(live: PeftModel, rank: int) -> None:
    deltas = deltas_by_hand(live)
    record = add_merged_adapter(live, ["a", "b", "c"], "m", "ties", [2, 1, 1], density=0.4, rank=rank)
    assert (record.method, record.rank, set(record.ranks.values())) == ("ties", rank, {rank})
    lost = total = 0.0
    for module, layer in layers_of(live).items():
        full = ties([d.float() for d in deltas[module]], [2, 1, 1], density=0.4).double()
        got = layer.get_delta_weight("m").double()
        error, size = float((full - got).norm()), float(full.norm())
        best = float((torch.linalg.svdvals(full)[rank:] ** 2).sum()) ** 0.5
        assert error == pytest.approx(best, rel=1e-3)
        assert record.modules[module] == pytest.approx(best / size, rel=1e-3)
        lost, total = lost + error**2, total + size**2
    assert record.lost == pytest.approx(math.sqrt(lost / total), rel=1e-3)
    assert record.lost > 0.05


def test_a_linear_merge_at_a_rank_is_the_best_of_that_rank(small: PeftModel) -> None:
    deltas = deltas_by_hand(small)
    record = add_merged_adapter(small, ["a", "b", "c"], "m", rank=4)
    for module, layer in layers_of(small).items():
        full = sum(deltas[module]) / 3
        values = torch.linalg.svdvals(full)
        best = float((values[4:] ** 2).sum() ** 0.5)
        assert float((full - layer.get_delta_weight("m")).norm()) == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert record.modules[module] == pytest.approx(best / float(full.norm()), rel=1e-4, abs=1e-6)
    assert 0 < record.lost < 1


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "sce"])
def test_every_method_has_its_merge(small: PeftModel, method: str) -> None:
    adapters = [adapter_from_peft(small, name) for name in "abc"]
    add_merged_adapter(small, ["a", "b", "c"], "m", method, [1, 2, 1], density=0.6, scale=0.5, rank=48, seed=3)
    merged = merge_adapters(adapters, method, [1, 2, 1], density=0.6, scale=0.5, seed=3)
    for module, layer in layers_of(small).items():
        torch.testing.assert_close(layer.get_delta_weight("m"), merged.delta(module), rtol=1e-4, atol=1e-5)


def test_a_function_of_ones_own_and_settings_by_module(small: PeftModel) -> None:
    def larger(deltas: Tensor, weights: Sequence[float]) -> Tensor:
        return torch.where(deltas[0].abs() > deltas[1].abs(), deltas[0] * weights[0], deltas[1])

    deltas = deltas_by_hand(small)
    add_merged_adapter(small, ["a", "b"], "m", larger, [{"mlp.*": 2.0}, 1.0], scale={"v_proj": 0.5}, rank=48)
    for module, layer in layers_of(small).items():
        a, b, _ = deltas[module]
        want = torch.where(a.abs() > b.abs(), a * (2 if "mlp" in module else 1), b) * (0.5 if "v_proj" in module else 1)
        torch.testing.assert_close(layer.get_delta_weight("m").double(), want, rtol=1e-4, atol=1e-5)


def test_a_scaling_that_was_changed_in_the_model_counts(small: PeftModel) -> None:
    deltas = deltas_by_hand(small)
    for layer in layers_of(small).values():
        if "a" in layer.scaling:
            layer.scaling["a"] *= 0.25
    add_merged_adapter(small, ["a", "c"], "m")
    for module, layer in layers_of(small).items():
        want = (0.25 * deltas[module][0] + deltas[module][2]) / 2
        torch.testing.assert_close(layer.get_delta_weight("m").double(), want, rtol=1e-4, atol=1e-6)


# --- what it leaves alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("active", ["a", "b"])
def test_all_else_stays_as_it_was(live: PeftModel, active: str) -> None:
    live.set_adapter(active)
    live.train()
    live.get_base_model().model.layers[0].eval()
    live.get_base_model().model.norm.weight.requires_grad_(True)
    live.get_base_model().model.layers[1].input_layernorm.weight.requires_grad_(True)
    before = snapshot(live)
    add_merged_adapter(live, ["a", "b", "c"], "m", "dare_ties", density=0.5, rank=4)
    after = snapshot(live)
    for one, other in zip(before, after, strict=True):
        assert same(one, other)
    new = {n: p for n, p in live.named_parameters() if ".m." in n}
    assert len(new) == 2 * len(layers_of(live))
    assert all(not p.requires_grad and p.dtype == torch.float32 and p.isfinite().all() for p in new.values())


def test_two_adapters_that_are_active_together_stay_so(small: PeftModel) -> None:
    small.base_model.set_adapter(["a", "c"])
    before, logits = snapshot(small), logits_of(small)
    add_merged_adapter(small, ["a", "b"], "m")
    assert all(same(x, y) for x, y in zip(before, snapshot(small), strict=True))
    assert torch.equal(logits_of(small), logits)


def test_training_goes_on_afterwards(small: PeftModel) -> None:
    small.train()
    small.set_adapter("a")
    add_merged_adapter(small, ["a", "b"], "m")
    ids = torch.arange(12)[None]
    small(input_ids=ids, labels=ids).loss.backward()
    with_gradients = {n for n, p in small.named_parameters() if p.grad is not None}
    assert with_gradients
    assert all(".a." in n for n in with_gradients)


def test_the_seed_alone_decides_what_dare_drops(small: PeftModel) -> None:
    def merge(name: str, seed: int) -> dict[str, Tensor]:
        add_merged_adapter(small, ["a", "b"], name, "dare_linear", density=0.5, rank=48, seed=seed)
        return {m: layer.get_delta_weight(name) for m, layer in layers_of(small).items()}

    torch.manual_seed(1)
    one = merge("one", 3)
    torch.manual_seed(2)
    torch.randn(5)
    again, other = merge("again", 3), merge("other", 4)
    assert all(torch.equal(one[m], again[m]) for m in one)
    assert not any(torch.allclose(one[m], other[m]) for m in one)


# --- where PEFT's own merge goes wrong -------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("linear", {}),
        ("linear", {"rank": 6}),
        ("ties", {"density": 1.0, "rank": 6}),
        ("dare_linear", {"density": 1.0, "rank": 6}),
        ("dare_ties", {"density": 1.0, "rank": 6}),
    ],
)
def test_three_thirds_of_an_adapter_are_that_adapter(
    bases: dict[str, Path], name: str, method: str, settings: dict[str, Any]
) -> None:
    live = with_adapters(fresh(bases["tied"]), dict.fromkeys("xyz", SETTINGS[name]))
    with torch.no_grad():
        for layer in layers_of(live).values():
            for other in "yz":
                layer.lora_A[other].weight.copy_(layer.lora_A["x"].weight)
                layer.lora_B[other].weight.copy_(layer.lora_B["x"].weight)
    want = logits_of(live)
    add_merged_adapter(live, ["x", "y", "z"], "m", method, weights=[1 / 3] * 3, **settings)
    live.set_adapter("m")
    assert apart(logits_of(live), want, logits_of(fresh(bases["tied"]))) < 1e-4


def test_copies_of_modules_are_merged_too(bases: dict[str, Path], tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        peft_adapter(bases["untied"], tmp_path / name, seed, target_modules=["q_proj"], modules_to_save=["lm_head"])
    live = peft_model(bases["untied"], a=tmp_path / "a", b=tmp_path / "b")
    copies = live.get_base_model().lm_head.modules_to_save
    before = {n: copies[n].weight.clone() for n in "ab"}
    add_merged_adapter(live, ["a", "b"], "m", weights=[1, 3])
    torch.testing.assert_close(copies["m"].weight, 0.25 * before["a"] + 0.75 * before["b"], rtol=1e-6, atol=1e-6)
    assert not copies["m"].weight.requires_grad
    assert all(torch.equal(copies[n].weight, before[n]) for n in "ab")


def test_dora_is_taken_on_the_weights_that_are_there(qwen3: Path) -> None:
    dora = {"r": 3, "lora_alpha": 7, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}
    live = with_adapters(load_in(qwen3, "nf4"), {"a": dora, "b": SETTINGS["b"]})
    layer = layers_of(live)["model.layers.1.mlp.up_proj"]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        alone, outputs = layer.get_base_layer()(x), {}
        for name in "ab":
            live.set_adapter(name)
            outputs[name] = layer(x) - alone
        with pytest.raises(UserError, match="rank"):
            add_merged_adapter(live, ["a", "b"], "m")
        add_merged_adapter(live, ["a", "b"], "m", weights=[1, 3], rank=64)
        live.set_adapter("m")
        got = layer(x) - alone
    torch.testing.assert_close(got, 0.25 * outputs["a"] + 0.75 * outputs["b"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["", "m"])
def test_it_can_be_saved_and_loaded_by_peft(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    live = with_adapters(fresh(bases["tied"]))
    add_merged_adapter(live, ["a", "b", "c"], "m", weights=[1, 2, 3])
    live.set_adapter("m")
    want = logits_of(live)
    live.save_pretrained(str(tmp_path), selected_adapters=[name] if name else None)
    assert (
        apart(logits_of(peft_model(bases["tied"], other=tmp_path / "m")), want, logits_of(fresh(bases["tied"]))) < 1e-5
    )
    # and what was merged live is what was merged from folders
    if not name:
        folders = [tmp_path / n for n in "abc"]
        save_adapter(merge_adapters(folders, weights=[1, 2, 3]), tmp_path / "merged")
        again = logits_of(peft_model(bases["tied"], other=tmp_path / "merged"))
        assert apart(again, want, logits_of(fresh(bases["tied"]))) < 1e-5


def test_a_merge_can_be_merged_again(small: PeftModel) -> None:
    add_merged_adapter(small, ["a", "b"], "ab")
    record = add_merged_adapter(small, ["ab", "c"], "abc", weights=[2, 1])
    add_merged_adapter(small, ["a", "b", "c"], "all")
    for layer in layers_of(small).values():
        torch.testing.assert_close(layer.get_delta_weight("abc"), layer.get_delta_weight("all"), rtol=1e-5, atol=1e-6)
    assert record.lost == 0
    assert logits_of(small).isfinite().all()


# --- refusals --------------------------------------------------------------------------------------------


def refused(model: PeftModel, *args: Any, **settings: Any) -> str:
    """The message of a refusal, which must leave the model alone."""
    before = snapshot(model, but="no such name")
    with pytest.raises(UserError) as e:
        add_merged_adapter(model, *args, **settings)
    assert all(same(x, y) for x, y in zip(before, snapshot(model, but="no such name"), strict=True))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_names_are_checked(small: PeftModel) -> None:
    assert "no adapter `d`; it has a, b, c" in refused(small, ["a", "d"], "m")
    assert "an adapter `b` already" in refused(small, ["a", "c"], "b")
    assert "at least one" in refused(small, [], "m")
    assert "different names" in refused(small, ["a", "a"], "m")


def test_settings_are_checked(small: PeftModel) -> None:
    message = refused(small, ["a", "b"], "m", "ties", density=0.5)
    assert "ties" in message
    assert "not low-rank" in message
    assert re.search(r"give a rank, e\.g\. \d+", message)
    assert "needs a density" in refused(small, ["a", "b"], "m", "ties", rank=4)
    assert "2 weights for 3 adapters" in refused(small, ["a", "b", "c"], "m", weights=[1, 2])
    assert "rank must be at least 1" in refused(small, ["a", "b"], "m", rank=0)
    assert "unknown merge method `mean`" in refused(small, ["a", "b"], "m", "mean")
    assert "pattern `q_prj`" in refused(small, ["a", "b"], "m", weights=[{"q_prj": 1.0}, 1.0])


def test_what_a_live_model_holds_is_refused_by_name(bases: dict[str, Path]) -> None:
    for settings, named in (
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    ):
        live = with_adapters(fresh(bases["tied"]), {"a": {"target_modules": ["q_proj"], **settings}})
        assert named in refused(live, ["a"], "m")


def test_a_model_with_its_adapters_merged_in_is_refused_or_right(bases: dict[str, Path]) -> None:
    # `merge_adapter` adds an update to the weights, so that they are not the base's
    dora = {"r": 3, "use_dora": True, "target_modules": ["q_proj"]}
    live = with_adapters(fresh(bases["tied"]), {"a": dora})
    right = {m: u.delta() for m, u in adapter_from_peft(live, "a").updates.items()}
    live.merge_adapter(["a"])
    try:
        got = {m: u.delta() for m, u in adapter_from_peft(live, "a").updates.items()}
    except UserError as e:
        assert "merge" in str(e)  # noqa: PT017
    else:
        for module, delta in right.items():
            torch.testing.assert_close(got[module], delta, rtol=1e-4, atol=1e-5)


def test_numbers_that_are_not_finite_are_refused(small: PeftModel) -> None:
    with torch.no_grad():
        layers_of(small)["model.layers.0.mlp.up_proj"].lora_A["b"].weight[0, 0] = math.nan
    with pytest.raises(UserError, match="finite"):
        add_merged_adapter(small, ["a", "b"], "m")
    assert list(small.peft_config) == ["a", "b", "c"]


def test_a_live_adapter_is_a_copy(small: PeftModel) -> None:
    copy = adapter_from_peft(small, "a")
    before = {m: u.delta() for m, u in copy.updates.items()}
    with torch.no_grad():
        for layer in layers_of(small).values():
            layer.lora_B["a"].weight.zero_()
    assert all(torch.equal(copy.updates[m].delta(), d) for m, d in before.items())
    assert not any(u.a.requires_grad for u in copy.updates.values())
    assert adapter_from_peft(small).name == "a"
    assert copy.targets["r"] == 3


def test_reading_a_model_changes_nothing_in_it(live: PeftModel, tmp_path: Path) -> None:
    before = snapshot(live)
    for name in "abc":
        save_adapter(adapter_from_peft(live, name), tmp_path / name)
    assert all(same(x, y) for x, y in zip(before, snapshot(live), strict=True))
    assert len(files_of(tmp_path)) == 6
    for name in "abc":
        again = load_adapter(tmp_path / name)
        for module, update in adapter_from_peft(live, name).updates.items():
            torch.testing.assert_close(again.updates[module].delta(), update.delta(), rtol=1e-5, atol=1e-7)
