"""Names of an adapter's tensors as wrappers around a model leave them, brought to PEFT's own."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

from mot_lora.errors import UserError

PREFIX = "base_model.model."
# torch.compile, FSDP, activation checkpointing, fairscale, Opacus, Lightning: each one module around another
WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_fpw_module",
    "_module",
    "_forward_module",
)
PARALLEL = "module"  # DataParallel, DDP and DeepSpeed, around the whole model
NAMED = re.compile(  # in a model's own state dict, after what PEFT has one of for each adapter
    r"(.+\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta|modules_to_save))"
    r"\.(?!(?:weight|bias)$)([^.]+)(|\..+)"
)
OWNED = re.compile(r"lora_|trainable_tokens_delta|\.modules_to_save\.")  # what each adapter has of its own
MODULE_NAMES = (  # the settings of a PEFT config that hold names or patterns of modules
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "layers_pattern",
)


class _Name(NamedTuple):
    head: str  # what stands before PEFT's own names, with them; empty where there is nothing of PEFT
    adapter: str | None
    name: str


def unwrapped(keys: Iterable[str], label: str, same: Callable[[str, str], bool]) -> dict[str, str]:
    """PEFT's own name for each tensor of an adapter, without what wrappers and adapters' names have put into it.

    A tensor that is stored twice (`same` compares the values) is taken once: PEFT saves trained embeddings so.

    Errors: UserError for tensors of two adapters, of two models, for two that have one name, and for one that PEFT
    cannot have saved.

    >>> list(unwrapped(["module.base_model.model._orig_mod.q.lora_A.default.weight"], "a", str.__eq__).values())
    ['base_model.model.q.lora_A.weight']
    """
    names = {key: _parse(key) for key in keys}
    _alike(label, "of two models", {k: n.head for k, n in names.items() if n.head})
    _alike(label, "of two adapters", {k: n.adapter for k, n in names.items() if OWNED.search(k)})
    bare = all(not n.head for n in names.values())  # saved without PEFT's prefix
    taken: dict[str, str] = {}
    for key, n in names.items():
        if not n.head and not bare:
            raise UserError(f"{label}: key {key} is not a LoRA factor: PEFT's names begin with {PREFIX}")
        if (other := taken.setdefault(PREFIX + n.name, key)) != key and not same(other, key):
            raise UserError(f"{label}: keys {other} and {key} are names of one tensor, but hold different numbers")
    return {key: name for name, key in taken.items()}


def module_name(name: str) -> str:
    """The name that PEFT's own would be of a module in a wrapped model.

    >>> module_name("base_model.model._orig_mod.model.layers.0.mlp")
    'model.layers.0.mlp'
    """
    return _parse(PREFIX + name).name


def unwrapped_config(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A PEFT config whose names and patterns of modules are those of `unwrapped` keys."""
    parallel = any(_parse(key).head.endswith(f"{PREFIX}{PARALLEL}.") for key in keys)
    inside = re.compile(rf"(?<!\w)(?:{'|'.join(WRAPPERS)})\\?\.")
    head = r"base_model\\?\.model\\?\." + (r"|module\\?\." if parallel else "")
    around = re.compile(rf"^(\^?)(?:{head})+")

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return around.sub(r"\1", inside.sub("", value))
        if isinstance(value, list | tuple | set):
            return [plain(x) for x in cast("list[Any]", value)]
        return {plain(k): v for k, v in cast("dict[str, Any]", value).items()} if isinstance(value, dict) else value

    return {k: plain(v) if k in MODULE_NAMES else v for k, v in config.items()}


def _parse(key: str) -> _Name:
    parts = [p for p in key.split(".") if p not in WRAPPERS]
    peft = PREFIX.split(".")[:2]
    # the innermost, where a model was wrapped by PEFT twice
    start = next((i + 2 for i in reversed(range(len(parts) - 1)) if parts[i : i + 2] == peft), 0)
    while parts[start : start + 1] == [PARALLEL]:
        start += 1
    head, name = "".join(f"{p}." for p in parts[:start]), ".".join(parts[start:])
    adapter = None
    if match := NAMED.fullmatch(name):
        name, adapter = match[1] + match[3], match[2]
    return _Name(head if PREFIX in head else "", adapter, name.replace(".modules_to_save.", "."))


def _alike(label: str, what: str, said: Mapping[str, str | None]) -> None:
    one = {value: key for key, value in said.items()}
    if len(one) > 1:
        first, second, *_ = one.values()
        raise UserError(f"{label}: keys {first} and {second} are {what}; save the one to be merged alone")
