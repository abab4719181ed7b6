"""A model folder, W_0: opened read-only, one tensor at a time."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mot_lora.checkpoints.companions import NOT_DOWNLOADED, QUANTIZED, companions
from mot_lora.checkpoints.hub import locate
from mot_lora.checkpoints.quantized import method_of, why_quantized, without
from mot_lora.checkpoints.tensorfile import DTYPES, TensorFile
from mot_lora.checkpoints.weight_files import INDEX_FILE, NAMED, SINGLE_FILE, WeightFiles, read_object
from mot_lora.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """A model folder of safetensors shards, read one tensor at a time and never written.

    Its files are chosen as transformers chooses them; `remarks` name what was left out.

    Errors: UserError for a folder that is no model, an adapter, a .bin checkpoint or one that is already quantized.

    >>> Checkpoint.open("Qwen/Qwen3-0.6B").tensor("model.norm.weight").shape  # doctest: +SKIP
    torch.Size([1024])
    """

    path: Path
    name: str

    @classmethod
    def open(cls, name: str | Path, weights: bool = True) -> "Checkpoint":
        """Open a local folder, or a Hub model, which is downloaded once into the Hub's cache, without its weights where
        `weights` is False. No code that comes with it is run.
        """
        path = locate(name, ignore=NOT_DOWNLOADED)
        if not (path / "config.json").exists():
            what = "an adapter, not a model" if (path / "adapter_config.json").exists() else "not a model folder"
            raise UserError(f"{name}: {what}: it has no config.json; give the folder or Hub name of the full model")
        checkpoint = cls(path, str(name))
        if weights:
            locate(name, checkpoint.weights.wanted)
        checkpoint._refuse_quantized(weights)
        if weights and not checkpoint.files:
            raise UserError(f"{name}: its weights are empty")
        return checkpoint

    @cached_property
    def stored_config(self) -> dict[str, Any]:
        """The config as it is stored."""
        return read_object(self.path / "config.json", "a model's config")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config without what is not true of the weights that are read: a quantization, a file of another name."""
        return {key: value for key, value in without(self.stored_config).items() if key != NAMED}

    def _refuse_quantized(self, weights: bool) -> None:
        method = method_of(self.stored_config)
        # where the config says nothing, the weights are looked at once they are here
        seen = self._tensors if weights else self._tensors_to_come() if method else None
        if seen and (why := why_quantized(seen)):
            raise UserError(
                f"{self.name}: its weights are stored quantized ({f'{method}: ' if method else ''}{why}), so small "
                "updates would be lost in every fold; give the original 16-bit model, it is quantized in memory"
            )
        if method == "bitnet":
            raise UserError(
                f"{self.name}: BitNet rounds its weights to three values whenever it runs, so small updates would be "
                "lost; give a model without it"
            )

    def _tensors_to_come(self) -> Mapping[str, tuple[torch.dtype, Sequence[int]]]:
        """The formats and shapes of weights that may not be downloaded yet; empty where they are unknown."""
        from huggingface_hub import get_safetensors_metadata

        if Path(self.name).is_dir():
            return self._tensors if any(self.weights.beside) else {}
        try:
            files = get_safetensors_metadata(self.name).files_metadata.values()
        except Exception:  # offline, gated, not safetensors: an error once the weights are opened
            return {}
        return {n: (DTYPES.get(t.dtype, torch.uint8), t.shape) for file in files for n, t in file.tensors.items()}

    @cached_property
    def weights(self) -> WeightFiles:
        """Which of the folder's files hold the model."""
        return WeightFiles(self.path, self.name, self.stored_config.get(NAMED))

    # --- its tensors -------------------------------------------------------------------------------------

    @cached_property
    def files(self) -> dict[str, TensorFile]:
        """Tensor name -> the shard that holds it."""
        files = {name: file for file in map(TensorFile, self.weights.shards) for name in file.entries}
        missing = sorted(name for name in self.weights.index if name not in files and not self._may_lack(name))
        if missing:
            raise UserError(
                f"{self.path}: its index lists {missing[0]} in {self.weights.index[missing[0]]}, which does not hold "
                "it; download the model again"
            )
        return files

    @property
    def _tensors(self) -> Mapping[str, tuple[torch.dtype, Sequence[int]]]:
        entries = {name: file.entries[name] for name, file in self.files.items()}
        return {name: (entry.dtype, entry.shape) for name, entry in entries.items()}

    def _may_lack(self, name: str) -> bool:
        """Whether a tensor is a head that is tied to the embedding, and so need not be stored."""
        inner: list[Any] = [v for k, v in self.config.items() if k.endswith("_config") and isinstance(v, dict)]
        return name.endswith("lm_head.weight") and any(c.get("tie_word_embeddings") for c in (self.config, *inner))

    @property
    def remarks(self) -> list[str]:
        """What the folder holds that is not part of the model and is left out, a line each."""
        shards = set(self.weights.shards)
        beside = [
            path.name for path in self.weights.beside if path not in shards and not path.name.startswith("adapter_")
        ]
        remarks = list[str]()
        if beside:
            used = self.weights.shards[0].name if len(shards) == 1 else f"what {INDEX_FILE} lists"
            others = beside[0] + (f" and {len(beside) - 1} more" if len(beside) > 1 else "")
            remarks.append(f"{self.name}: {used} is the model, as for transformers; {others} beside it is not read")
        if len(shards) > 1 and not self.weights.index:
            remarks.append(f"{self.name}: has no {INDEX_FILE}; its {len(shards)} numbered shards are the model")
        if any((self.path / f"adapter_{what}").exists() for what in ("config.json", SINGLE_FILE)):
            remarks.append(f"{self.name}: the adapter in the model's folder is no part of it and is not read")
        old = [name for name in QUANTIZED if (self.path / name).exists()]
        if method := method_of(self.stored_config):
            old.insert(0, f"the quantization ({method}) in config.json")
        if old:
            remarks.append(f"{self.name}: {' and '.join(old)} left out: the weights are not quantized")
        return remarks

    @property
    def companions(self) -> list[Path]:
        """The files that travel with the weights, relative to the folder, without the config, which describes them."""
        return [file for file in companions(self.path) if file != Path("config.json")]

    @contextmanager
    def alone(self) -> Generator[Path]:
        """A folder of links in which any loader finds this model and nothing else."""
        # Windows does not delete what is still read, and it may be, by a loader that maps it
        with tempfile.TemporaryDirectory(prefix="mot-lora-", ignore_cleanup_errors=True) as parent:
            folder = Path(parent) / self.path.absolute().name  # by which transformers keeps the code of a model
            folder.mkdir()
            for file in self.companions:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                _link(folder / file, self.path / file)
            for shard in self.weights.shards:
                _link(folder / shard.name, shard)
            size = sum(file.entries[name].end - file.entries[name].start for name, file in self.files.items())
            describe(folder, self.config, {name: file.path.name for name, file in self.files.items()}, size)
            yield folder

    def tensor(self, name: str, device: str | torch.device = "cpu", pinned: bool = False) -> Tensor:
        """One tensor as it is stored (see `TensorFile.read`)."""
        return self.files[name].read(name, device, pinned)

    def not_finite(self) -> str | None:
        """The first tensor found that holds an infinity or a NaN; reads all of the model."""
        found = (file.not_finite() for file in {f.path: f for f in self.files.values()}.values())
        return next((name for name in found if name), None)

    def where(self, name: str) -> tuple[Path, int]:
        """The shard that holds a tensor and its offset there; sorted by these, tensors are in their order on disk."""
        file = self.files[name]
        return file.path, file.entries[name].start

    def fingerprint(self) -> str:
        """A hash of the config and of each shard's size, header and last MiB: cheap, and different for two models."""
        digest = hashlib.sha256(json.dumps(self.stored_config, sort_keys=True).encode())
        for shard in sorted({file.path for file in self.files.values()}):
            with shard.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                size = shard.stat().st_size
                digest.update(f"{shard.name} {size}".encode() + file.read(header))
                file.seek(max(8 + header, size - 2**20))
                digest.update(file.read())
        return digest.hexdigest()[:16]

    def fingerprints(self) -> dict[str, str]:
        """What identifies a student: its fingerprint, and a hash of samples of every tensor, which also differs when
        only some layers were trained further.
        """
        digest = hashlib.sha256()
        for name in sorted(self.files, key=self.where):
            digest.update(name.encode() + self.files[name].sample(name))
        return {"student": self.fingerprint(), "weights": digest.hexdigest()[:16]}


def describe(folder: Path, config: Mapping[str, Any], where: Mapping[str, str], size: int) -> None:
    """Write a model folder's config, and an index of which file holds each tensor unless one holds all."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")
    if set(where.values()) != {SINGLE_FILE}:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8", newline="\n")


def _link(link: Path, to: Path) -> None:
    """A file under another name; a copy where the system allows no links, as Windows outside its developer mode."""
    try:
        link.symlink_to(to.absolute())
    except OSError:
        try:
            link.hardlink_to(to.resolve())
        except OSError:  # on another disk
            shutil.copyfile(to, link)
