"""PEFT LoRA adapters from folders and from the Hub."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import AfterValidator, BaseModel, ValidationError

from mot_lora.adapters.stored import CONFIG_FILE, Base, StoredAdapter
from mot_lora.adapters.updates import updates
from mot_lora.adapters.wrappers import unwrapped_config
from mot_lora.checkpoints.architecture import TEXT
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.hub import locate
from mot_lora.checkpoints.layout import Layout
from mot_lora.checkpoints.tensorfile import TensorFile
from mot_lora.errors import UserError
from mot_lora.merging.lowrank import Adapter
from mot_lora.patterns import compiled

WEIGHTS_FILE = "adapter_model.safetensors"
DEEPER = 4  # adapters of a folder that are named, those of the last steps first


def _is_pattern(text: str) -> str:
    compiled(text)
    return text


Pattern = Annotated[str, AfterValidator(_is_pattern)]


class _Asked(BaseModel):
    """The settings of an adapter's config that are read, in the types that PEFT writes."""

    r: int | None = None
    lora_alpha: float | None = None
    rank_pattern: dict[Pattern, int] | None = None
    alpha_pattern: dict[Pattern, float] | None = None
    base_model_name_or_path: str | None = None
    target_modules: Pattern | list[str] | None = None
    exclude_modules: Pattern | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[Pattern, list[int]] | None = None
    bias: str = "none"


def load_adapter(
    path: str | Path,
    name: str | None = None,
    device: str | torch.device = "cpu",
    base: str | Path | Checkpoint | None = None,
) -> Adapter:
    """Read a PEFT LoRA folder, or a Hub adapter. Every tensor in it is used, or the adapter is refused.

    D = alpha/r * B @ A, alpha/sqrt(r) * B @ A for rsLoRA; rank_pattern and alpha_pattern count. Tensors are read when
    their module is asked for, so an open adapter takes no memory. DoRA, modules_to_save, trainable_token_indices and
    several target_parameters of one module need the base; it is `base`, or the folder that the adapter itself names.
    The adapter is named after its folder unless `name` is given.

    Errors: UserError, which names the file, and the key or setting that cannot be merged exactly.

    >>> load_adapter("runs/demo/round-001/steps").name  # doctest: +SKIP
    'steps'
    """
    if Path(path).is_file():
        raise UserError(f"{path}: a file, not an adapter folder; name the folder that holds it")
    folder = locate(path, [CONFIG_FILE, WEIGHTS_FILE], "adapter")
    config = _read_config(folder)
    file = folder / WEIGHTS_FILE
    if not file.exists():
        raise UserError(
            f"{folder}: has no {WEIGHTS_FILE}; convert a .bin by loading it in PEFT and "
            "model.save_pretrained(new_folder, safe_serialization=True)"
        )
    tensors = TensorFile(file)
    if bad := tensors.not_finite():
        raise UserError(f"{file}: {bad} holds numbers that are not finite; train it again")

    def opened() -> Base:
        said = base or config.get("base_model_name_or_path")
        if isinstance(said, Checkpoint):
            return Layout(said)
        if base is None and not (said and Path(said).is_dir()):
            raise UserError(f"{folder}: needs its base's weights to be merged; name it with base= or --base")
        return Layout(Checkpoint.open(cast("str", said)))

    shapes = {key: entry.shape for key, entry in tensors.entries.items()}
    config = unwrapped_config(config, shapes)
    stored = StoredAdapter(str(file), config, shapes, lambda key: tensors.read(key, device), opened)
    return Adapter(name or Path(path).resolve().name, updates(stored), config.get("base_model_name_or_path"), config)


def _deeper(folder: Path) -> str:
    """Where the adapters lie that a folder holds, as trainers and PEFT's named adapters leave them."""
    found = {f.parent for depth in ("*", "*/*", "*/*/*") for f in folder.glob(f"{depth}/{CONFIG_FILE}")}
    if not found:
        return ""
    last = sorted(found, key=lambda f: ([int(n) for n in re.findall(r"\d+", f.name)], str(f)), reverse=True)
    more = f" and {len(last) - DEEPER} more" if len(last) > DEEPER else ""
    return f"; name an adapter that lies in it: {', '.join(map(str, last[:DEEPER]))}{more}"


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.exists():
        what = "a full model, not an adapter" if (path / "config.json").exists() else "not an adapter folder"
        raise UserError(f"{path}: {what}: it has no {CONFIG_FILE}{_deeper(path)}")
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file}: not JSON ({e})") from e
    if not isinstance(config, dict) or cast("dict[str, Any]", config).get("peft_type") != "LORA":
        raise UserError(f"{file}: not a LoRA adapter; only peft_type LORA can be merged")
    try:
        _Asked.model_validate(config)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        raise UserError(f"{file}: {first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from e
    return cast("dict[str, Any]", config)


def two_names(adapters: Sequence[Adapter]) -> tuple[tuple[Adapter, str], tuple[Adapter, str]] | None:
    """Modules of two adapters that may be the same one under the names of two model classes or releases."""
    seen: dict[str, tuple[Adapter, str]] = {}
    for adapter in adapters:
        mine = {TEXT.sub("", module): module for module in adapter.updates}
        for rest, module in mine.items():
            other, name = seen.get(rest, (adapter, module))
            if name not in adapter.updates and module not in other.updates:
                return (other, name), (adapter, module)
        seen = {rest: (adapter, module) for rest, module in mine.items()} | seen
    return None


def check_names(adapters: Sequence[Adapter]) -> None:
    """UserError where two adapters may call one module by two names, which only their base can show."""
    if clash := two_names(adapters):
        (a, one), (b, other) = clash
        raise UserError(
            f"adapter `{a.name}` has {one} where `{b.name}` has {other}: these may be one module under "
            "the names of two model classes or releases; name their base with base= or --base"
        )
