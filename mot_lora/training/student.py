"""The student in memory, quantized, and the fold of W_0 + the ledger into it."""

import logging
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.loading import without_bars
from mot_lora.checkpoints.placement import Placement
from mot_lora.checkpoints.prefetch import prefetch
from mot_lora.checkpoints.weights import quantization_config, read_weight, write_weight
from mot_lora.config import Config
from mot_lora.errors import NO_MEMORY, UserError, enough_memory, is_out_of_memory
from mot_lora.merging.merged import Merged
from mot_lora.records import DeviceRecord
from mot_lora.training.attention import needs_repeating, repeat_shared_heads
from mot_lora.training.driver import driver_version, expandable_segments, why_unused

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports a cast for each int8 product


def device_of(config: Config) -> torch.device:
    """The device that a config requests, a GPU with its index.

    Errors: UserError for `cuda` without a GPU, and for `auto` with a GPU that torch cannot use.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about a driver that is too old, which is reported below
        has_gpu = config.device != "cpu" and torch.cuda.is_available()
    if has_gpu:
        if not torch.cuda.is_initialized():
            expandable_segments()
        return torch.device("cuda", torch.cuda.current_device())
    why = None if config.device == "cpu" else why_unused(driver_version(), torch.version.cuda)
    if config.device == "cuda":
        why = why or "torch finds no CUDA GPU"
        raise UserError(f"device `cuda`: {why}; to run on the CPU, set device=cpu")
    if why:
        raise UserError(f"device `auto`: {why}; to run on the CPU, set device=cpu")
    return torch.device("cpu")


def describe(device: torch.device) -> DeviceRecord:
    """A device and the dtype in which a student computes there."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return DeviceRecord(kind=device.type, name=name, dtype=str(dtype_of(device)).removeprefix("torch."))


def dtype_of(device: torch.device) -> torch.dtype:
    """The dtype in which a student computes: bf16, on GPUs before Ampere fp16, on a CPU fp32."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_model(
    checkpoint: Checkpoint, quantization: str, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the student: linear layers in NF4 with double quantization, in int8 or unquantized; the rest in the device's
    dtype (`dtype_of`).

    Errors: UserError if it does not fit.
    """
    dtype = dtype_of(device)
    smaller = "a smaller student" if quantization == "nf4" else "quantization: nf4, or a smaller student"
    free = f"stop other programs that use {device}, or start a run with {smaller}"
    with enough_memory(f"loading {checkpoint.name} in {quantization}", free):
        model = from_pretrained(
            checkpoint,
            device,
            dtype,
            trust_remote_code,
            quantization_config=quantization_config(quantization, dtype),
        )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # the AVX512-BF16 path repacks the weight in place; then it can be neither read nor trained through
            cast("Any", module).support_avx512bf16_for_cpu = False
    if device.type == "cuda" and needs_repeating(torch.cuda.get_device_capability(device)):
        repeat_shared_heads(model)
    model.config.use_cache = True
    # keep only the end tokens: the checkpoint's temperature, repetition penalty, ... would be mixed into our settings
    original = cast("Any", model.generation_config)
    model.generation_config = GenerationConfig(eos_token_id=original.eos_token_id if original else None)
    return model


def from_pretrained(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False, **settings: Any
) -> PreTrainedModel:
    """Load a checkpoint with transformers, without its progress bar; its log is shown unless memory runs out.

    Errors: torch.OutOfMemoryError, which transformers hides in a log with a traceback for every tensor.
    """
    logger, reports = logging.getLogger("transformers.modeling_utils"), list[logging.LogRecord]()

    def keep(record: logging.LogRecord) -> bool:
        reports.append(record)
        return False

    before = _times_out_of_memory(device)
    logger.addFilter(keep)
    try:
        with warnings.catch_warnings(), without_bars(), checkpoint.alone() as folder:
            warnings.simplefilter("ignore", FutureWarning)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device},
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                **settings,
            )
        model.config._name_or_path = model.name_or_path = str(checkpoint.path)  # an adapter records it as its base
        return model
    except RuntimeError as e:
        lines = [line for r in reports for line in r.getMessage().splitlines() if NO_MEMORY.search(line)]
        if not (lines or _times_out_of_memory(device) > before or is_out_of_memory(e)):
            raise
        reports.clear()
        raise torch.OutOfMemoryError(next(iter(lines), str(e)).strip()) from e
    finally:
        logger.removeFilter(keep)
        for record in reports:
            logger.handle(record)


def _times_out_of_memory(device: torch.device) -> int:
    return torch.cuda.memory_stats(device).get("num_ooms", 0) if device.type == "cuda" else 0


# --- folding -------------------------------------------------------------------------------------

AHEAD = 2  # modules of W_0 that are prefetched


@dataclass(frozen=True)
class FoldedModule:
    """One module of a fold, fp32, [out, in]: W_0, the new update D, and the change of the quantized weights."""

    module: str
    base: Tensor
    update: Tensor
    change: Tensor


def fold(
    model: PeftModel, checkpoint: Checkpoint, ledger: Sequence[Merged], new: Sequence[float] = ()
) -> Iterator[FoldedModule]:
    """Set the model's weights to round(W_0 + sum of the ledger), module by module.

    The sum is taken in fp32 from the checkpoint, never from the rounded weights in memory. Yields each module with the
    new part of the ledger, for measuring: its last update, or the share of each update given in `new`. Nothing is
    folded unless the iterator is consumed. Modules are folded in the order of the checkpoint, and the next ones are
    prefetched: memory is bounded by a few modules, whatever the size of the model and the ledger.

    Errors: UserError, before anything is folded, for an update of a module that is not a linear layer of the model; for
    a shard that cannot be read; and if memory runs out.

    >>> survived = [f.change.norm() / f.update.norm() for f in fold(model, checkpoint, ledger)]  # doctest: +SKIP
    """
    layers = {
        name: layer.get_base_layer()
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }
    new = new or [0.0] * (len(ledger) - 1) + [1.0]
    placement = Placement.of(checkpoint, ledger)
    held = {m: names for unit, names in placement.places.items() for m in placement.units[unit]}
    for module in placement.shapes:
        if not held[module] or module not in layers:
            raise UserError(f"{checkpoint.name}: {module} is not a linear layer of the model in memory")

    def read(module: str) -> Tensor:
        name = held[module][0]
        if placement.stored(name).shape != placement.shapes[module]:  # stored in one tensor with other modules
            return placement.layout.weight(module)
        return checkpoint.tensor(name, pinned=cast("Tensor", layers[module].weight).is_cuda)

    modules = sorted(held, key=lambda module: checkpoint.where(held[module][0]))
    with closing(prefetch(read, modules, AHEAD)) as stored:
        for module in modules:
            free = f"stop other programs that use {model.device}; the same command resumes"
            with enough_memory(f"folding {module}", free):
                yield _fold_module(module, layers[module], next(stored), ledger, new)


def _fold_module(
    module: str, layer: nn.Module, stored: Tensor, ledger: Sequence[Merged], new: Sequence[float]
) -> FoldedModule:
    device = cast("Tensor", layer.weight).device
    stored = stored.to(device, non_blocking=True)
    total = stored.to(torch.float32, copy=True)
    update = torch.zeros_like(total)
    for merged, share in zip(ledger, new, strict=True):
        if module in merged.shapes:
            delta = merged.delta(module).to(device)
            total += delta
            if share:
                update += delta if share == 1 else delta * share
            del delta  # frees it before the next one is made
    change = -read_weight(layer)  # the minus copies it: an unquantized weight is read as is, and written in place
    write_weight(layer, total)
    del total
    change += read_weight(layer)
    return FoldedModule(module, stored.float(), update, change)
