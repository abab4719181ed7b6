import gc
import json
import os
import random
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import MakeAdapter, hashes, small_update, stored, true_updates
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mot_lora import UserError, fold_checkpoint, load_adapter, merge_adapters
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.tensorfile import write_tensors
from mot_lora.config import LoraConfig
from mot_lora.merging.lowrank import Adapter, Factors
from mot_lora.merging.merged import Merged
from mot_lora.training.adapter import add_adapter
from mot_lora.training.student import AHEAD, fold, load_model, read_weight

CPU = torch.device("cpu")


def requantized(value: torch.Tensor, quantization: str) -> torch.Tensor:
    if quantization == "nf4":
        return bnb.dequantize_4bit(*bnb.quantize_4bit(value.float(), quant_type="nf4", compress_statistics=True))
    if quantization == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(value.half())
        return codes.float() * scales[:, None] / 127
    return value.float()


def peft_student(path: Path, quantization: str = "nf4") -> tuple[Checkpoint, PeftModel]:
    checkpoint = Checkpoint.open(path)
    return checkpoint, add_adapter(load_model(checkpoint, quantization, CPU), LoraConfig(r=4, alpha=8))


def linear_layers(model: PeftModel) -> dict[str, Any]:
    return {n: m.get_base_layer() for n, m in model.get_base_model().named_modules() if hasattr(m, "get_base_layer")}


# --- the checkpoint ------------------------------------------------------------------------------


def test_opens_one_file_and_shards(qwen3: Path, llama: Path) -> None:
    for path, sharded in ((qwen3, True), (llama, False)):
        checkpoint = Checkpoint.open(path)
        want = stored(path)
        assert set(checkpoint.files) == set(want)
        assert (len(set(checkpoint.files.values())) > 1) is sharded
        for name, tensor in want.items():
            got = checkpoint.tensor(name)
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, tensor)


def test_fingerprint_tells_models_apart_and_nothing_else(student: Path, tmp_path: Path) -> None:
    before = Checkpoint.open(student).fingerprint()
    copy = tmp_path / "elsewhere"
    shutil.copytree(student, copy)
    (copy / "tokenizer_config.json").write_text((copy / "tokenizer_config.json").read_text() + "\n")
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()), indent=7))
    assert Checkpoint.open(copy).fingerprint() == before

    shard = max(copy.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Checkpoint.open(copy).fingerprint() != before
    shard.write_bytes(content)
    assert Checkpoint.open(copy).fingerprint() == before

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert Checkpoint.open(copy).fingerprint() != before


def test_refuses_what_is_no_16_bit_model(qwen3: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    def damaged(name: str) -> Path:
        return Path(shutil.copytree(qwen3, tmp_path / name))

    with pytest.raises(UserError, match="an adapter, not a model"):
        Checkpoint.open(make_adapter(qwen3, "adapter"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        Checkpoint.open(tmp_path / "empty")
    with pytest.raises(UserError, match="neither a local folder nor a model that can be downloaded"):
        Checkpoint.open("nobody/nothing")

    path = damaged("no-shard")
    gone = sorted(path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        Checkpoint.open(path)

    path = damaged("truncated")
    cut = sorted(path.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(UserError, match=cut.name):
        Checkpoint.open(path)

    path = damaged("quantized")
    file = min(path.glob("*.safetensors"))
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="stored quantized"):
        Checkpoint.open(path)

    path = damaged("no-weights")
    for file in [*path.glob("*.safetensors"), path / "model.safetensors.index.json"]:
        file.unlink()
    with pytest.raises(UserError, match=r"not \.safetensors; convert them"):
        Checkpoint.open(path)

    path = damaged("bad-config")
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        Checkpoint.open(path)


@pytest.mark.parametrize("index", ["{", "{}", "[]"])
def test_refuses_a_broken_index(qwen3: Path, tmp_path: Path, index: str) -> None:
    path = Path(shutil.copytree(qwen3, tmp_path / "copy"))
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="index"):
        Checkpoint.open(path)


# --- folding into memory -------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_fold_is_one_rounding_of_the_exact_sum(
    student: Path, make_adapter: MakeAdapter, quantization: str, tmp_path: Path
) -> None:
    folders = [make_adapter(student, name, seed=i) for i, name in enumerate("abc")]
    a, b, c = (load_adapter(f) for f in folders)
    ledger = [merge_adapters([a, b]), merge_adapters([c])]
    before = hashes(student)
    checkpoint, model = peft_student(student, quantization)
    unfolded = {name: read_weight(layer).clone() for name, layer in linear_layers(model).items()}
    folded = {f.module: f for f in fold(model, checkpoint, ledger)}

    base = stored(student)
    true_a, true_b, true_c = (true_updates(f) for f in folders)
    assert set(folded) == set(true_a) == set(linear_layers(model))
    off = entries = 0
    for name, layer in linear_layers(model).items():
        got = read_weight(layer)
        exact = base[f"{name}.weight"].double() + (true_a[name] + true_b[name]) / 2 + true_c[name]
        want = requantized(exact, quantization)
        # fp32 and fp64 sums may round to either side of a tie, which must be rare and no more than one step
        off += int(((got - want).abs() > 1e-6).sum())
        entries += got.numel()
        step = want.abs().max() * (0.35 if quantization == "nf4" else 0.01)
        assert (got - want).abs().max() <= step
        assert not torch.allclose(want, requantized(base[f"{name}.weight"].double(), quantization), atol=1e-4)
        f = folded[name]
        assert torch.equal(f.base, base[f"{name}.weight"].float())
        torch.testing.assert_close(f.update.double(), true_c[name], rtol=1e-5, atol=1e-8)
        assert torch.equal(f.change, got - unfolded[name])
        assert f.change.any()
    assert off <= (0 if quantization == "none" else entries // 1000)

    fold_checkpoint(student, ledger, tmp_path / "out")
    assert hashes(student) == before


def test_nf4_layers_keep_double_quantization(qwen3: Path) -> None:
    checkpoint, model = peft_student(qwen3)

    def check() -> None:
        layers = linear_layers(model)
        assert len(layers) == 14
        for layer in layers.values():
            assert isinstance(layer, Linear4bit)
            assert layer.weight.quant_type == "nf4"
            assert layer.weight.data.dtype == torch.uint8
            assert layer.weight.quant_state.nested is True
            assert layer.weight.quant_state.dtype == torch.float32

    check()
    list(fold(model, checkpoint, [small_update(qwen3, 0.01, 0)]))
    check()
    assert not isinstance(model.get_base_model().get_output_embeddings(), Linear4bit)


def test_int8_layers_compute_with_the_folded_weights(qwen3: Path) -> None:
    checkpoint, model = peft_student(qwen3, "int8")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits  # the layers now hold their codes in their state
        list(fold(model, checkpoint, [small_update(qwen3, 0.5, 0)]))
        after = model(ids).logits
    layers = linear_layers(model)
    assert all(isinstance(layer, Linear8bitLt) for layer in layers.values())
    dense = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32)
    for name, layer in layers.items():
        dense.get_submodule(name).weight.data = read_weight(layer)
    with torch.no_grad():
        want = dense(ids).logits
    # inputs are rounded to int8 too
    assert (after - want).norm() < 0.1 * (after - before).norm()


def test_an_older_rounds_modules_stay_when_a_later_round_skips_them(qwen3: Path) -> None:
    checkpoint, model = peft_student(qwen3, "none")
    everything, second = small_update(qwen3, 0.1, 0), small_update(qwen3, 0.1, 1)
    only = "model.layers.1.mlp.up_proj"
    one = merge_adapters([Adapter("one", {only: second.adapters[0].updates[only]})])
    for f in fold(model, checkpoint, [everything, one]):
        want = f.base + everything.delta(f.module) + (one.delta(f.module) if f.module == only else 0)
        torch.testing.assert_close(read_weight(linear_layers(model)[f.module]), want)
        assert bool(f.update.any()) is (f.module == only)


def share_kept(changes: Sequence[torch.Tensor], updates: Sequence[torch.Tensor]) -> float:
    dot = sum(float((c * u).sum()) for c, u in zip(changes, updates, strict=True))
    return dot / sum(float(u.square().sum()) for u in updates)


@pytest.mark.parametrize("size", [0.003, 0.01, 0.03])
def test_a_small_update_survives_the_fold_but_not_one_inside_4_bits(qwen3: Path, size: float) -> None:
    checkpoint, model = peft_student(qwen3)
    used = {name: read_weight(layer) for name, layer in linear_layers(model).items()}
    folded = list(fold(model, checkpoint, [small_update(qwen3, size, 0)]))
    updates = [f.update for f in folded]
    assert share_kept([f.change for f in folded], updates) == pytest.approx(1, abs=0.15)
    inside = [requantized(used[f.module] + f.update, "nf4") - used[f.module] for f in folded]
    assert share_kept(inside, updates) < 0.1


def test_five_folds_leave_the_error_of_one_rounding(qwen3: Path) -> None:
    checkpoint, model = peft_student(qwen3)
    layers = linear_layers(model)
    start = {name: read_weight(layer) for name, layer in layers.items()}
    inside = dict(start)
    ledger: list[Merged] = []
    for i in range(5):
        ledger.append(small_update(qwen3, 0.01, i))
        for f in fold(model, checkpoint, ledger):
            inside[f.module] = requantized(inside[f.module] + f.update, "nf4")
    base = stored(qwen3)
    totals = {m: sum(u.delta(m, torch.float64) for u in ledger).float() for m in layers}
    ours = one_rounding = size = 0.0
    for m, layer in layers.items():
        w = base[f"{m}.weight"].float()
        ours += float((read_weight(layer) - (w + totals[m])).square().sum())
        one_rounding += float((start[m] - w).square().sum())
        size += float(w.square().sum())
    assert 0.9 < (ours / one_rounding) ** 0.5 < 1.02
    assert (one_rounding / size) ** 0.5 < 0.12
    names = list(layers)
    assert share_kept([read_weight(layers[m]) - start[m] for m in names], [totals[m] for m in names]) > 0.95
    assert share_kept([inside[m] - start[m] for m in names], [totals[m] for m in names]) < 0.1


def test_nf4_still_trains_after_a_forward_without_gradients(student: Path) -> None:
    # bitsandbytes repacks the weight in place on a CPU with AVX512-BF16, and then gives no gradients
    checkpoint, model = peft_student(student)
    ids = torch.arange(16)[None]
    for _ in range(2):
        layers = linear_layers(model)
        before = {name: read_weight(layer) for name, layer in layers.items()}
        with torch.no_grad():
            model.eval()(ids)
        for name, layer in layers.items():
            assert layer.support_avx512bf16_for_cpu is False
            assert torch.equal(read_weight(layer), before[name])
        model.train()(ids, labels=ids).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
        assert len(grads) == 14
        assert all(g is not None and g.isfinite().all() and g.any() for g in grads.values())
        model.zero_grad()
        list(fold(model, checkpoint, [small_update(student, 0.05, 3)]))  # and again with weights that a fold made


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def in_memory(layer: Any) -> list[bytes]:
    """Every byte that a layer computes with."""
    if isinstance(layer, Linear4bit):
        state = layer.weight.quant_state
        return [bits(t) for t in (layer.weight.data, state.absmax, state.offset, state.state2.absmax)]
    if isinstance(layer, Linear8bitLt):
        return [bits(layer.weight.CB), bits(layer.weight.SCB)]
    return [bits(layer.weight)]


def rounded(value: torch.Tensor, quantization: str) -> list[bytes]:
    """The same of fp32 weights, by the libraries alone."""
    if quantization == "nf4":
        codes, state = bnb.quantize_4bit(value, quant_type="nf4", compress_statistics=True)
        return [bits(t) for t in (codes, state.absmax, state.offset, state.state2.absmax)]
    if quantization == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(value.half())
        return [bits(codes), bits(scales)]
    return [bits(value)]


@pytest.mark.parametrize("n", [0, 1, 2, 50])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_fold_is_a_plain_loop_bit_for_bit(
    qwen3: Path, quantization: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mot_lora.training.student.AHEAD", n)
    checkpoint, model = peft_student(qwen3, quantization)
    ledger, new = [small_update(qwen3, 0.02, i) for i in range(3)], [0.0, 0.3, 1.0]
    layers, base = linear_layers(model), stored(qwen3)
    before = {name: read_weight(layer).clone() for name, layer in layers.items()}
    folded = list(fold(model, checkpoint, ledger, new))
    assert {f.module for f in folded} == set(layers)
    for f in folded:
        total, update = base[f"{f.module}.weight"].float(), torch.zeros_like(f.base)
        for merged, share in zip(ledger, new, strict=True):
            total = total + merged.delta(f.module)
            update = update + merged.delta(f.module) * share
        assert in_memory(layers[f.module]) == rounded(total, quantization)
        assert bits(f.base) == bits(base[f"{f.module}.weight"].float())
        assert bits(f.update) == bits(update)
        assert bits(f.change) == bits(read_weight(layers[f.module]) - before[f.module])


def in_shards(base: Path, out: Path, *orders: Sequence[str]) -> Path:
    """A copy of a checkpoint whose shards hold these tensors, in these orders."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = stored(base)
    where = {name: f"model-{i}.safetensors" for i, order in enumerate(orders) for name in order}
    assert set(where) == set(tensors)
    for i, order in enumerate(orders):
        entries = {name: (tensors[name].dtype, tensors[name].shape) for name in order}
        write_tensors(out / f"model-{i}.safetensors", entries, ((name, tensors[name]) for name in order))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return out


@pytest.fixture
def shuffled(qwen3: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The tiny student in two shards, its tensors in any order, and the modules in the order of the disk."""
    names = sorted(stored(qwen3))
    random.Random(3).shuffle(names)
    path = in_shards(qwen3, tmp_path / "shuffled", names[:12], names[12:])
    return path, [name.removesuffix(".weight") for name in names if "_proj" in name]


def test_modules_come_as_they_lie_on_disk(qwen3: Path, shuffled: tuple[Path, list[str]]) -> None:
    path, on_disk = shuffled
    assert on_disk != sorted(on_disk)
    update = small_update(qwen3, 0.01, 0)
    checkpoint, model = peft_student(path)
    assert [f.module for f in fold(model, checkpoint, [update])] == on_disk
    same_checkpoint, same = peft_student(qwen3)
    list(fold(same, same_checkpoint, [update]))
    got, want = linear_layers(model), linear_layers(same)
    assert all(in_memory(got[module]) == in_memory(want[module]) for module in on_disk)


def reading() -> list[str]:
    """The threads that read ahead."""
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_a_shard_that_cannot_be_read_is_named(shuffled: tuple[Path, list[str]], qwen3: Path) -> None:
    path, on_disk = shuffled
    checkpoint, model = peft_student(path)
    last = checkpoint.files[f"{on_disk[-1]}.weight"]
    os.truncate(last.path, last.entries[f"{on_disk[-1]}.weight"].end - 1)
    folding = fold(model, checkpoint, [small_update(qwen3, 0.01, 0)])
    assert [next(folding).module for _ in on_disk[:-1]] == on_disk[:-1]
    with pytest.raises(UserError, match=r"model-1\.safetensors: .* is cut off") as e:
        next(folding)
    assert type(e.value) is UserError
    assert str(path) in str(e.value)
    assert on_disk[-1] in str(e.value)
    assert not reading()


def test_a_fold_that_is_left_half_way_leaves_no_thread(qwen3: Path) -> None:
    checkpoint, model = peft_student(qwen3)
    ledger = [small_update(qwen3, 0.01, 0)]
    folding = fold(model, checkpoint, ledger)
    assert not reading()
    next(folding)
    assert len(reading()) == 1
    del folding
    assert not reading()
    for _ in fold(model, checkpoint, ledger):
        break
    assert not reading()

    def broken(*_: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    good = merge_adapters(ledger[0].adapters)
    with pytest.raises(KeyboardInterrupt) as e:
        list(fold(model, checkpoint, [good, merge_adapters(ledger[0].adapters, broken)]))
    assert not reading()  # although the traceback keeps the fold
    assert e.tb


# --- its memory ----------------------------------------------------------------------------------


def dense_bytes() -> int:
    """What the matrices take that are alive anywhere."""
    tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor and o.ndim == 2 and o.is_floating_point())
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def largest(path: Path) -> int:
    """Bytes of the largest linear layer in fp32."""
    return max(t.numel() * 4 for n, t in stored(path).items() if "_proj" in n)


def test_a_fold_holds_one_module_at_a_time(qwen3: Path) -> None:
    checkpoint, model = peft_student(qwen3)
    ledger = [small_update(qwen3, 0.01, i) for i in range(3)]
    before, most = dense_bytes(), 0
    for f in fold(model, checkpoint, ledger):
        most = max(most, dense_bytes() - before)
        del f
    # what is given out, W_0, the update and the change; and what is read ahead, in bf16
    assert 3 * largest(qwen3) <= most <= (3 + AHEAD / 2) * largest(qwen3)


@pytest.mark.slow
def test_memory_does_not_grow_with_rounds_and_teachers(qwen3: Path, make_adapter: MakeAdapter) -> None:
    checkpoint, model = peft_student(qwen3)
    targets = ["up_proj", "down_proj"]
    folders = [make_adapter(qwen3, f"teacher{i}", seed=i, target_modules=targets) for i in range(3)]
    seen: list[int] = []

    def mean(deltas: torch.Tensor, _: Sequence[float]) -> torch.Tensor:
        seen.append(dense_bytes())  # in the midst of a module
        return deltas.mean(0)

    def most(rounds: int, teachers: int) -> int:
        ledger = [merge_adapters(folders[:teachers], mean) for _ in range(rounds)]
        gc.collect()
        before = dense_bytes()
        seen.clear()
        for f in fold(model, checkpoint, ledger):
            del f
        assert len(seen) == 4 * rounds
        return max(seen) - before

    few = most(rounds=1, teachers=1)
    # W_0 and what is read ahead, in bf16; the sum and the update; one teacher's update
    assert few <= (3 + (1 + AHEAD) / 2) * largest(qwen3)
    for rounds, teachers in ((5, 1), (1, 3), (5, 3)):
        # how much is read ahead at the time may differ; of the folders only one module's factors are in memory
        assert most(rounds, teachers) <= few + AHEAD * largest(qwen3) // 2


def test_folding_an_adapter_of_another_base_is_refused(qwen3: Path) -> None:
    checkpoint, model = peft_student(qwen3)
    wrong = merge_adapters(
        [Adapter("a", {"model.layers.0.self_attn.q_proj": Factors(torch.ones(1, 3), torch.ones(5, 1))})]
    )
    with pytest.raises(UserError, match=r"q_proj\.weight is \[128, 64\].*\[5, 3\]"):
        list(fold(model, checkpoint, [wrong]))


def test_what_is_no_linear_layer_is_refused_before_anything_is_folded(qwen3: Path) -> None:
    checkpoint, model = peft_student(qwen3)
    before = {name: in_memory(layer) for name, layer in linear_layers(model).items()}
    good = small_update(qwen3, 0.1, 0).adapters[0].updates
    tokens = stored(qwen3)["model.embed_tokens.weight"].shape
    embedding = Factors(torch.ones(1, tokens[1]), torch.ones(tokens[0], 1), form="embedding")
    both = merge_adapters([Adapter("a", {**good, "model.embed_tokens": embedding})])
    with pytest.raises(UserError, match=r"model\.embed_tokens is not a linear layer of the model in memory"):
        list(fold(model, checkpoint, [both]))
    assert {name: in_memory(layer) for name, layer in linear_layers(model).items()} == before
