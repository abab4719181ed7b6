"""Which files of a model folder hold the model, decided as transformers decides it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

from mot_lora.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NAMED = "transformers_weights"  # the key of a config that names another file or index
PART = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
DISTRIBUTED = "shard-?????-model-?????-of-?????.safetensors"  # what transformers takes before all others


@dataclass(frozen=True)
class WeightFiles:
    """The files of a folder that hold the model called `name`; `named` is the file or index that its config names."""

    path: Path
    name: str
    named: str | None = None

    @cached_property
    def shards(self) -> list[Path]:
        """The files that hold the model: one named by the config, one alone, those of an index, in this order."""
        if found := sorted(self.path.glob(DISTRIBUTED)):
            raise UserError(
                f"{self.path}: holds {found[0].name}, a distributed checkpoint, which transformers takes before all "
                "else; load it and save it as one model, or move it away"
            )
        if self.index:
            return sorted({self.path / file for file in self.index.values()})
        if self.named:
            return [self.path / _inside(self.named, "config.json")]
        if _is_there(self.path / SINGLE_FILE):
            return [self.path / SINGLE_FILE]
        parts = {int(m[1]): (path, int(m[2])) for path in self.beside if (m := PART.fullmatch(path.name))}
        if parts and all(set(parts) == set(range(1, n + 1)) for _, n in parts.values()):
            return [path for _, (path, _) in sorted(parts.items())]
        raise UserError(f"{self.path}: {self.why_none}")

    @cached_property
    def index(self) -> Mapping[str, str]:
        """Tensor name -> the file that is to hold it; empty for a model without an index, or one that is not used."""
        if self.named and not str(self.named).endswith(".index.json"):
            return {}
        file = self.path / (self.named or INDEX_FILE)
        if not self.named and (_is_there(self.path / SINGLE_FILE) or not _is_there(file)):
            return {}
        try:
            return {name: _inside(at, file.name) for name, at in read_object(file, "an index")["weight_map"].items()}
        except (LookupError, AttributeError) as e:
            raise UserError(f"{file}: damaged ({e!r}); download the model again") from e

    @property
    def beside(self) -> list[Path]:
        """Every .safetensors file of the folder."""
        return sorted(self.path.glob("*.safetensors"))

    @property
    def why_none(self) -> str:
        """Why none of the files here is the model."""
        others = [path.name for path in self.beside if not path.name.startswith("adapter_")]
        if others and all(map(PART.fullmatch, others)):
            return f"has no {INDEX_FILE}, and not all shards ({', '.join(others)}); download the model again"
        if others:
            return f"transformers takes its weights from {SINGLE_FILE} or an index; rename {', '.join(others)}"
        if (self.path / "adapter_config.json").exists():
            return "an adapter, not a model: it holds no weights of a full model; give its base"
        if any(self.path.glob("*.gguf")):
            return "its weights are GGUF, which is quantized; give the original 16-bit model"
        if not Path(self.name).is_dir():
            return f"the Hub's cache has no .safetensors of {self.name}; is it offline, or has it another format?"
        return (
            "its weights are not .safetensors; convert them: AutoModelForCausalLM.from_pretrained("
            "folder).save_pretrained(new_folder)"
        )

    @property
    def wanted(self) -> list[str]:
        """What to download of a model's weights."""
        single = [self.named] if self.named else [SINGLE_FILE, "model-*-of-*.safetensors"]
        return [*{*self.index.values()}] or single


def read_object(file: Path, what: str) -> dict[str, Any]:
    """The JSON object that a file holds. Errors: UserError, which says `what` it should be."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file}: not JSON ({e})") from e
    if not isinstance(found, dict):
        raise UserError(f"{file}: not {what}: it must hold an object")
    return cast("dict[str, Any]", found)


def _is_there(file: Path) -> bool:
    return file.exists() or file.is_symlink()  # a link to nothing is a file that is missing, not another's turn


def _inside(file: object, by: str) -> str:
    """A file's name as an index or a config may give it. Errors: UserError for one that leaves the folder."""
    paths = PurePosixPath(str(file)), PureWindowsPath(str(file))
    leaves = any(path.anchor or ".." in path.parts for path in paths)
    if not isinstance(file, str) or leaves or paths[0].suffix != ".safetensors":
        raise UserError(f"{by} names {file!r}, which is no .safetensors file of its folder")
    return file
