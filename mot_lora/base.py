"""The frozen student W_0: opened read-only, folded with the ledger into memory or out to shards."""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mot_lora.errors import UserError
from mot_lora.merge import Merged
from mot_lora.progress import Progress, silent

INDEX_FILE = "model.safetensors.index.json"
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model")  # what travels with the weights: tokenizer, templates, config

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports a cast for each int8 product
transformers_logging.disable_progress_bar()  # a bar of its own for each loaded tensor


@dataclass(frozen=True)
class Checkpoint:
    """A model folder of safetensors shards, read one tensor at a time and never written.

    Errors: UserError for a folder that is no model, an adapter, a .bin checkpoint or one that is already quantized.

    >>> Checkpoint.open("Qwen/Qwen3-0.6B").tensor("model.norm.weight").shape  # doctest: +SKIP
    torch.Size([1024])
    """

    path: Path
    name: str

    @classmethod
    def open(cls, name: str | Path) -> "Checkpoint":
        """Open a local folder, or a Hub model, which is downloaded once into the Hub's cache."""
        path = Path(name)
        if not path.is_dir():
            path = _download(str(name))
        if not (path / "config.json").exists():
            what = "an adapter, not a model" if (path / "adapter_config.json").exists() else "not a model folder"
            raise UserError(f"{name}: {what}: it has no config.json; give the folder or Hub name of the full model")
        checkpoint = cls(path, str(name))
        if "quantization_config" in checkpoint.config:
            raise UserError(
                f"{name}: its weights are stored quantized, so small updates would be lost in every fold; "
                "give the original 16-bit model, it is quantized in memory"
            )
        if not checkpoint.files:  # looked up here, so that a missing or damaged shard is found before any work
            raise UserError(f"{name}: its weights are empty")
        return checkpoint

    @cached_property
    def config(self) -> dict[str, Any]:
        try:
            return cast("dict[str, Any]", json.loads((self.path / "config.json").read_text(encoding="utf-8")))
        except ValueError as e:
            raise UserError(f"{self.path / 'config.json'}: not JSON ({e})") from e

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the shard that holds it."""
        shards = sorted(self.path.glob("*.safetensors"))
        if (self.path / INDEX_FILE).exists():
            index = json.loads((self.path / INDEX_FILE).read_text(encoding="utf-8"))
            shards = sorted({self.path / file for file in index["weight_map"].values()})
        if not shards:
            raise UserError(f"{self.path}: has no .safetensors; save it again with save_pretrained of transformers")
        found: dict[str, Path] = {}
        for shard in shards:
            try:
                with safe_open(shard, "pt") as file:
                    found |= dict.fromkeys(file.keys(), shard)
            except Exception as e:  # safetensors raises its own and OSError alike
                raise UserError(f"{shard}: missing or damaged ({e}); download the model again") from e
        return found

    def tensor(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """One tensor as it is stored."""
        with safe_open(self.files[name], "pt", device=str(device)) as file:
            return file.get_tensor(name)

    def fingerprint(self) -> str:
        """A hash of the config and of each shard's size, header and last MiB: cheap, and it tells two models apart."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in sorted(set(self.files.values())):
            with shard.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                size = shard.stat().st_size
                digest.update(f"{shard.name} {size}".encode() + file.read(header))
                file.seek(max(8 + header, size - 2**20))
                digest.update(file.read())
        return digest.hexdigest()[:16]


def load_model(checkpoint: Checkpoint, quantization: str, device: torch.device) -> PreTrainedModel:
    """The student in memory: linear layers in NF4 with double quantization, int8, or as they are; the rest in
    bf16 on a GPU and fp32 on a CPU.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = {
        "nf4": lambda: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "none": lambda: None,
    }[quantization]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, quantization_config=config, dtype=dtype, device_map={"": device}
        )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # its AVX512-BF16 path repacks the weight in place, after which it can be neither read nor trained through
            cast("Any", module).support_avx512bf16_for_cpu = False
    model.config.use_cache = True
    return model


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
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror or e}") from e
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
    if len(set(checkpoint.files.values())) > 1:
        index = {
            "metadata": {"total_size": total_size},
            "weight_map": {name: file.name for name, file in sorted(checkpoint.files.items())},
        }
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[*COMPANIONS, "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"{name}: neither a folder here nor a model on the Hub that can be had now ({reason})") from e
