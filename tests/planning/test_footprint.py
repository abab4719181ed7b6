"""A step without data takes what the same step takes with data, by torch's own account of its allocations."""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import allocated, checkpoint_activations
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import BranchConfig, LoraConfig
from mot_lora.errors import UserError
from mot_lora.planning.footprint import Step, answer, measure, step, student, weights
from mot_lora.training.adapter import add_adapter, reset_adapter
from mot_lora.training.decoding import Decoding
from mot_lora.training.loss import batch_loss, inputs_as_they_are
from mot_lora.training.student import load_model

LORA = LoraConfig(r=8, alpha=16)
SHAPES: dict[str, Callable[[], torch.nn.Module]] = {
    "wide": lambda: Qwen3ForCausalLM(_shape(Qwen3Config, hidden_size=256, num_hidden_layers=6, head_dim=64)),
    "deep, much vocabulary": lambda: Qwen3ForCausalLM(
        _shape(Qwen3Config, hidden_size=64, num_hidden_layers=12, head_dim=16, vocab_size=20_000)
    ),
    "llama": lambda: LlamaForCausalLM(_shape(LlamaConfig, hidden_size=128, num_hidden_layers=8, head_dim=32)),
}


def _shape(kind: Any, hidden_size: int, **settings: int) -> Any:
    given = {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2000,
        "tie_word_embeddings": False,
        **settings,
    }
    return kind(**given)


@pytest.fixture(scope="module", params=SHAPES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("student")
    SHAPES[request.param]().save_pretrained(path)
    return path


def real(path: Path, quantization: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    model = load_model(Checkpoint.open(path), quantization, torch.device("cpu"))
    model = add_adapter(model.to(dtype) if dtype != torch.float32 else model, LORA)
    reset_adapter(model, 0)
    return model


def planned(path: Path, quantization: str, dtype: torch.dtype = torch.float32) -> Any:
    return student(AutoConfig.from_pretrained(path), quantization, LORA, dtype, "cpu")


def taken(model: PeftModel, batch: int, tokens: int, settings: BranchConfig) -> tuple[int, int]:
    """What a real step holds on to after its forward pass, and its peak, as torch's allocator reports them."""
    base: Any = model.get_base_model()
    if settings.activation_checkpointing:
        checkpoint_activations(base)
        base.disable_input_require_grads()
    base.train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    ids = torch.randint(0, base.config.vocab_size, (batch, tokens))
    stack = ExitStack()
    with (
        stack,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        loss, _ = batch_loss(base, {"input_ids": ids, "labels": ids}, settings.loss_chunk)
        stack.enter_context(inputs_as_they_are(base))  # as the trainer has it around the backward pass
        with torch.profiler.record_function("backward begins"):
            loss.backward()
    return allocated(profile, "backward begins")


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_step_takes_what_it_is_said_to_take(saved: Path, quantization: str, checkpointing: bool) -> None:
    settings = BranchConfig(loss_chunk=128, activation_checkpointing=checkpointing)
    kept, most = taken(real(saved, quantization), 2, 384, settings)
    said = step(planned(saved, quantization), 2, 384, settings, offload=False)
    assert said.kept == pytest.approx(kept, rel=0.03)  # batches' ids and rotary angles are small
    assert said.peak == pytest.approx(most, rel=0.01)


def test_so_does_a_step_in_bf16(saved: Path) -> None:
    """The adapter stays in fp32 and autocast casts it: neither its copies nor PEFT's are seen in the peak."""
    settings = BranchConfig(loss_chunk=128)
    kept, most = taken(real(saved, "none", torch.bfloat16), 2, 384, settings)
    said = step(planned(saved, "none", torch.bfloat16), 2, 384, settings, offload=False)
    assert said.kept == pytest.approx(kept, rel=0.05)
    assert 0.97 * most < said.peak < 1.1 * most


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_weights_are_counted_to_the_byte(saved: Path, quantization: str) -> None:
    said = weights(planned(saved, quantization))
    model = real(saved, quantization)
    base = model.get_base_model()
    assert said.adapter == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    stored = Checkpoint.open(saved)
    assert said.parameters == sum(stored.tensor(name).numel() for name in stored.files)
    layers = others = 0
    seen = set[int]()
    for name, module in base.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            state = getattr(parameter, "quant_state", None)
            of_state = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code) if state else ()
            inner = sum(t.nbytes for t in of_state)
            scales = parameter.SCB.nbytes if getattr(parameter, "SCB", None) is not None else 0
            if name.endswith("base_layer"):
                layers += parameter.nbytes + inner + scales
            else:
                others += parameter.nbytes
    assert (said.layers, said.others) == (layers, others)


def test_the_operations_are_those_that_torch_counts(saved: Path) -> None:
    model = real(saved, "none")
    base: Any = model.get_base_model()
    base.train()
    ids = torch.randint(0, base.config.vocab_size, (1, 256))
    counts = Counter[str]()

    class Count(TorchDispatchMode):  # as FlopCounterMode, whose hooks allow no gradients within a forward pass
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if formula := flop_registry.get(func.overloadpacket):
                counts[str(func)] += formula(*args, **(kwargs or {}), out_val=result)
            return result

    with Count():
        loss, _ = batch_loss(base, {"input_ids": ids, "labels": ids}, 64)
        loss.backward()
    said = step(planned(saved, "none"), 1, 256, BranchConfig(loss_chunk=64, activation_checkpointing=False), False)
    products = sum(n for op, n in counts.items() if "attention" not in op)
    c = base.config
    attention = c.num_hidden_layers * 2 * c.num_attention_heads * 256 * 256 * c.head_dim * 7 / 2
    assert said.flops == pytest.approx(products + attention, rel=1e-3)


def test_quantized_products_are_operations_too(saved: Path) -> None:
    plain, quantized, eight = (
        step(planned(saved, q), 1, 256, BranchConfig(loss_chunk=64), False).flops for q in ("none", "nf4", "int8")
    )
    assert plain == quantized == eight


def test_offloaded_inputs_take_host_memory_instead(saved: Path) -> None:
    model = planned(saved, "nf4")
    shape = model.config
    tokens = 2**21 // shape.hidden_size
    stays, moves = (step(model, 1, tokens, BranchConfig(), offload) for offload in (False, True))
    assert stays.host == 0
    # in fp32 the last norm keeps two more in the student's own format
    assert moves.host == (shape.num_hidden_layers + 2) * tokens * shape.hidden_size * 4
    assert moves.kept < stays.kept - (shape.num_hidden_layers - 4) * tokens * shape.hidden_size * 4
    assert moves.flops == stays.flops


def test_layers_that_are_left_out_of_the_count_are_counted() -> None:
    """A model of many layers is run with few of them: the rest is added, to the byte."""
    config = _shape(Qwen3Config, hidden_size=64, num_hidden_layers=9, head_dim=16)
    other = _shape(Qwen3Config, hidden_size=64, num_hidden_layers=9, head_dim=16)
    whole, part = (student(c, "nf4", LORA, torch.float32, "cpu") for c in (config, other))
    layers = whole.get_base_model().model.layers
    layers[8].extra = torch.nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)  # not alike: all are run
    for checkpointing in (True, False):
        settings = BranchConfig(activation_checkpointing=checkpointing, loss_chunk=64)
        for offload in (False, True):
            assert step(whole, 1, 500, settings, offload) == step(part, 1, 500, settings, offload)


def test_memory_grows_as_a_line_on_every_card() -> None:
    config = _shape(Qwen3Config, hidden_size=64, num_hidden_layers=3, head_dim=16)
    settings = BranchConfig(loss_chunk=64)

    def layer(kind: Any, tokens: int) -> int:
        return step(student(config, "none", LORA, torch.float32, kind), 1, tokens, settings, False).layer

    for kind in ("cpu", "cuda", "repeated"):
        assert layer(kind, 4096) < 2.2 * layer(kind, 2048)
    assert layer("repeated", 4096) > layer("cuda", 4096)


def test_keys_and_values_are_those_of_every_layer(saved: Path) -> None:
    model = planned(saved, "nf4")
    c = model.config
    keys = 3 * 100 * c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim * 4
    said = answer(model, 3, 10, Decoding(90, frozenset()), 30)
    assert said.cache == keys
    assert keys < said.bytes < 1.6 * keys
    greedy, drawn = (answer(model, 64, 10, Decoding(9, frozenset(), t, 0.9), 10).bytes for t in (0.0, 1.0))
    assert drawn > greedy


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_held_out_loss_takes_what_it_is_said_to_take(saved: Path, quantization: str) -> None:
    model = real(saved, quantization).eval()
    base: Any = model.get_base_model()
    ids = torch.randint(0, base.config.vocab_size, (2, 384))
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        batch_loss(base, {"input_ids": ids, "labels": ids}, 128)
    said = measure(planned(saved, quantization), 2, 384, 128)
    assert said.bytes == pytest.approx(allocated(profile)[1], rel=0.02)
    step_of_it = step(planned(saved, quantization), 2, 384, BranchConfig(activation_checkpointing=False), False)
    assert said.flops == pytest.approx(step_of_it.flops / 2, rel=0.25)  # there and back, and the adapter's gradients


def test_a_step_without_data_leaves_the_settings_of_torch_alone(saved: Path) -> None:
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.empty(1).device)
    first = step(planned(saved, "nf4"), 1, 64, BranchConfig(), False)
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.empty(1).device) == before
    assert isinstance(first, Step)
    assert step(planned(saved, "nf4"), 1, 64, BranchConfig(), False) == first


def test_targets_that_match_nothing_are_told() -> None:
    with pytest.raises(UserError, match="match no layer"):
        student(
            _shape(Qwen3Config, hidden_size=64, num_hidden_layers=1, head_dim=16),
            "nf4",
            LoraConfig(target_modules=("nothing",)),
            torch.float32,
            "cpu",
        )


def test_what_liger_put_into_transformers_is_not_planned_with(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels have no data to work on, and are known by what they keep and take."""
    before = step(planned(saved, "nf4"), 1, 64, BranchConfig())
    modeling: Any = sys.modules[type(planned(saved, "nf4").get_base_model()).__module__]
    norm = next(name for name in vars(modeling) if name.endswith("RMSNorm"))

    class LigerRMSNorm(torch.nn.Module):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise AssertionError("called")

    def liger_rotary_pos_emb(*_: Any) -> Any:
        raise AssertionError("called")

    monkeypatch.setattr(modeling, norm, LigerRMSNorm)
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", liger_rotary_pos_emb)
    assert step(planned(saved, "nf4"), 1, 64, BranchConfig()) == before
    assert answer(planned(saved, "nf4"), 2, 8, Decoding(8, frozenset()), 16).bytes > 0
    assert getattr(modeling, norm) is LigerRMSNorm  # as somebody else has it
    assert modeling.apply_rotary_pos_emb is liger_rotary_pos_emb


def test_liger_keeps_less(saved: Path) -> None:
    model = planned(saved, "nf4", torch.bfloat16)
    settings = BranchConfig(loss_chunk=64, activation_checkpointing=False)
    plain = step(model, 1, 512, settings)
    fused = step(model, 1, 512, settings, liger=True)
    assert fused.kept < 0.8 * plain.kept
    assert fused.peak < plain.peak
    assert fused.flops == plain.flops
    assert step(model, 1, 512, settings) == plain  # and nothing of it stays
