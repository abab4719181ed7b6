"""Merged updates in a checkpoint: which stored tensors they change, and by what; checked before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mot_lora.checkpoint import Checkpoint
from mot_lora.errors import UserError
from mot_lora.layout import Layout
from mot_lora.lowrank import Adapter
from mot_lora.merged import Merged
from mot_lora.targets import ends, is_target, is_within
from mot_lora.tensorfile import Entry

HEAD = "lm_head"


@dataclass(frozen=True)
class Placement:
    """The updates of a ledger in a checkpoint: which stored tensors they change, and by what."""

    checkpoint: Checkpoint
    ledger: tuple[Merged, ...]
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls, base: str | Path | Checkpoint, merged: Merged | Sequence[Merged], dtype: torch.dtype | None = None
    ) -> "Placement":
        """The updates of one merge, or of a ledger of them, in a checkpoint that is open or is opened here."""
        checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
        return cls(checkpoint, (merged,) if isinstance(merged, Merged) else tuple(merged), dtype)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The updated modules, and the shape of each one's update."""
        return {module: shape for merged in self.ledger for module, shape in merged.shapes.items()}

    @cached_property
    def layout(self) -> Layout:
        """How the checkpoint holds the model's parameters."""
        return Layout(self.checkpoint)

    @cached_property
    def plain(self) -> bool:
        """Whether every update is of a linear layer stored as it is."""
        return self.layout.is_plain(self.shapes)

    @cached_property
    def places(self) -> dict[str, list[str]]:
        """Module -> the stored tensors that its update goes to.

        Errors: UserError for an update that fits none, which says which adapter's it is.
        """
        if self.plain:
            return {module: [f"{module}.weight"] for module in self.shapes}
        places: dict[str, list[str]] = {}
        for module in self.shapes:
            try:
                self.layout.parameter(module)
            except UserError as e:
                raise UserError(f"{e} (adapter {self._whose(module)})") from e
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
            check_complete(adapter, self.layout)
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
        return sum(float(self.read(name).float().square().sum(dtype=torch.float64)) for name in self.places[module])

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

    def stored(self, name: str) -> Entry:
        """What the base stores a tensor as, also one that it ties to another."""
        source = self.untied.get(name, name)
        return self.checkpoint.files[source].entries[source]

    def read(self, name: str) -> Tensor:
        """A tensor of the base, also one that it ties to another."""
        return self.checkpoint.tensor(self.untied.get(name, name))


def check_complete(adapter: Adapter, layout: Layout) -> None:
    """UserError when an adapter's config asks for something of the base for which the adapter has nothing."""
    have = set(adapter.updates)
    saved, parameters = (adapter.targets.get(key) or () for key in ("modules_to_save", "target_parameters"))
    names = [*layout.checkpoint.files, *(layout.parameters if saved or parameters else ())]
    if is_target(adapter.targets, HEAD):  # may be tied, and then is not stored
        names += [name for name in layout.tied if name == f"{HEAD}.weight"]
    for name in names:
        module, _, parameter = name.rpartition(".")
        asked = parameter == "weight" and is_target(adapter.targets, module)
        asked = asked or any(is_within(module, t) for t in saved) or any(ends(name, t) for t in parameters)
        if asked and not have & {name, module if parameter == "weight" else name}:
            raise UserError(
                f"adapter `{adapter.name}`: its config asks for {name}, but it holds nothing for it; "
                "it is damaged or of another base"
            )
