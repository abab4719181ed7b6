"""A folded checkpoint read back and compared with W_0 + D."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.loading import Loaded, load
from mot_lora.checkpoints.placement import Placement
from mot_lora.checkpoints.records import VerifiedTensor, VerifyRecord
from mot_lora.checkpoints.tensorfile import is_finite
from mot_lora.errors import UserError
from mot_lora.merging.merged import Merged
from mot_lora.progress import Progress, silent

SLACK = 0.01  # units of rounding that sums in fp32 may add to the rounding itself
ROWS = 1 << 22  # entries that are compared at once


def verify_checkpoint(
    base: str | Path | Checkpoint,
    merged: Merged | Sequence[Merged],
    out: str | Path,
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> VerifyRecord:
    """Read a folded checkpoint back, and measure how far each tensor is from W_0 + D.

    Arguments as they were in `fold_checkpoint`. The sum is made anew in fp64; an error of up to one unit (half a step
    of the format) is what rounding once costs. Every other tensor must be the base's own, bit by bit.

    Errors: UserError, which names the tensor, for one that is missing or further off.
    """
    return verify_placement(Placement.of(base, merged, dtype), Path(out), progress)


def verify_placement(p: Placement, out: Path, progress: Progress = silent) -> VerifyRecord:
    """Read what was written, and compare every tensor with what it should be."""
    written = Checkpoint.open(out)
    if written.remarks:
        raise UserError(f"{written.remarks[0]}; fold again")
    names = {name for listed in p.files.values() for name in listed}
    if wrong := names ^ set(written.files):
        raise UserError(f"{out}: {min(wrong)} is missing, or should not be there; fold again")
    for name in sorted(names):
        entry, asked = written.files[name].entries[name], (p.dtype_of(name)[0], tuple(p.stored(name).shape))
        if (entry.dtype, entry.shape) != asked:
            raise UserError(f"{out}: {name} is {entry.dtype} {list(entry.shape)}, not {asked[0]} {list(asked[1])}")
    if p.untied and p.layout.architecture.untie(written.config) != written.config:
        raise UserError(f"{out}: config.json has tie_word_embeddings, but {min(p.untied)} is no longer tied")
    found: dict[str, VerifiedTensor] = {}
    for module, places in p.places.items():
        if not places:
            continue
        exact = torch.float64 if all(m.method == "linear" for m in p.ledger) else p.dtype_of(places[0])[1]
        pieces = p.pieces(module, exact)
        for name in places:
            found[name] = _compare(written.tensor(name), p.read(name), pieces[name])
            progress("verify", len(found), len(names))
            if not found[name].error <= 1 + SLACK:
                if not is_finite(p.read(name)):
                    raise UserError(
                        f"{out}: {name} holds inf or NaN, as in {p.checkpoint.name} itself; give an undamaged "
                        "base model"
                    )
                raise UserError(
                    f"{out}: {name} is {found[name].error:.3g} units of rounding from W_0 + D; fold again, and "
                    "if it stays, the disk or memory is faulty"
                )
    for done, name in enumerate(sorted(names - set(found)), len(found) + 1):
        if not _same(written.tensor(name), p.read(name).to(p.dtype_of(name)[0])):
            raise UserError(f"{out}: {name} is not the base's; fold again, and if it stays, the disk is faulty")
        progress("verify", done, len(names))
    loaded = _check_loading(p, written)
    return VerifyRecord(tensors=found, untouched=len(names) - len(found), loaded=loaded)


def _check_loading(p: Placement, written: Checkpoint) -> bool:
    """Whether transformers can load such a model. UserError where it does not find all of it in what was written, or
    more than in the base.
    """
    try:
        found = load(written)
    except UserError:
        if _loads(p.checkpoint):
            raise
        found = None
    if found is None:
        return False
    if lost := found.missing | found.mismatched:
        raise UserError(
            f"{written.path}: transformers finds no {min(lost)} in it, as in {p.checkpoint.name}, and would fill it at "
            "random; give an undamaged base model"
        )
    if found.unexpected and (added := found.unexpected - cast("Loaded", load(p.checkpoint)).unexpected):
        raise UserError(f"{written.path}: transformers finds no place for {min(added)}; fold again")
    return True


def _loads(checkpoint: Checkpoint) -> bool:
    try:
        return load(checkpoint) is not None
    except UserError:
        return False


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are alike bit by bit: a NaN is like itself."""
    return a.shape == b.shape and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))


def _compare(written: Tensor, base: Tensor, delta: Tensor) -> VerifiedTensor:
    """One written tensor against base + delta, in fp64, some rows at a time."""
    update_sq = kept = error = 0.0
    info = torch.finfo(written.dtype)
    # sums in fp32 are off by their own rounding, which is more than a step where W and D nearly cancel
    slack = float(delta.abs().max()) * 2**-20 if info.bits < 32 and delta.numel() else 0.0
    for new, old, d in zip(*(torch.split(t.flatten(), ROWS) for t in (written, base, delta)), strict=True):
        new, old, d = new.double(), old.double(), d.double()
        target = old + d
        _, exponent = torch.frexp(torch.maximum(target.abs(), new.abs()).clamp(min=info.tiny))
        unit = torch.exp2(exponent.double()) * (info.eps / 4) + slack  # half a step; frexp's mantissa is in [0.5, 1)
        update_sq += float(d.square().sum())
        kept += float(((new - old) * d).sum())
        off = float(((new - target).abs() / unit).max())
        error = max(error, off) if math.isfinite(off) else math.inf
    return VerifiedTensor(update_norm=update_sq**0.5, survived=kept / update_sq if update_sq else None, error=error)
