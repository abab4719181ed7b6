"""Layers' inputs in host memory: what moves, that it comes back as it was, and that nothing else changes."""

import gc
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import checkpoint_activations
from pydantic import ValidationError
from test_branch import factors, new_model, same, settings
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from mot_lora.config import BranchConfig
from mot_lora.data.encoding import encode
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Trace
from mot_lora.errors import UserError
from mot_lora.reader import demo_path, parse_config
from mot_lora.training import offload
from mot_lora.training.branch import train
from mot_lora.training.loss import batch_loss
from mot_lora.training.offload import Offload, capacity, is_worth_moving, kept_bytes, offloads

CPU = torch.device("cpu")
LAYERS, WIDTH = 6, 32


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of more layers than stay near."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path("student"))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path = tmp_path_factory.mktemp("models") / "deep"
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors move too, and lie over several slabs."""
    monkeypatch.setattr(offload, "WORTH", 1)
    monkeypatch.setattr(offload, "SLAB", 1000)


def checkpointed(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).train()
    checkpoint_activations(model)
    model.disable_input_require_grads()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj" in name)
    return model


def batch_of(model: Any, rows: int = 2, length: int = 13, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(4, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids.to(model.device), "labels": ids.to(model.device)}


def gradients(model: Any, batch: dict[str, Tensor], moving: Offload | None, chunk: int = 8) -> list[Tensor]:
    """The loss of a batch and every gradient."""
    with moving.step() if moving else nullcontext():
        loss, _ = batch_loss(model, batch, chunk)
        loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def equal(x: list[Tensor], y: list[Tensor]) -> bool:
    return len(x) == len(y) and all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


# --- the rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kept", "capacity", "want"),
    [
        ({}, 101, 1000, True),
        ({}, 100, 1000, False),  # a tenth, and not more
        ({}, 101, 0, False),  # on a CPU
        ({"activation_checkpointing": False}, 101, 1000, False),
        ({"offload": "on"}, 1, 1000, True),
        ({"offload": "on"}, 1, 0, True),
        ({"offload": "off"}, 999, 1000, False),
    ],
)
def test_what_is_offloaded_by_itself(changes: dict[str, Any], kept: int, capacity: int, want: bool) -> None:
    assert offloads(settings(**changes), kept, capacity) is want


def test_the_inputs_of_layers_are_counted() -> None:
    assert kept_bytes(layers=36, tokens=2 * 32768, width=4096) == 18 * 2**30
    assert kept_bytes(layers=2, tokens=3, width=5, itemsize=4) == 120
    assert capacity(CPU) == 0


def test_on_and_off_are_words_although_yaml_has_them_as_truth_values() -> None:
    tree = {"student": "s", "teachers": [{"name": "a", "data": "a.jsonl"}]}
    for said, want in ((True, "on"), (False, "off"), ("on", "on"), ("auto", "auto")):
        assert parse_config({**tree, "branch": {"offload": said}}, "test").branch.offload == want
    with pytest.raises(ValidationError, match="offload"):
        BranchConfig(offload=1)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="set `activation_checkpointing: true`"):
        BranchConfig(offload="on", activation_checkpointing=False)


def test_large_whole_tensors_of_the_models_type_move_and_no_weights() -> None:
    bf16, large = torch.bfloat16, torch.zeros(1, 512, 1024, dtype=torch.bfloat16)
    assert large.nbytes == 2**20
    assert is_worth_moving(large, bf16)
    assert is_worth_moving(large.view(512, 1024), bf16)
    assert not is_worth_moving(large, torch.float32)
    assert not is_worth_moving(large[:, 1:].contiguous(), bf16)
    assert not is_worth_moving(large.new_zeros(2, 512, 1024)[0], bf16)  # a part
    assert not is_worth_moving(large.transpose(1, 2), bf16)
    assert not is_worth_moving(torch.zeros(2**20, dtype=torch.int8), torch.int8)
    weight = torch.nn.Parameter(large.clone())
    assert not is_worth_moving(weight, bf16)
    assert not is_worth_moving(weight.view(-1), bf16)
    assert is_worth_moving(torch.zeros(1, 512, 1024, dtype=bf16, device="meta"), bf16)


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("slab", "near"), [(96, 2), (1000, 0), (2**20, 1)])
def test_losses_and_gradients_are_the_same_bytes(
    deep: Path, dtype: torch.dtype, slab: int, near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SLAB", slab)
    monkeypatch.setattr(offload, "NEAR", near)
    model, moving = checkpointed(deep, dtype), Offload(CPU, dtype)
    for seed, (rows, length) in enumerate([(2, 13), (1, 30), (3, 5), (2, 13)]):
        batch = batch_of(model, rows, length, seed)
        plain = gradients(model, batch, None)
        assert len(plain) == 1 + 7 * LAYERS
        assert equal(gradients(model, batch, moving), plain)
        assert (moving.used, moving.moved, moving.near) == (0, [], {})
    # the host memory is that of the largest batch, however many there were
    most = max(kept_bytes(LAYERS, 30, WIDTH, dtype.itemsize), 2 * 13 * LAYERS * WIDTH * dtype.itemsize)
    held = len(moving.slabs) * offload.SLAB
    if dtype == torch.bfloat16:
        assert most <= held < most + offload.SLAB
    else:  # what the last norm keeps is in the model's type too
        assert most < held


@pytest.mark.usefixtures("small")
def test_between_the_passes_only_the_nearest_inputs_are_on_the_device(deep: Path) -> None:
    model: Any = checkpointed(deep, torch.bfloat16)
    inputs: list[Any] = []  # a storage's object lives as long as the memory does
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage())))

    def there() -> list[int]:
        gc.collect()
        found = [i for i, storage in enumerate(inputs) if storage() is not None]
        inputs.clear()
        return found

    loss, _ = batch_loss(model, batch_of(model), 8)
    assert there() == list(range(LAYERS))
    loss.backward()
    inputs.clear()  # a version of transformers may call a layer again to compute it again
    moving = Offload(CPU, torch.bfloat16)
    near: list[list[int]] = []
    for layer in model.model.layers:  # called in the forward pass, and when the layer is computed again
        layer.self_attn.register_forward_pre_hook(lambda *_: near.append(list(moving.near)))
    with moving.step():
        loss, _ = batch_loss(model, batch_of(model), 8)
        assert there() == [LAYERS - 2, LAYERS - 1]
        loss.backward()
    assert near[:LAYERS] == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert near[LAYERS:] == [[4], [3], [2], [1], [0], []]  # while one is computed again, the next one comes


class Same(torch.autograd.Function):
    """Hands on what it is given, and notes in the backward pass what it kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, notes: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.notes = notes
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.notes.append(ctx.saved_tensors[0])
        return gradients[0], None


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_copies_are_exact_down_to_the_bits(dtype: torch.dtype) -> None:
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    # every pattern of 16 bits: all numbers, also the smallest ones, both zeros, infinities and each nan
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    patterns = patterns * 65539 if dtype == torch.float32 else patterns.to(torch.int16)
    x = patterns.view(dtype).clone().view(1, 256, 256).requires_grad_()
    notes: list[Tensor] = []
    moving = Offload(CPU, dtype)
    with moving.step():
        y = x
        for _ in range(5):
            y = Same.apply(y, notes)
        assert len(moving.moved) == 5
        assert len(moving.moved[1].places) > 100
        y.backward(torch.ones_like(y))
    assert len(notes) == 5
    assert all(torch.equal(note.view(bits), x.detach().view(bits)) for note in notes)


@pytest.mark.usefixtures("small")
def test_a_step_that_breaks_off_leaves_nothing_behind(deep: Path) -> None:
    model, moving = checkpointed(deep), Offload(CPU, torch.float32)
    batch = batch_of(model)
    plain = gradients(model, batch, None)

    def interrupt(_: Tensor) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[3].mlp.down_proj.weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        gradients(model, batch_of(model, seed=5), moving)
    hook.remove()
    model.zero_grad()
    assert (moving.used, moving.moved, moving.near) == (0, [], {})
    assert equal(gradients(model, batch, moving), plain)


def test_no_host_memory_is_one_line_that_says_how_much_is_needed(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "WORTH", 1)
    monkeypatch.setattr(offload, "SLAB", 2**60)
    model = checkpointed(deep)
    with pytest.raises(UserError) as e:
        gradients(model, batch_of(model), Offload(CPU, torch.float32, kept=18 * 2**30))
    assert str(e.value).startswith("branch.offload needs 18.0 GiB of host memory, but only 0.0 could be allocated (")
    advice = "; resume with branch.offload=off, or start a new run with a smaller branch.max_length"
    assert str(e.value).endswith(advice)


# --- in a branch ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("changes", [{}, {"batch_size": 3, "gradient_accumulation": 1}])
def test_an_adapter_is_trained_to_the_same_bytes(
    deep: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(deep)
    examples = [
        encode(tokenizer, Trace(({"role": "user", "content": f"{i} + 1 = ?"},), f"{i + 1} " * (i % 5 + 1)))
        for i in range(8)
    ]
    made: list[tuple[int, int]] = []
    real = Offload.step

    def step(self: Offload) -> Any:
        made.append((self.kept, len(self.slabs)))
        return real(self)

    monkeypatch.setattr(Offload, "step", step)
    runs: list[Any] = []
    for setting in ("off", "auto", "on"):
        model = new_model(deep, dropout=0.1)
        record = train(model, tokenizer, examples, settings(offload=setting, **changes), seed=2)
        runs.append((factors(model), record.losses))
        assert len(made) == (0 if setting != "on" else 4 * settings(**changes).gradient_accumulation)
    for trained, losses in runs[1:]:
        assert same(trained, runs[0][0])
        assert losses == runs[0][1]
    longest = max(map(len, examples))
    batch = settings(**changes).batch_size
    assert made[0] == (kept_bytes(LAYERS, longest * batch, WIDTH, 4), 0)  # fp32 on a CPU
    assert made[-1][1] > 1


@pytest.mark.gpu
def test_on_a_gpu_the_same_bytes_take_less_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SLAB", 2**22)
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=512, num_hidden_layers=24, head_dim=128, **shape)
    model: Any = Qwen3ForCausalLM(config).to("cuda", torch.bfloat16).train()
    checkpoint_activations(model)
    model.disable_input_require_grads()
    model.get_input_embeddings().requires_grad_(False)
    batch = batch_of(model, 1, 16384)
    moving = Offload(model.device, torch.bfloat16)
    peaks: list[int] = []
    found: list[list[Tensor]] = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for how in (None, None, moving, moving, moving):
                torch.cuda.reset_peak_memory_stats()
                found.append([t.cpu() for t in gradients(model, batch, how, chunk=2048)])
                peaks.append(torch.cuda.max_memory_allocated())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(equal(f, found[1]) for f in found[2:])
    saved = kept_bytes(24 - offload.NEAR - 1, 16384, 512)
    assert peaks[1] - max(peaks[2:]) > 0.8 * saved
