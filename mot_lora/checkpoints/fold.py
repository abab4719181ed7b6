"""Merged updates written into a full checkpoint on disk: W_0 + D, a tensor at a time, rounded once."""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mot_lora.checkpoints.checkpoint import Checkpoint, describe
from mot_lora.checkpoints.placement import Placement
from mot_lora.checkpoints.records import KeptRecord
from mot_lora.checkpoints.tensorfile import TensorFile, is_finite, write_tensors
from mot_lora.checkpoints.verify import verify_placement
from mot_lora.durable import check_new, move
from mot_lora.errors import UserError, remark, writing
from mot_lora.merging.agreement import layer_of
from mot_lora.merging.merged import Merged
from mot_lora.progress import Progress, silent

FORMAT = ("dtype", "torch_dtype")  # in a config; the second for readers before transformers 4.56
BLOCK = 1 << 18  # entries that are summed, rounded and measured while they are in the cache


def fold_checkpoint(
    base: str | Path | Checkpoint,
    merged: Merged | Sequence[Merged],
    out: str | Path,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write W_0 + the merged updates as a full checkpoint that transformers loads, a tensor at a time.

    Each weight is summed in fp32 (in fp64 where it is stored or written in fp32) and rounded once, to `dtype` or to
    what the base is stored in. Memory is bounded by one tensor, whatever the number of adapters. Embeddings and head
    that are tied in the base and get different updates are written apart. All is written to a temporary folder beside
    `out`, which is renamed at the end: `out` is complete or does not exist. With `verify`, it is read back first (see
    `verify_checkpoint`).

    Errors: UserError when `out` exists, an update fits no tensor of the base, or what was read back is not W_0 + D.

    >>> fold_checkpoint("Qwen/Qwen3-0.6B", merge_adapters(["a", "b"]), "merged")  # doctest: +SKIP
    """
    fold_placement(Placement.of(base, merged, dtype), Path(out), verify=verify, progress=progress)
    return Path(out)


def fold_placement(
    placement: Placement,
    out: Path,
    texts: Callable[[KeptRecord], Mapping[str, str]] | None = None,
    verify: bool = False,
    progress: Progress = silent,
) -> KeptRecord:
    """`fold_checkpoint`, which returns how much of the update is in what was written.

    `texts` makes from that other files to write, by name: a README, say. It is measured while the tensors are written,
    so none is read again for it.
    """
    placement.check()
    check_new(out)
    remark(*placement.checkpoint.remarks)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with writing(out):
            partial.mkdir(parents=True)
            kept = _write(placement, partial, progress)
            written = texts(kept) if texts else dict[str, str]()
            for file, text in written.items():
                (partial / file).write_text(text, encoding="utf-8", newline="\n")
            if verify:
                verify_placement(placement, partial, progress)
            if out.exists():
                out.rmdir()
            move(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return kept


def _write(p: Placement, out: Path, progress: Progress) -> KeptRecord:
    done, total = 0, sum(map(len, p.files.values()))
    sums: dict[str, tuple[float, float]] = {}
    odd = list[str]()
    for file, names in p.files.items():
        entries = {n: (p.dtype_of(n)[0], p.stored(n).shape) for n in names}

        def counted(names: list[str] = names) -> Iterator[tuple[str, Tensor | TensorFile]]:
            nonlocal done
            for pair in _tensors(p, names, sums, odd):
                yield pair
                done += 1
                progress("write", done, total)

        odd.extend(write_tensors(out / file, entries, counted()))
    if odd:
        more = f" and {len(odd) - 1} more" if odd[1:] else ""
        remark(f"{p.checkpoint.name}: {odd[0]}{more} holds inf or NaN in the base already and is written unchanged")
    _companions(p, out)
    return KeptRecord.of(sums)


def _tensors(
    p: Placement, names: Sequence[str], sums: dict[str, tuple[float, float]], odd: list[str]
) -> Iterator[tuple[str, Tensor | TensorFile]]:
    """The tensors of one file as they are to be; those of one module one after the other.

    Adds up each layer's <change, D> and |D|^2 in `sums`, and to `odd` what is cast and not finite in the base itself.
    """
    module_of = {name: module for module, places in p.places.items() for name in places}
    here = set(names)
    for module in dict.fromkeys(module_of[n] for n in names if n in module_of):
        pieces: dict[str, Tensor] = {}
        for name in p.places[module]:
            if name in here:
                to, exact = p.dtype_of(name)
                pieces = pieces or p.pieces(module, exact)
                folded, kept, square = _round(base := p.read(name), pieces[name], to, exact)
                if not math.isfinite(kept) and not _is_finite(name, base, folded):
                    raise UserError(
                        f"{p.checkpoint.name}: {name}, which is updated, holds inf or NaN in the base itself; give "
                        "an undamaged base model"
                    )
                before = sums.get(layer := layer_of(module), (0.0, 0.0))
                sums[layer] = before[0] + kept, before[1] + square
                yield name, folded
    for name in names:
        if name not in module_of:
            file = p.checkpoint.files.get(name)
            to = p.dtype_of(name)[0]
            if file is not None and name not in p.untied and to == p.stored(name).dtype:
                yield name, file
            else:
                cast_to = (base := p.read(name)).to(to)
                odd += [] if _is_finite(name, base, cast_to) else [name]
                yield name, cast_to


def _is_finite(name: str, base: Tensor, written: Tensor) -> bool:
    """Whether a tensor is finite in the base. Errors: UserError where it is, and is not so in what is written."""
    if is_finite(written) or not is_finite(base):
        return is_finite(base)
    to = str(written.dtype).removeprefix("torch.")
    raise UserError(f"{name}: its numbers are too large for {to}; write bfloat16 or float32")


def _round(base: Tensor, delta: Tensor, to: torch.dtype, exact: torch.dtype) -> tuple[Tensor, float, float]:
    """W + D rounded once, <change, D> and |D|^2, block by block: with D and what rounding took off, D is all there is.

    <round(W + D) - W, D> = |D|^2 - <(W + D) - round(W + D), D>, in which nothing large cancels.
    """
    folded = torch.empty(base.shape, dtype=to)
    rows = max(1, BLOCK * len(base) // max(1, base.numel()))
    totals = torch.empty_like(base[:rows], dtype=exact)
    square = lost = 0.0
    for out, w, d in zip(*(torch.split(t, rows) for t in (folded, base, delta)), strict=True):
        total = totals[: len(w)].copy_(w).add_(d)
        out.copy_(total)
        flat = d.reshape(-1)
        lost += float(torch.dot(total.sub_(out).view(-1), flat))
        square += float(torch.dot(flat, flat))
    return folded, square - lost, square


def _companions(p: Placement, out: Path) -> None:
    for file in p.checkpoint.companions:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(p.checkpoint.path / file, out / file)
    config = dict(p.checkpoint.config)
    if p.dtype:
        name = str(p.dtype).removeprefix("torch.")
        config = _in(config, name) | dict.fromkeys(FORMAT, name)
    if p.untied:
        config = p.layout.architecture.untie(config)
    where = {name: file for file, names in p.files.items() for name in names}
    size = sum(math.prod(p.stored(n).shape) * p.dtype_of(n)[0].itemsize for n in where)
    describe(out, config, where, size)


def _in(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config, and those inside it, with their format named anew where they name one."""
    return {
        key: dtype
        if key in FORMAT and value
        else _in(cast("dict[str, Any]", value), dtype)
        if key.endswith("_config") and isinstance(value, dict)
        else value
        for key, value in config.items()
    }
