"""A LoRA layer as one product, against PEFT's forward and exact sums; and what it keeps for the backward pass."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from bitsandbytes.nn.modules import Linear8bitLt
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.weights import dense, read_weight
from mot_lora.config import BranchConfig, LoraConfig
from mot_lora.training.adapter import add_adapter, reset_adapter
from mot_lora.training.branch import set_checkpoints
from mot_lora.training.lora import LoraProduct, one_product
from mot_lora.training.loss import batch_loss
from mot_lora.training.student import load_model

CPU = torch.device("cpu")


def new_model(path: Path, quantization: str, **lora: Any) -> PeftModel:
    """A student whose A and B both get gradients."""
    model = add_adapter(load_model(Checkpoint.open(path), quantization, CPU), LoraConfig(r=4, alpha=8, **lora))
    reset_adapter(model, 0)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    return model


def layers_of(model: PeftModel) -> dict[str, Any]:
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def gradients(model: PeftModel, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    batch_loss(model.get_base_model(), {"input_ids": ids, "labels": ids}, chunk=16)[0].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


IDS = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_gradients_are_those_of_pefts_forward(student: Path, quantization: str, checkpointing: bool) -> None:
    model = new_model(student, quantization)
    if checkpointing:
        set_checkpoints(model.get_base_model(), BranchConfig())
        model.train()
    want = gradients(model, IDS)
    with one_product(model):
        got = gradients(model, IDS)
    assert got.keys() == want.keys()
    assert len(got) == 2 * len(layers_of(model))
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=float(want[name].abs().max()) * 1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_layer_is_the_exact_sum_to_rounding(qwen3: Path, quantization: str) -> None:
    model = new_model(qwen3, quantization)
    generator = torch.Generator().manual_seed(1)
    with one_product(model):
        for layer in list(layers_of(model).values())[:7]:
            weight = read_weight(layer.get_base_layer()).double()
            x = torch.randn(2, 5, weight.shape[1], generator=generator, requires_grad=True)
            upstream = torch.randn(2, 5, weight.shape[0], generator=generator)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
            scaling = layer.scaling["default"]
            assert scaling == 2
            want = exact[0] @ (weight + scaling * exact[2] @ exact[1]).t()
            got = layer(x)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
            for one, other in zip(
                torch.autograd.grad(got, [x, a, b], upstream),
                torch.autograd.grad(want, exact, upstream.double()),
                strict=True,
            ):
                torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_adapters_gradient_comes_in_its_own_format(dtype: torch.dtype) -> None:
    base = nn.Linear(24, 40, bias=True, dtype=dtype)
    base.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 24, generator=generator).to(dtype).requires_grad_()
    a, b = (torch.randn(*s, generator=generator, requires_grad=True) for s in ((4, 24), (40, 4)))
    y = cast("Any", LoraProduct).apply(x, a, b, base, 0.5)
    want = nn.functional.linear(x.float(), base.weight.float() + 0.5 * b @ a, base.bias.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    for got, exact in zip(
        torch.autograd.grad(y, [x, a, b], torch.ones_like(y)),
        torch.autograd.grad(want, [x, a, b], torch.ones_like(want)),
        strict=True,
    ):
        assert got.dtype == exact.dtype
        torch.testing.assert_close(got.float(), exact.float(), rtol=0.05, atol=0.1)


def kept_by(layer: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(x)
    return kept


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_layer_keeps_its_input_and_no_weight(qwen3: Path, quantization: str) -> None:
    model = new_model(qwen3, quantization)
    with one_product(model):
        for layer in layers_of(model).values():
            wide, narrow = layer.in_features, layer.lora_A["default"].out_features
            x = torch.randn(1, 6, wide, requires_grad=True)
            kept = kept_by(layer, x)
            assert {t.data_ptr() for t in kept if t.numel() == x.numel()} == {x.data_ptr()}
            others = [t for t in kept if t.data_ptr() != x.data_ptr() and not isinstance(t, nn.Parameter)]
            assert sum(t.numel() for t in others) == 6 * narrow


def held_beside_saved(node: Any) -> list[Tensor]:
    """The tensors that the nodes of a graph hold where no hook for saved tensors sees them."""
    held: list[Tensor] = []
    nodes = [node]
    while nodes:
        if (node := nodes.pop()) is not None:
            for value in getattr(node, "__dict__", {}).values():
                held += [t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor)]
            nodes += [following for following, _ in node.next_functions]
    return held


def test_nothing_of_an_int8_layer_escapes_the_checkpoints(qwen3: Path) -> None:
    layer = next(iter(layers_of(new_model(qwen3, "int8")).values()))
    assert isinstance(layer.get_base_layer(), Linear8bitLt)
    x = torch.randn(1, 6, layer.in_features, requires_grad=True)
    assert x.numel() in {t.numel() for t in held_beside_saved(layer(x).grad_fn)}  # bitsandbytes' own product
    with one_product(cast("PeftModel", nn.ModuleList([layer]))):
        assert held_beside_saved(layer(x).grad_fn) == []


def test_int8_weights_are_rounded_once_to_16_bits(qwen3: Path) -> None:
    layer = next(iter(layers_of(new_model(qwen3, "int8")).values())).get_base_layer()
    exact = layer.weight.CB.double() * layer.weight.SCB.double()[:, None] / 127
    got = dense(layer, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    # half a unit of bf16's eight bits, and fp32's own rounding
    assert ((got.double() - exact).abs() <= exact.abs() * (2**-8 + 2**-20)).all()


def test_only_plain_layers_are_taken_and_all_is_as_before_after_it(qwen3: Path) -> None:
    model = new_model(qwen3, "none")
    layers = layers_of(model)
    name = next(iter(layers))
    layers[name].lora_dropout["default"] = nn.Dropout(0.1)
    with suppress(KeyboardInterrupt), one_product(model):
        assert [n for n, m in layers.items() if "forward" not in vars(m)] == [name]
        raise KeyboardInterrupt
    assert not [n for n, m in layers.items() if "forward" in vars(m)]


def test_adapters_that_are_off_or_two_stay_pefts(qwen3: Path) -> None:
    model = new_model(qwen3, "none")
    with model.disable_adapter(), one_product(model):
        assert not [m for m in layers_of(model).values() if "forward" in vars(m)]
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with one_product(model):
        assert not [m for m in layers_of(model).values() if "forward" in vars(m)]
