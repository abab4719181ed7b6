"""LoRA factors as updates: of linear layers, embeddings and bare parameters, with DoRA, and the biases beside them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from mot_lora.adapters.stored import CONFIG_FILE, UNGATHERED, Maker, Read, StoredAdapter
from mot_lora.checkpoints.targets import ends, is_target
from mot_lora.errors import UserError
from mot_lora.merging.lowrank import Dense, Factors
from mot_lora.patterns import first_match


def lora_factors(
    adapter: StoredAdapter, module: str, name: str, a: str, b: str, embedding: bool, groups: Mapping[str, Any]
) -> tuple[str, Callable[[Read], Factors]]:
    """The parameter that a LoRA updates, and what makes its factors; a, b: the keys of its tensors."""
    shape_a, shape_b = list(adapter.shapes[a]), list(adapter.shapes[b])
    if len(shape_a) != 2 or len(shape_b) != 2 or not 0 < shape_a[0] == shape_b[1]:
        why = f"; {UNGATHERED}" if 0 in (*shape_a, *shape_b) else ""
        raise UserError(
            f"{adapter.label}: module {name}: A {shape_a} and B {shape_b} are not [r, in] and [out, r]{why}"
        )
    parameter = None if embedding else _parameter(adapter, module, name, groups)
    full = f"{name}.{parameter}" if parameter else name
    rank = _rank(adapter, full)
    if shape_a[0] != rank and not (parameter and rank and shape_a[0] % rank == 0):
        raise UserError(f"{adapter.label}: module {full} has rank {shape_a[0]}, but {CONFIG_FILE} says {rank}")
    scaling = adapter.scaling(full) if adapter.scaling else _scaling(adapter, full, rank)
    experts = shape_a[0] // rank

    def linear(read: Read) -> Factors:
        return Factors(read(a), read(b), scaling, "parameter" if parameter else "linear")

    def lookup(read: Read) -> Factors:  # D = (B A)^T: rows are tokens
        return Factors(read(b).T, read(a).T, scaling, "embedding")

    def stacked(read: Read) -> Factors:  # PEFT stacks the experts of A and interleaves those of B
        stacked_b = read(b).reshape(-1, rank, experts)
        return Factors(read(a).reshape(experts, rank, -1), torch.permute(stacked_b, (2, 0, 1)), scaling, "parameter")

    if embedding:
        return full, lookup
    if experts > 1:
        return full, stacked
    return full, linear


def dora(adapter: StoredAdapter, key: str, factors: Callable[[Read], Factors], magnitude: str) -> Maker:
    """DoRA (arXiv 2402.09353): D = m (W + B A) / |W + B A| - W, the norm taken for each output."""
    base = adapter.base

    def make(read: Read) -> Dense:
        update = factors(read)
        across = 0 if update.form == "embedding" else 1

        def delta(dtype: torch.dtype) -> Tensor:
            weight = base.weight(key, dtype)
            new = weight + update.delta(dtype)
            norm: Tensor = cast("Any", torch.linalg).norm(new, dim=across)
            size = read(magnitude).to(dtype) / norm
            return new.mul_(size.unsqueeze(across)).sub_(weight)

        return Dense(update.shape, delta, update.form)

    return make


def bias(adapter: StoredAdapter, name: str, key: str) -> Maker:
    """The bias of a LoRA's B, scaled as B is."""
    scaling = adapter.scaling(name) if adapter.scaling else _scaling(adapter, name, _rank(adapter, name))

    def make(read: Read) -> Dense:
        return Dense(torch.Size(adapter.shapes[key]), lambda dtype: read(key).to(dtype) * scaling, "bias")

    return make


def _parameter(adapter: StoredAdapter, module: str, name: str, groups: Mapping[str, Any]) -> str | None:
    """Which bare parameter of a module this LoRA is of; None for a LoRA of a linear layer."""
    targets = [t.rpartition(".") for t in adapter.config.get("target_parameters") or ()]
    mine = sorted({p for m, _, p in targets if m and ends(name, m)}) or sorted({p for m, _, p in targets if not m})
    nested = sorted((g for g in groups if g.replace(".base_layer", "") == name), key=len, reverse=True)
    if not mine or (len(nested) == 1 and is_target(adapter.config, name)):
        return None
    if len(mine) == 1:
        return mine[0]
    # PEFT wraps a module's parameters in the order in which the module has them, and names none of them
    known = [n for n, _ in adapter.base.module(name).named_parameters(recurse=False) if n in mine]
    if len(known) != len(nested):
        raise UserError(
            f"{adapter.label}: {name} has {len(nested)} LoRAs of bare parameters, but its base has "
            f"{', '.join(known) or 'none'} of {', '.join(mine)}"
        )
    return known[nested.index(module)]


def _rank(adapter: StoredAdapter, module: str) -> int:
    patterns: dict[str, int] = adapter.config.get("rank_pattern") or {}
    pattern = first_match(patterns, module)
    rank: Any = adapter.config.get("r") if pattern is None else patterns[pattern]
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{adapter.label}: {CONFIG_FILE} says rank {rank!r} for {module}")
    return rank


def _scaling(adapter: StoredAdapter, module: str, rank: int) -> float:
    patterns: dict[str, float] = adapter.config.get("alpha_pattern") or {}
    pattern = first_match(patterns, module)
    alpha: Any = adapter.config.get("lora_alpha") if pattern is None else patterns[pattern]
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{adapter.label}: {CONFIG_FILE} says lora_alpha {alpha!r} for {module}, not a number")
    return alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
