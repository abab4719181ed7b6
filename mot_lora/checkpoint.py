"""A model folder, W_0: opened read-only, one tensor at a time."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mot_lora.errors import UserError
from mot_lora.tensorfile import TensorFile

INDEX_FILE = "model.safetensors.index.json"
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model")  # what travels with the weights: tokenizer, templates, config


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
    def open(cls, name: str | Path, trust_remote_code: bool = False, weights: bool = True) -> "Checkpoint":
        """Open a local folder, or a Hub model, which is downloaded once into the Hub's cache: its weights, unless they
        are not wanted yet; its code if trusted.
        """
        wanted = [*(["*.safetensors"] if weights else []), *(["*.py"] if trust_remote_code else [])]
        path = locate(name, [*COMPANIONS, *wanted])
        if not (path / "config.json").exists():
            what = "an adapter, not a model" if (path / "adapter_config.json").exists() else "not a model folder"
            raise UserError(f"{name}: {what}: it has no config.json; give the folder or Hub name of the full model")
        checkpoint = cls(path, str(name))
        if "quantization_config" in checkpoint.config:
            raise UserError(
                f"{name}: its weights are stored quantized, so small updates would be lost in every fold; "
                "give the original 16-bit model, it is quantized in memory"
            )
        if (
            weights and not checkpoint.files
        ):  # looked up here, so that a missing or damaged shard is found before any work
            raise UserError(f"{name}: its weights are empty")
        return checkpoint

    @cached_property
    def config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        try:
            config: Any = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"{file}: not JSON ({e})") from e
        if not isinstance(config, dict):
            raise UserError(f"{file}: not a model's config: it must hold an object")
        return cast("dict[str, Any]", config)

    @cached_property
    def files(self) -> dict[str, TensorFile]:
        """Tensor name -> the shard that holds it."""
        shards = sorted(self.path.glob("*.safetensors"))
        if (self.path / INDEX_FILE).exists():
            try:
                index = json.loads((self.path / INDEX_FILE).read_text(encoding="utf-8"))
                shards = sorted({self.path / _plain(file) for file in index["weight_map"].values()})
            except UserError:
                raise
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
                raise UserError(f"{self.path / INDEX_FILE}: damaged ({e!r}); download the model again") from e
        if not shards:
            raise UserError(
                f"{self.path}: its weights are not .safetensors; convert them: AutoModelForCausalLM.from_pretrained("
                "folder).save_pretrained(new_folder)"
            )
        return {name: file for file in map(TensorFile, shards) for name in file.entries}

    def tensor(self, name: str, device: str | torch.device = "cpu", pinned: bool = False) -> Tensor:
        """One tensor as it is stored (see `TensorFile.read`)."""
        return self.files[name].read(name, device, pinned)

    def where(self, name: str) -> tuple[Path, int]:
        """The shard that holds a tensor, and its place in it: tensors in this order lie one after the other on disk."""
        file = self.files[name]
        return file.path, file.entries[name].start

    def fingerprint(self) -> str:
        """A hash of the config and of each shard's size, header and last MiB: cheap, and it tells two models apart."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in sorted({file.path for file in self.files.values()}):
            with shard.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                size = shard.stat().st_size
                digest.update(f"{shard.name} {size}".encode() + file.read(header))
                file.seek(max(8 + header, size - 2**20))
                digest.update(file.read())
        return digest.hexdigest()[:16]


def _plain(file: str) -> str:
    """A file's name as an index may give it. Errors: UserError for one that leaves the folder."""
    if Path(file).name != file or not file.endswith(".safetensors"):
        raise UserError(f"{INDEX_FILE} names {file!r}, which is no .safetensors file of its folder")
    return file


def locate(name: str | Path, patterns: list[str], kind: str = "model") -> Path:
    """A local folder, or that of a Hub repository, with its files that match the patterns downloaded."""
    path = Path(name)
    return path if path.is_dir() else download(str(name), patterns, kind)


def download(name: str, patterns: list[str], kind: str = "model") -> Path:
    """The folder of a Hub repository, its files that match the patterns downloaded once into the Hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"{name}: neither a folder here nor a {kind} on the Hub that can be had now ({reason})") from e
