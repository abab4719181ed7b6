"""Adapters compared before they are merged: sizes, agreement, and what a smaller copy of their mean would lose."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mot_lora.adapters.load import check_names
from mot_lora.adapters.records import AdapterRecord, InspectRecord, LayerRecord
from mot_lora.adapters.sources import check_bases, read_adapters, with_common_names
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.placement import Placement
from mot_lora.merging.agreement import Agreement, agreement_of, by_layer, summed
from mot_lora.merging.lowrank import Adapter, Factors, spectrum
from mot_lora.merging.merged import Merged, combine
from mot_lora.progress import Progress, silent

if TYPE_CHECKING:
    from mot_lora.adapters.sources import Source

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def inspect_adapters(
    adapters: "Sequence[Source]", base: str | Path | Checkpoint | None = None, progress: Progress = silent
) -> InspectRecord:
    """Norms, cosines and sign conflicts, in all and by layer, and the share of the mean that rank-r copies lose.

    |D_i|, |D_i| / |W| when the base is given, <D_i, D_j> / |D_i| |D_j|, the share of entries on which two adapters
    disagree about the sign, and |M - M_r| / |M| of the exact mean M. Adapters as in `merge_adapters`.

    Errors: UserError as in `merge_adapters`, and for adapters that do not fit the base.

    >>> inspect_adapters(["adapters/a", "adapters/b"]).overall.cosine  # doctest: +SKIP
    ((1.0, 0.31), (0.31, 1.0))
    """
    read = read_adapters(adapters, base)
    if base is None:
        check_bases(read)
        check_names(read)
    else:
        read = with_common_names(read, base)
    merged = combine(read)
    placement = None if base is None else Placement.of(base, merged)
    if placement:
        placement.check()
    modules: dict[str, Agreement] = {}
    tails: dict[int, float] = dict.fromkeys(RANKS, 0.0)
    total = 0.0
    for done, module in enumerate(merged.shapes, 1):
        row = agreement_of(read, module)
        modules[module] = replace(row, base_sq=placement.base_square(module)) if placement else row
        values = _singular_values(merged, module).square()
        total += float(values.sum())
        for rank in RANKS:
            tails[rank] += float(values[..., rank:].sum())
        progress("inspect", done, len(merged.shapes))
    overall = _layer(summed(modules.values()))
    useful = [r for r in RANKS if r == 1 or tails[r // 2]]
    return InspectRecord(
        adapters=tuple(_describe(a, i, overall) for i, a in enumerate(read)),
        overall=overall,
        layers={layer: _layer(found) for layer, found in by_layer(modules).items()},
        lost={r: math.sqrt(tails[r] / total) if total else 0.0 for r in useful},
    )


def _layer(found: Agreement) -> LayerRecord:
    """How adapters agree before they are merged, as it is recorded."""
    norms = tuple(math.sqrt(max(row[i], 0.0)) for i, row in enumerate(found.gram))
    size = math.sqrt(found.base_sq)
    return LayerRecord(
        norms=norms,
        relative_norms=tuple(n / size for n in norms) if size else None,
        cosine=found.cosine,
        sign_conflict=found.sign_conflict,
    )


def _singular_values(merged: Merged, module: str) -> torch.Tensor:
    if all(p is None or isinstance(p, Factors) for p in merged.parts(module)):
        return spectrum(merged.factors(module))
    delta = merged.delta(module)
    return spectrum(delta) if delta.ndim > 1 else torch.zeros(1)  # a vector is kept whole at any rank


def _describe(adapter: Adapter, index: int, overall: LayerRecord) -> AdapterRecord:
    updates = list(adapter.meta_updates.values())
    forms = [u.form for u in updates]
    return AdapterRecord(
        name=adapter.name,
        base=adapter.base,
        parameters=sum(u.a.numel() + u.b.numel() for u in updates if isinstance(u, Factors)),
        forms={f: forms.count(f) for f in dict.fromkeys(forms)},
        ranks=tuple(sorted({u.rank for u in updates if isinstance(u, Factors)})),
        norm=overall.norms[index],
        relative_norm=overall.relative_norms[index] if overall.relative_norms else None,
    )
