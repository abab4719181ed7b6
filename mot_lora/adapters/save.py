"""Updates written as PEFT writes them: an adapter's config and tensors, and the folder that holds them."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mot_lora.adapters.load import WEIGHTS_FILE, check_names
from mot_lora.adapters.records import SaveRecord
from mot_lora.adapters.stored import CONFIG_FILE
from mot_lora.adapters.wrappers import PREFIX
from mot_lora.checkpoints.tensorfile import write_tensors
from mot_lora.durable import move
from mot_lora.errors import UserError, writing
from mot_lora.merging.lowrank import Adapter, Dense, Factors, Form, Origin, Update, inner, truncate
from mot_lora.merging.merged import Merged, method_name, total
from mot_lora.progress import Progress, silent

PADDING = 64 << 20  # bytes of zeros that any file may have, for one rank in all modules


@dataclass(frozen=True)
class Packed:
    """What PEFT would have saved: its config, its tensors in fp32, and what was lost on the way."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    record: SaveRecord


def save_adapter(
    adapter: Adapter | Merged, path: str | Path, rank: int | None = None, progress: Progress = silent
) -> SaveRecord:
    """Write a folder that PEFT loads, and return what `rank` cost: the share |lost| / |D|, in all and by module.

    Without a rank the copy is exact (in fp32): factors as they are, or concatenated for a linear merge. With one, each
    module gets its best copy of that rank. The scaling is folded into B, so r = alpha in the written config, and lower
    ranks are filled up with zeros to one rank, which every reader scales alike, unless that would more
    than double the file and add 64 MiB. A folder that is there already is replaced, file by file.

    Errors: UserError for a merge that is not low-rank (TIES, DARE, ...) without a rank, for adapters that may call one
    module by two names, and a path that cannot be written.

    >>> save_adapter(merge_adapters(["a", "b"]), "merged", rank=16).lost  # doctest: +SKIP
    0.031
    """
    packed = pack(adapter, rank, progress)
    with writing(path):
        write_packed(packed, Path(path))
    return packed.record


def write_packed(packed: Packed, path: Path) -> None:
    """An adapter's folder: the weights, then the config, each whole or as it was."""
    entries = {name: (t.dtype, t.shape) for name, t in packed.tensors.items()}
    path.mkdir(parents=True, exist_ok=True)

    def write_weights(to: Path) -> None:
        write_tensors(to, entries, packed.tensors.items())

    def write_config(to: Path) -> None:
        to.write_text(json.dumps(packed.config, indent=2) + "\n", encoding="utf-8", newline="\n")

    for name, write in ((WEIGHTS_FILE, write_weights), (CONFIG_FILE, write_config)):
        partial = path / f".{name}.partial"
        try:
            write(partial)
            move(partial, path / name)
        finally:
            partial.unlink(missing_ok=True)


def pack(
    adapter: Adapter | Merged, rank: int | None = None, progress: Progress = silent, filled: bool = True
) -> Packed:
    """An adapter or a merge as PEFT holds it, its lower ranks `filled` up with zeros or not; else as `save_adapter`."""
    check_names(_adapters(adapter))
    modules = list(adapter.shapes if isinstance(adapter, Merged) else adapter.updates)
    forms = _forms(adapter)
    tensors: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    norms: dict[str, float] = {}
    factors: dict[str, Factors] = {}
    saved: list[str] = []
    for done, module in enumerate(modules, 1):
        update = _update(adapter, module)
        if forms[module] in ("whole", "bias"):  # exact whatever the rank
            delta = update.delta()
            norms[module], lost[module] = _square(delta), 0.0
            if forms[module] == "bias":
                tensors[f"{PREFIX}{module.removesuffix('.bias')}.lora_B.bias"] = delta
            else:
                origin = _origin(adapter, module)
                copy = origin.read(torch.float32) + delta
                tensors[PREFIX + origin.name] = copy.T.contiguous() if origin.transposed else copy
                saved.append(origin.name.rpartition(".")[0])
        else:
            factors[module], lost[module], norms[module] = _low_rank(adapter, module, update, rank)
        progress("pack", done, len(modules))
    ranks = {module: f.rank for module, f in factors.items()}
    top = max(ranks.values(), default=1)
    uniform = _is_cheap(factors, top, filled)
    for module, f in factors.items():
        bare = [m for m in modules if forms[m] == "parameter" and m.rpartition(".")[0] == module.rpartition(".")[0]]
        tensors |= _lora_tensors(module, forms[module], _padded(f, top) if uniform else f, bare)
    if "bias" in forms.values():  # PEFT has a bias on all of them or on none
        for module in [m for m in ranks if forms[m] == "linear"]:
            size = tensors[f"{PREFIX}{module}.lora_B.weight"].shape[0]
            tensors.setdefault(f"{PREFIX}{module}.lora_B.bias", torch.zeros(size))
    record = SaveRecord(
        method=method_name(adapter.method) if isinstance(adapter, Merged) else None,
        rank=top,
        ranks=ranks,
        uniform=uniform,
        lost=_share(lost, norms),
        modules=lost,
    )
    return Packed(_config(adapter, top, {} if uniform else ranks, saved), tensors, record)


def _is_cheap(factors: Mapping[str, Factors], rank: int, filled: bool) -> bool:
    """Whether all modules may have one rank: nothing is filled up, or, where that is asked, with few zeros."""
    size = sum(f.rank * _bytes(f) for f in factors.values())
    zeros = sum((rank - f.rank) * _bytes(f) for f in factors.values())
    return zeros <= (max(size, PADDING) if filled else 0)


def _config(adapter: Adapter | Merged, rank: int, ranks: Mapping[str, int], saved: Collection[str]) -> dict[str, Any]:
    """PEFT's adapter_config.json: of this rank, but for modules of other `ranks`; `saved` are held whole."""
    forms = _forms(adapter)
    other = {rf"^{re.escape(m)}": r for m, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": next((a.base for a in _adapters(adapter) if a.base), None),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "target_modules": sorted(m for m, form in forms.items() if form in ("linear", "embedding")),
        "target_parameters": _target_parameters(adapter) if "parameter" in forms.values() else None,
        "modules_to_save": sorted(set(saved)) or None,
        "lora_bias": "bias" in forms.values(),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _share(lost: Mapping[str, float], squares: Mapping[str, float]) -> float:
    """|lost| / |D| over all modules, from each one's and its |D|^2."""
    total = math.fsum(squares.values())
    return math.sqrt(math.fsum(lost[m] ** 2 * squares[m] for m in lost) / total) if total else 0.0


def _update(adapter: Adapter | Merged, module: str) -> Update:
    return adapter.updates[module] if isinstance(adapter, Adapter) else total([adapter], module)


def _low_rank(adapter: Adapter | Merged, module: str, update: Update, rank: int | None) -> tuple[Factors, float, float]:
    """The update as factors, the share that was lost, and its |D|^2."""
    if isinstance(update, Factors):
        if rank is None or rank >= update.rank:
            return update, 0.0, inner(update, update)
        small, lost = truncate(update, rank)
        kept = inner(small, small)
        return small, lost, kept / (1 - lost**2) if kept else inner(update, update)
    if rank is None:
        what = method_name(adapter.method) if isinstance(adapter, Merged) else "DoRA"
        ranks = [p.rank for p in adapter.parts(module) if isinstance(p, Factors)] if isinstance(adapter, Merged) else []
        hint = f", e.g. {sum(ranks)}, theirs together" if ranks else ""
        raise UserError(f"a {what} merge of {module} is not low-rank: fold it, or give a rank{hint}")
    delta = update.delta()
    return *truncate(delta, rank), _square(delta)


def _bytes(f: Factors) -> int:
    """What each rank of an update takes in fp32."""
    return 4 * math.prod(f.a.shape[:-2]) * (f.a.shape[-1] + f.b.shape[-2])


def _padded(f: Factors, rank: int) -> Factors:
    """The same update in factors of a larger rank, the rest of them zeros."""
    more = rank - f.rank
    return replace(f, a=pad(f.a, (0, 0, 0, more)), b=pad(f.b, (0, more))) if more else f


def _square(delta: Tensor) -> float:
    return float(delta.square().sum(dtype=torch.float64))


def _origin(adapter: Adapter | Merged, module: str) -> Origin:
    parts = adapter.parts(module) if isinstance(adapter, Merged) else [adapter.updates[module]]
    return next(p.origin for p in parts if isinstance(p, Dense) and p.origin)


def _adapters(adapter: Adapter | Merged) -> Sequence[Adapter]:
    return adapter.adapters if isinstance(adapter, Merged) else [adapter]


def _target_parameters(adapter: Adapter | Merged) -> list[str]:
    """As the adapters themselves have it: PEFT wants one list of all adapters of a model."""
    said = {tuple(sorted(a.targets.get("target_parameters") or ())) for a in _adapters(adapter)}
    if len(said) == 1 and (one := said.pop()):
        return list(one)
    return [m for m, form in _forms(adapter).items() if form == "parameter"]


def _forms(adapter: Adapter | Merged) -> Mapping[str, Form]:
    return adapter.forms if isinstance(adapter, Merged) else {m: u.form for m, u in adapter.meta_updates.items()}


def _lora_tensors(module: str, form: str, f: Factors, bare: Sequence[str]) -> dict[str, Tensor]:
    """The factors in PEFT's names. `bare`: the LoRAs of bare parameters of the same owner, innermost first."""
    a, b = f.a.float().cpu(), (f.b.float() * f.scaling).cpu()
    if form == "embedding":
        return {
            f"{PREFIX}{module}.lora_embedding_A": b.T.contiguous(),
            f"{PREFIX}{module}.lora_embedding_B": a.T.contiguous(),
        }
    key = module
    if form == "parameter":
        key = module.rpartition(".")[0] + ".base_layer" * (len(bare) - 1 - bare.index(module))
    if a.ndim == 3:
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    return {f"{PREFIX}{key}.lora_A.weight": a.contiguous(), f"{PREFIX}{key}.lora_B.weight": b.contiguous()}
