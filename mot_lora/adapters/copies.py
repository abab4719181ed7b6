"""Copies of the base's parameters in an adapter: trained ones, trained tokens, and those that are the base's own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mot_lora.adapters.stored import CONFIG_FILE, UNGATHERED, Maker, Read, StoredAdapter
from mot_lora.checkpoints.targets import is_within
from mot_lora.errors import UserError
from mot_lora.merging.lowrank import Dense, Factors, Form, Origin
from mot_lora.patterns import first_match


def indices(config: Mapping[str, Any], module: str) -> list[Any] | None:
    """The tokens of a module that a config says are trained; None where it says none."""
    said: dict[str, list[Any]] | list[Any] | None = config.get("trainable_token_indices")
    return said.get(first_match(said, module) or "") if isinstance(said, dict) else said


def trained_tokens(adapter: StoredAdapter, name: str, key: str, groups: Mapping[str, Any]) -> dict[str, Maker]:
    """Trained rows of an embedding, as the low-rank update one-hot rows @ (new - old); a tied head shares them."""
    tokens = indices(adapter.config, name)
    if tokens is None or len(tokens) != adapter.shapes[key][0]:
        raise UserError(f"{adapter.label}: {key} does not fit trainable_token_indices of {CONFIG_FILE}")
    base = adapter.base
    size = len(base.weight(name))
    if len(set(tokens)) != len(tokens) or not all(isinstance(t, int) and 0 <= t < size for t in tokens):
        raise UserError(f"{adapter.label}: trainable_token_indices are not different tokens of the {size} of {name}")

    def make(form: Form) -> Maker:
        def factors(read: Read) -> Factors:
            new, old = read(key).double(), base.weight(name)
            rows = torch.zeros(len(old), len(tokens), dtype=new.dtype)
            rows[tokens, range(len(tokens))] = 1.0
            return Factors(new - old[tokens].to(new), rows.to(new.device), 1.0, form)

        return factors

    heads = [t.removesuffix(".weight") for t, s in base.tied.items() if s == base.parameter(name)]
    form: Form = "embedding" if isinstance(base.module(name), nn.Embedding) else "linear"
    return {name: make(form), **{h: make("linear") for h in heads if "tokens" not in groups.get(h, ())}}


def is_saved_whole(adapter: StoredAdapter, name: str) -> bool:
    """Whether an adapter's config says that it holds a trained copy of a module."""
    if any(is_within(name, m) for m in adapter.config.get("modules_to_save") or ()):
        return True
    return bool(adapter.config.get("ensure_weight_tying")) and adapter.base.parameter(name) in adapter.base.tied


def trained_copy(adapter: StoredAdapter, key: str, full: str, stored: str) -> Maker:
    """A trained copy of a parameter: D = copy - W."""
    base = adapter.base

    def make(read: Read) -> Dense:
        def delta(dtype: torch.dtype) -> Tensor:
            new = read(stored).to(dtype)
            return (new.T if flip else new) - base.weight(key, dtype).to(new.device)

        origin = Origin(full, lambda dtype: base.weight(key, dtype), flip)
        return Dense(torch.Size(shape), delta, "whole", origin)

    flip = _is_turned(adapter, full, stored)
    shape = list(adapter.shapes[stored])[:: -1 if flip else 1]
    size = list(base.weight(key).shape)
    if size != shape:
        raise UserError(_resized(adapter, stored, shape, size))
    return make


def check_copy(adapter: StoredAdapter, key: str, full: str, stored: str, trainable: bool) -> None:
    """PEFT saves the base's embeddings and head beside a LoRA that may need them; they must be the base's own.

    A vocabulary that was cut to the tokenizer's size, and no row of it trained, is the base's too.
    """
    try:
        base = adapter.base
    except UserError as e:
        raise UserError(
            f"{adapter.label}: key {stored} is no part of a LoRA, and whether it is the base's own weight can only "
            f"be seen with the base ({e})"
        ) from e
    weight, copy = base.weight(key), adapter.read(stored)
    weight, copy = (t[None] if t.ndim == 0 else t for t in (weight, copy))
    copy = copy.T if _is_turned(adapter, full, stored) else copy
    same = copy.shape[1:] == weight.shape[1:] and 0 < len(copy) <= len(weight)
    if same and _are_rounded(weight[: len(copy)].to(copy.device), copy):
        return
    listed = f"list `{full.rpartition('.')[0]}` in modules_to_save of {CONFIG_FILE}" if trainable else ""
    if copy.shape != weight.shape:
        also = f"; then {listed} if it was trained" if listed else ""
        raise UserError(_resized(adapter, stored, list(copy.shape), list(weight.shape)) + also)
    raise UserError(
        f"{adapter.label}: {stored} is not the base's weight: it was trained too, or belongs to another base; "
        f"name that base with base= or --base{f', or {listed} if it was trained' if listed else ''}"
    )


def _is_turned(adapter: StoredAdapter, full: str, stored: str) -> bool:
    """Whether a parameter is stored [in, out]."""
    owner = adapter.base.module(full.rpartition(".")[0])
    return len(adapter.shapes[stored]) == 2 and type(owner).__name__ == "Conv1D"


def _resized(adapter: StoredAdapter, stored: str, shape: list[int], size: list[int]) -> str:
    line = f"{adapter.label}: {stored} is {shape}, but {size} in its base"
    if 0 in shape:
        return f"{line}; {UNGATHERED}"
    if shape[1:] == size[1:]:
        return (
            f"{line}: its vocabulary was resized; resize the base too (model.resize_token_embeddings("
            f"{shape[0]}), save_pretrained with the adapter's tokenizer) and name the result with base= or --base"
        )
    return f"{line}; is this its base model?"


def _are_rounded(weight: Tensor, copy: Tensor) -> bool:
    """Whether a copy is of these numbers, also where the base was loaded in fewer bits; some rows at a time."""
    rows = list(zip(torch.split(weight, 4096), torch.split(copy, 4096), strict=True))
    return any(
        all(torch.equal(w.to(bits).to(copy.dtype), c) for w, c in rows)
        for bits in (copy.dtype, torch.bfloat16, torch.float16)
    )
