"""The student in memory, quantized; and folding W_0 + the ledger, into it or out to shards."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mot_lora.checkpoint import COMPANIONS, INDEX_FILE, Checkpoint
from mot_lora.errors import UserError
from mot_lora.merged import Merged
from mot_lora.progress import Progress, silent

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports a cast for each int8 product


def load_model(checkpoint: Checkpoint, quantization: str, device: torch.device) -> PreTrainedModel:
    """The student in memory: linear layers in NF4 with double quantization, int8, or as they are; the rest in
    bf16 on a GPU and fp32 on a CPU.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    with warnings.catch_warnings(), _without_bars():
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, quantization_config=config, dtype=dtype, device_map={"": device}
        )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # its AVX512-BF16 path repacks the weight in place, after which it can be neither read nor trained through
            cast("Any", module).support_avx512bf16_for_cpu = False
    model.config.use_cache = True
    # the checkpoint's settings for chatting (temperature, repetition penalty) would be mixed into ours; keep its ends
    said = cast("Any", model.generation_config)
    model.generation_config = GenerationConfig(eos_token_id=said.eos_token_id if said else None)
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep back the bar that transformers shows for loaded tensors; progress has its own seam here."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# --- one layer's weights -------------------------------------------------------------------------


def read_weight(layer: nn.Module) -> Tensor:
    """The weights that a linear layer computes with, dequantized, [out, in] in fp32."""
    weight = cast("Any", layer.weight)
    if isinstance(layer, Linear4bit):
        return bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    if isinstance(layer, Linear8bitLt):
        state = cast("Any", layer.state)
        codes, scales = (weight.CB, weight.SCB) if weight.CB is not None else (state.CB, state.SCB)
        return bnb.int8_vectorwise_dequant(codes, scales).float()
    return weight.detach().float()


def write_weight(layer: nn.Module, value: Tensor) -> None:
    """Round fp32 weights [out, in] once, to the format that the layer has, in place."""
    old = cast("Any", layer.weight)
    if isinstance(layer, Linear4bit):
        new = cast("Any", Params4bit)(
            value.float().contiguous(),
            requires_grad=False,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=layer,
        ).to(old.device)
        new.quant_state.dtype = old.quant_state.dtype
        layer.weight = new
    elif isinstance(layer, Linear8bitLt):
        layer.weight = cast("Any", Int8Params)(value.half(), requires_grad=False, has_fp16_weights=False).to(old.device)
        layer.state.CB = layer.state.SCB = None  # the layer takes them from the new weight at its next forward
    else:
        with torch.no_grad():
            old.copy_(value)


# --- folding -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldedModule:
    """One module of a fold, fp32, [out, in]: W_0, the last update D, and what changed in the weights in use."""

    module: str
    base: Tensor
    update: Tensor
    change: Tensor


def fold(model: PeftModel, checkpoint: Checkpoint, ledger: Sequence[Merged]) -> Iterator[FoldedModule]:
    """Set the model's weights to round(W_0 + sum of the ledger), module by module.

    The sum is taken in fp32 from the checkpoint, never from the rounded weights in use. Yields each module with the
    ledger's last update, for measuring; nothing is folded unless the iterator is consumed.

    >>> survived = [f.change.norm() / f.update.norm() for f in fold(model, checkpoint, ledger)]  # doctest: +SKIP
    """
    layers = {
        name: layer.get_base_layer()
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }
    for module in _modules(checkpoint, ledger):
        layer = layers[module]
        device = cast("Tensor", layer.weight).device
        base = checkpoint.tensor(f"{module}.weight", device).float()
        total, update = base.clone(), torch.zeros_like(base)
        for merged in ledger:
            update = merged.delta(module).to(device) if module in merged.shapes else torch.zeros_like(base)
            total += update
        before = read_weight(layer)
        write_weight(layer, total)
        yield FoldedModule(module, base, update, read_weight(layer) - before)


def fold_checkpoint(
    base: str | Path | Checkpoint,
    merged: Merged | Sequence[Merged],
    out: str | Path,
    dtype: torch.dtype | None = None,
    card: str | None = None,
    progress: Progress = silent,
) -> Path:
    """Write W_0 + the merged updates as a full checkpoint that transformers loads, shard by shard.

    Each weight is summed in fp64 and rounded once, to `dtype` or to what the base is stored in. Memory is bounded by
    one shard. All is written to a temporary folder beside `out` and renamed: `out` is whole or not there.

    Errors: UserError when `out` exists, or an update fits no tensor of the base.

    >>> fold_checkpoint("Qwen/Qwen3-0.6B", merge_adapters([a, b]), "merged")  # doctest: +SKIP
    """
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    ledger = [merged] if isinstance(merged, Merged) else list(merged)
    modules = {f"{m}.weight" for m in _modules(checkpoint, ledger)}
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists; choose another --out, nothing is overwritten")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        total_size, done = 0, 0
        for shard in sorted(set(checkpoint.files.values())):
            tensors: dict[str, Tensor] = {}
            for name in (n for n, file in checkpoint.files.items() if file == shard):
                tensor = checkpoint.tensor(name)
                to = dtype or tensor.dtype
                if name in modules:
                    module, exact = name.removesuffix(".weight"), tensor.double()
                    for m in ledger:
                        if module in m.shapes:
                            exact += m.delta(module, torch.float64)
                    tensor = exact
                tensors[name] = tensor.to(to) if tensor.is_floating_point() else tensor
                total_size += tensors[name].nbytes
                done += 1
                progress("write", done, len(checkpoint.files))
            save_file(tensors, partial / shard.name, metadata={"format": "pt"})
        _copy_companions(checkpoint, partial, dtype, total_size)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except (OSError, SafetensorError) as e:  # safetensors has its own for a disk that is full
        raise UserError(f"{out}: cannot be written: {getattr(e, 'strerror', None) or e}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _modules(checkpoint: Checkpoint, ledger: Sequence[Merged]) -> list[str]:
    """The modules that the ledger updates, each checked against the checkpoint."""
    shapes = {module: shape for merged in ledger for module, shape in merged.shapes.items()}
    for module, shape in shapes.items():
        file = checkpoint.files.get(f"{module}.weight")
        if file is None:
            raise UserError(f"{checkpoint.name}: has no {module}.weight, which an adapter updates; is it their base?")
        with safe_open(file, "pt") as handle:
            stored = handle.get_slice(f"{module}.weight").get_shape()
        if list(shape) != stored:
            raise UserError(
                f"{checkpoint.name}: {module}.weight is {stored}, an adapter's update of it {list(shape)}; "
                "is it their base?"
            )
    return sorted(shapes)


def _copy_companions(checkpoint: Checkpoint, out: Path, dtype: torch.dtype | None, total_size: int) -> None:
    for pattern in COMPANIONS:
        for file in checkpoint.path.glob(pattern):
            if file.name not in ("config.json", INDEX_FILE):
                shutil.copyfile(file, out / file.name)
    config = dict(checkpoint.config)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if {file.name for file in checkpoint.files.values()} != {"model.safetensors"}:
        index = {
            "metadata": {"total_size": total_size},
            "weight_map": {name: file.name for name, file in sorted(checkpoint.files.items())},
        }
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
