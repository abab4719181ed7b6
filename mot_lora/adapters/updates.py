"""PEFT's tensors of every kind as updates of the base's parameters; what cannot be exact is refused by name."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from mot_lora.adapters.copies import check_copy, indices, is_saved_whole, trained_copy, trained_tokens
from mot_lora.adapters.factors import bias, dora, lora_factors
from mot_lora.adapters.stored import Maker, Read, StoredAdapter
from mot_lora.adapters.wrappers import PREFIX, unwrapped
from mot_lora.checkpoints.targets import is_within, refusal
from mot_lora.errors import UserError
from mot_lora.merging.lowrank import Factors, Update, concatenate
from mot_lora.patterns import first_match

CLASSIFIERS = ("classifier", "score")


@dataclass(frozen=True)
class LazyUpdates(Mapping[str, Update]):
    """Updates that are made when they are asked for, and not kept; `meta_updates`: the same on the meta device."""

    makers: Mapping[str, Maker]
    read: Read
    meta: Read

    @property
    def meta_updates(self) -> "LazyUpdates":
        return LazyUpdates(self.makers, self.meta, self.meta)

    def __getitem__(self, module: str) -> Update:
        return self.makers[module](self.read)

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def updates(adapter: StoredAdapter) -> Mapping[str, Update]:
    """Every update of the adapter, made when it is asked for.

    Errors: UserError for what cannot be exact, and for any tensor that belongs to nothing.
    """
    if why := refusal(adapter.config):
        raise UserError(f"{adapter.label}: cannot be merged exactly: {why}")

    def same(one: str, other: str) -> bool:
        return torch.equal(adapter.read(one), adapter.read(other))

    groups: dict[str, dict[str, str]] = {}
    for key, name in unwrapped(adapter.shapes, adapter.label, same).items():
        module, kind = _classify(name, key, adapter.label)
        if any(part.startswith("_") for part in module.split(".")):
            _check_module(adapter, module, key)
        groups.setdefault(module, {})[kind] = key
    makers: dict[str, Maker] = {}
    for module in _in_order(groups):
        for key, make in _of_module(adapter, module, groups[module], groups).items():
            makers[key] = _sum(adapter, key, makers[key], make) if key in makers else make
    if not makers:
        raise UserError(f"{adapter.label}: holds no LoRA factors")
    # a name that the model never had looks like one of which nothing was saved
    _check_modules_to_save(adapter, groups)
    _check_tokens(adapter, groups)
    _check_tying(adapter, makers)
    return LazyUpdates(makers, adapter.read, lambda key: torch.empty(adapter.shapes[key], device="meta"))


def _of_module(
    adapter: StoredAdapter, module: str, keys: Mapping[str, str], groups: Mapping[str, Mapping[str, str]]
) -> dict[str, Maker]:
    """The updates that one module's tensors are."""
    left = dict(keys)
    out: dict[str, Maker] = {}
    name = module.replace(".base_layer", "")
    if tokens := left.pop("tokens", None):
        out |= trained_tokens(adapter, name, tokens, groups)
    embedding = "embedding_A" in left or "embedding_B" in left
    pair = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if any(kind in left for kind in pair):
        if not all(kind in left for kind in pair):
            raise UserError(f"{adapter.label}: module {name} has only its lora_{next(k for k in pair if k in left)}")
        a, b = (left.pop(kind) for kind in pair)
        key, factors = lora_factors(adapter, module, name, a, b, embedding, groups)
        for setting, kind in (("use_dora", "magnitude"), ("lora_bias", "B.bias")):
            if adapter.config.get(setting) and kind not in left:
                raise UserError(f"{adapter.label}: module {name} has no {kind}, which {setting} asks for")
        if adapter.config.get("use_dora"):
            factors = dora(adapter, key, factors, left.pop("magnitude"))
        out[key] = factors
        if adapter.config.get("lora_bias"):
            out[f"{name}.bias"] = bias(adapter, name, left.pop("B.bias"))
    for kind in [k for k in left if k.startswith(("whole.", "copy."))]:
        said, _, parameter = kind.partition(".")
        full = f"{name}.{parameter}" if name else parameter
        key = name if parameter == "weight" else full
        if said == "whole" and is_saved_whole(adapter, name):
            out[key] = trained_copy(adapter, key, full, left.pop(kind))
        else:
            check_copy(adapter, key, full, left.pop(kind), trainable=said == "whole")
    if left:
        raise UserError(f"{adapter.label}: key {next(iter(left.values()))} is no part of a LoRA; it cannot be merged")
    return out


def _sum(adapter: StoredAdapter, key: str, one: Maker, other: Maker) -> Maker:
    """A head's own LoRA beside the trained tokens that it shares with the embedding."""
    if not adapter.config.get("trainable_token_indices") or adapter.config.get("use_dora"):
        raise UserError(f"{adapter.label}: holds {key} twice, so it cannot be merged")
    return lambda read: concatenate([cast("Factors", one(read)), cast("Factors", other(read))], [1.0, 1.0])


def _check_module(adapter: StoredAdapter, module: str, key: str) -> None:
    """UserError for a name that a wrapper has left behind; only the base shows which are the model's own."""
    try:
        adapter.base.module(module)
    except UserError as e:
        raise UserError(f"{adapter.label}: key {key} holds a name that is a wrapper's or its base's own: {e}") from e


def _check_modules_to_save(adapter: StoredAdapter, groups: Mapping[str, Any]) -> None:
    """Each module that `modules_to_save` lists must be there."""
    for target in adapter.config.get("modules_to_save") or ():
        either = CLASSIFIERS if target in CLASSIFIERS else (target,)  # PEFT lists both, and models have one
        if not any(is_within(g, t) for g in groups for t in either):
            raise UserError(f"{adapter.label}: holds nothing of `{target}`, which modules_to_save lists")


def _check_tokens(adapter: StoredAdapter, groups: Mapping[str, Any]) -> None:
    """Each embedding that `trainable_token_indices` lists must be there, or one that is tied to it."""
    listed: dict[str, Any] | list[Any] = adapter.config.get("trainable_token_indices") or {}
    have = {m for m, kinds in groups.items() if "tokens" in kinds}
    if listed and not have:
        raise UserError(f"{adapter.label}: holds no tokens, which trainable_token_indices lists")
    for target in listed if isinstance(listed, dict) else ():
        held = {adapter.base.parameter(m): m for m in have}
        tied = {
            name.removesuffix(".weight")
            for name, source in adapter.base.tied.items()
            if (m := held.get(source)) and indices(adapter.config, m) == indices(adapter.config, target)
        }
        if not any(first_match([target], m) for m in have | tied):
            raise UserError(f"{adapter.label}: holds no tokens of `{target}`, which trainable_token_indices lists")


def _check_tying(adapter: StoredAdapter, updated: Iterable[str]) -> None:
    """With `ensure_weight_tying`, embedding and head must both be there."""
    targets: str | list[str] = adapter.config.get("target_modules") or []
    saved: list[str] = adapter.config.get("modules_to_save") or []
    listed = {t.rpartition(".")[2] for t in (*saved, *([] if isinstance(targets, str) else targets))}
    if not adapter.config.get("ensure_weight_tying") or not listed & {"embed_tokens", "lm_head"}:  # PEFT's rule
        return
    have = {adapter.base.parameter(module) for module in updated}
    for pair in adapter.base.tied.items():
        if missing := [name for name in pair if name not in have]:
            lone = missing[0].removesuffix(".weight")
            raise UserError(f"{adapter.label}: holds nothing of `{lone}`, which ensure_weight_tying asks for")


KINDS = {
    r"lora_([AB])\.weight": r"\2",
    r"lora_B\.bias": "B.bias",
    r"lora_embedding_([AB])": r"embedding_\2",
    r"lora_magnitude_vector(?:\.weight)?": "magnitude",
    r"(?:token_adapter\.base_layer|base_layer|original_module)\.(weight|bias)": r"copy.\2",
    r"token_adapter\.trainable_tokens_delta": "tokens",
}


def _classify(name: str, key: str, label: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and which part of it the tensor is."""
    name = name.removeprefix(PREFIX)
    for pattern, kind in KINDS.items():
        if match := re.fullmatch(rf"(.+?)\.{pattern}", name):
            return match[1], match.expand(kind)
    if "lora_" in name:
        raise UserError(f"{label}: key {key} is not a LoRA factor that can be merged")
    module, _, parameter = name.rpartition(".")
    return module, f"whole.{parameter}"


def _in_order(groups: Mapping[str, Any]) -> list[str]:
    """Modules by name, the LoRAs of one module's bare parameters from the innermost, as PEFT wraps them."""
    return sorted(groups, key=lambda g: (g.replace(".base_layer", ""), -len(g)))
