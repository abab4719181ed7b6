"""Merged updates written into a full checkpoint on disk: W_0 + D, a tensor at a time, rounded once; and checked."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mot_lora.adapters import is_target
from mot_lora.checkpoint import COMPANIONS, INDEX_FILE, Checkpoint
from mot_lora.errors import UserError
from mot_lora.layout import Layout
from mot_lora.lowrank import Adapter
from mot_lora.merged import Merged
from mot_lora.progress import Progress, silent
from mot_lora.records import VerifiedTensor, VerifyRecord
from mot_lora.tensorfile import TensorFile, write_tensors

SLACK = 0.01  # units of rounding that sums in fp32 may add to the rounding itself
ROWS = 1 << 22  # entries that are compared at once


def fold_checkpoint(
    base: str | Path | Checkpoint,
    merged: Merged | Sequence[Merged],
    out: str | Path,
    dtype: torch.dtype | None = None,
    card: str | None = None,
    verify: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write W_0 + the merged updates as a full checkpoint that transformers loads, a tensor at a time.

    Each weight is summed in fp32 (in fp64 where it is stored or written in fp32) and rounded once, to `dtype` or to
    what the base is stored in. Memory is bounded by one tensor, whatever the number of adapters. Embeddings and head
    that are tied in the base and get different updates are written apart. All is written to a temporary folder beside
    `out` and renamed: `out` is whole or not there. With `verify`, it is read back before (see `verify_checkpoint`).

    Errors: UserError when `out` exists, an update fits no tensor of the base, or what was read back is not W_0 + D.

    >>> fold_checkpoint("Qwen/Qwen3-0.6B", merge_adapters(["a", "b"]), "merged")  # doctest: +SKIP
    """
    fold = Fold(base if isinstance(base, Checkpoint) else Checkpoint.open(base), _ledger(merged), dtype)
    fold.check()
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists; choose another --out, nothing is overwritten")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        fold.write(partial, progress)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        if verify:
            fold.verify(partial, progress)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except (OSError, SafetensorError) as e:  # safetensors has its own for a disk that is full
        raise UserError(f"{out}: cannot be written: {getattr(e, 'strerror', None) or e}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def verify_checkpoint(
    base: str | Path | Checkpoint,
    merged: Merged | Sequence[Merged],
    out: str | Path,
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> VerifyRecord:
    """Read a folded checkpoint back, and say of every tensor how far it is from W_0 + D.

    Arguments as they were in `fold_checkpoint`. The sum is made anew in fp64; an error of up to one unit (half a step
    of the format) is what rounding once costs. Every other tensor must be the base's own, bit by bit.

    Errors: UserError, which names the tensor, for one that is missing or further off.
    """
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    return Fold(checkpoint, _ledger(merged), dtype).verify(Path(out), progress)


def _ledger(merged: Merged | Sequence[Merged]) -> tuple[Merged, ...]:
    return (merged,) if isinstance(merged, Merged) else tuple(merged)


@dataclass(frozen=True)
class Fold:
    """One fold: which tensors of the checkpoint the updates change, and what they become."""

    checkpoint: Checkpoint
    ledger: tuple[Merged, ...]
    dtype: torch.dtype | None = None

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The updated modules, and the shape of each one's update."""
        return {module: shape for merged in self.ledger for module, shape in merged.shapes.items()}

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.checkpoint)

    @cached_property
    def plain(self) -> bool:
        return self.layout.is_plain(self.shapes)

    @cached_property
    def places(self) -> dict[str, list[str]]:
        """Module -> the stored tensors that its update goes to.

        Errors: UserError for an update that fits none, which says which adapter's it is.
        """
        if self.plain:
            return {module: [f"{module}.weight"] for module in self.shapes}
        places: dict[str, list[str]] = {}
        for module, shape in self.shapes.items():
            try:
                pieces = self.layout.place(module, torch.empty(shape, device="meta"))
            except UserError as e:
                raise UserError(f"{e} (adapter {self._whose(module)})") from e
            for name, piece in pieces.items():
                stored = self.layout.stored_shape(self.untied.get(name, name))
                if stored is None and name in self.layout.tied:
                    continue  # stays tied: what it shares gets the same update
                if stored is None:
                    raise UserError(f"{self.checkpoint.name}: has no {name}, which {self._whose(module)} updates")
                if stored != tuple(piece.shape):
                    raise UserError(
                        f"{self.checkpoint.name}: {name} is {list(stored)}, the update of {module} by adapter "
                        f"{self._whose(module)} {list(shape)}; is it their base?"
                    )
            places[module] = [name for name in pieces if self.layout.stored_shape(self.untied.get(name, name))]
        return places

    @cached_property
    def untied(self) -> dict[str, str]:
        """Parameters that the base ties to another, and the folded model no more: its updates tell them apart."""
        if self.plain:
            return {}
        names = {self.layout.parameter(module): module for module in self.shapes}
        return {
            name: source
            for name, source in self.layout.tied.items()
            if (name in names or source in names) and not self._alike(names.get(name), names.get(source))
        }

    def _alike(self, module: str | None, other: str | None) -> bool:
        if module is None or other is None:
            return False
        return all(
            module in m.shapes and other in m.shapes and torch.equal(m.delta(module), m.delta(other))
            for m in self.ledger
        )

    def _whose(self, module: str) -> str:
        return ", ".join(f"`{a.name}`" for m in self.ledger for a in m.adapters if module in a.updates)

    def check(self) -> None:
        """Everything that can be known to be wrong before anything is written."""
        for adapter in (a for m in self.ledger for a in m.adapters):
            check_complete(adapter, self.checkpoint)
        taken: dict[str, str] = {}
        for module, names in self.places.items():
            for name in names:
                if taken.setdefault(name, module) != module:
                    raise UserError(
                        f"{name}: updated as {module} and as {taken[name]}: adapters of two layouts; save them alike"
                    )

    def pieces(self, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the ledger adds to the stored tensors that hold one module."""
        first, *others = (m for m in self.ledger if module in m.shapes)
        delta = first.delta(module, dtype)
        for m in others:
            delta += m.delta(module, dtype)
        return {f"{module}.weight": delta} if self.plain else self.layout.place(module, delta)

    def base_square(self, module: str) -> float:
        """|W|^2 of what one module is stored in."""
        return sum(float(self._read(name).float().square().sum(dtype=torch.float64)) for name in self.places[module])

    def dtype_of(self, name: str) -> tuple[torch.dtype, torch.dtype]:
        """What a tensor is written in, and what it is computed in."""
        source = self.untied.get(name, name)
        stored = self.checkpoint.files[source].entries[source].dtype
        to = self.dtype if self.dtype and stored.is_floating_point else stored
        exact = torch.float64 if torch.float32 in (stored, to) or torch.float64 in (stored, to) else torch.float32
        return to, exact

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """File name -> the tensors that it is to hold."""
        files: dict[str, list[str]] = {}
        for name, file in self.checkpoint.files.items():
            files.setdefault(file.path.name, []).append(name)
        for name, source in self.untied.items():
            if name not in self.checkpoint.files:
                files[self.checkpoint.files[source].path.name].append(name)
        return files

    def write(self, out: Path, progress: Progress) -> None:
        done, total = 0, sum(map(len, self.files.values()))
        for file, names in self.files.items():
            entries = {n: (self.dtype_of(n)[0], self._stored(n).shape) for n in names}

            def counted(names: list[str] = names) -> Iterator[tuple[str, Tensor | TensorFile]]:
                nonlocal done
                for pair in self.tensors(names):
                    yield pair
                    done += 1
                    progress("write", done, total)

            write_tensors(out / file, entries, counted())
        self._companions(out)

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor | TensorFile]]:
        """The tensors of one file as they are to be; those of one module one after the other."""
        module_of = {name: module for module, places in self.places.items() for name in places}
        here = set(names)
        for module in dict.fromkeys(module_of[n] for n in names if n in module_of):
            pieces: dict[str, Tensor] = {}
            for name in self.places[module]:
                if name in here:
                    to, exact = self.dtype_of(name)
                    pieces = pieces or self.pieces(module, exact)
                    yield name, self._read(name).to(exact).add_(pieces[name]).to(to)
        for name in names:
            if name not in module_of:
                file = self.checkpoint.files.get(name)
                same = (
                    file is not None and name not in self.untied and self.dtype_of(name)[0] == self._stored(name).dtype
                )
                yield name, file if file is not None and same else self._read(name).to(self.dtype_of(name)[0])

    def verify(self, out: Path, progress: Progress) -> VerifyRecord:
        """Read what was written, and hold every tensor against what it should be."""
        written = Checkpoint.open(out)
        names = {name for listed in self.files.values() for name in listed}
        if wrong := names ^ set(written.files):
            raise UserError(f"{out}: {min(wrong)} is missing, or should not be there; fold again")
        found: dict[str, VerifiedTensor] = {}
        for module, places in self.places.items():
            if not places:
                continue
            exact = torch.float64 if all(m.method == "linear" for m in self.ledger) else self.dtype_of(places[0])[1]
            pieces = self.pieces(module, exact)
            for name in places:
                found[name] = _compare(written.tensor(name), self._read(name), pieces[name])
                progress("verify", len(found), len(names))
                if not found[name].error <= 1 + SLACK:
                    raise UserError(
                        f"{out}: {name} is {found[name].error:.3g} units of rounding from W_0 + D; fold again, and "
                        "if it stays, the disk or memory is faulty"
                    )
        for done, name in enumerate(sorted(names - set(found)), len(found) + 1):
            if not torch.equal(written.tensor(name), self._read(name).to(self.dtype_of(name)[0])):
                raise UserError(f"{out}: {name} is not the base's; fold again, and if it stays, the disk is faulty")
            progress("verify", done, len(names))
        return VerifyRecord(tensors=found, untouched=len(names) - len(found))

    def _stored(self, name: str) -> Any:
        source = self.untied.get(name, name)
        return self.checkpoint.files[source].entries[source]

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.tensor(self.untied.get(name, name))

    def _companions(self, out: Path) -> None:
        for pattern in COMPANIONS:
            for file in self.checkpoint.path.glob(pattern):
                if file.name not in ("config.json", INDEX_FILE):
                    shutil.copyfile(file, out / file.name)
        config = dict(self.checkpoint.config)
        if self.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.untied:
            config["tie_word_embeddings"] = False
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if set(self.files) != {"model.safetensors"}:
            where = {name: file for file, names in self.files.items() for name in names}
            size = sum(self._stored(n).shape.numel() * self.dtype_of(n)[0].itemsize for n in where)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
            (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _compare(written: Tensor, base: Tensor, delta: Tensor) -> VerifiedTensor:
    """One written tensor against base + delta, in fp64, some rows at a time."""
    update_sq = kept = error = 0.0
    info = torch.finfo(written.dtype)
    for new, old, d in zip(*(t.flatten().split(ROWS) for t in (written, base, delta)), strict=True):
        new, old, d = new.double(), old.double(), d.double()
        target = old + d
        _, exponent = torch.frexp(torch.maximum(target.abs(), new.abs()).clamp(min=info.tiny))
        unit = torch.exp2(exponent.double()) * (info.eps / 4)  # half a step; frexp's mantissa is in [0.5, 1)
        update_sq += float(d.square().sum())
        kept += float(((new - old) * d).sum())
        error = max(error, float(((new - target).abs() / unit).max()))
    return VerifiedTensor(update_norm=update_sq**0.5, survived=kept / update_sq if update_sq else None, error=error)


def check_complete(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """UserError when an adapter's config targets a linear layer of the base for which the adapter has nothing."""
    have = set(adapter.updates)
    for name in checkpoint.files:
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and module not in have and is_target(adapter.targets, module):
            raise UserError(
                f"adapter `{adapter.name}`: its config targets {module}, but it holds nothing for it; "
                "it is damaged or of another base"
            )
