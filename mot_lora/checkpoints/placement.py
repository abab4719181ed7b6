"""Merged updates in a checkpoint: which stored tensors they change, and by what; checked before anything is written."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.layout import Layout, Target
from mot_lora.checkpoints.loading import load
from mot_lora.checkpoints.targets import ends, is_target, is_within
from mot_lora.checkpoints.tensorfile import Entry
from mot_lora.errors import UserError
from mot_lora.merging.lowrank import Adapter
from mot_lora.merging.merged import Merged

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
    def targets(self) -> dict[str, Target]:
        """What each module's update is of.

        Errors: UserError for an update that fits nothing of the base, which says which adapter's it is.
        """
        targets: dict[str, Target] = {}
        for module, shape in self.shapes.items():
            try:
                target = targets[module] = self.layout.target(module)
                wanted = self.layout.shape(target)
            except UserError as e:
                raise UserError(f"{e} (adapter {self._adapters_of(module)})") from e
            if wanted != shape:
                name = next(iter(self.layout.names(target)), target.name)
                raise UserError(
                    f"{self.checkpoint.name}: {name} is {list(wanted)}, the update of {module} by adapter "
                    f"{self._adapters_of(module)} {list(shape)}; is this their base model?"
                )
        return targets

    @cached_property
    def units(self) -> dict[str, list[str]]:
        """The updated modules in groups, by name: those that share a stored tensor are one group."""
        if self.plain:
            return {module: [module] for module in self.shapes}
        together: dict[str, list[str]] = {}
        held = {module: self._held(module) for module in self.shapes}
        for module, names in held.items():
            members = [module]
            for other in {id(together[n]): together[n] for n in names if n in together}.values():
                members += other
            together |= {n: members for m in members for n in held[m]}
        units: dict[str, list[str]] = {}
        for module in self.shapes:
            first, *others = together[held[module][0]] if held[module] else [module]
            name = self.layout.wholes(self.targets[first])[0].removesuffix(".weight") if others else module
            units.setdefault(name, []).append(module)
        return units

    @cached_property
    def places(self) -> dict[str, list[str]]:
        """Unit -> the stored tensors that its updates go to."""
        if self.plain:
            return {module: [f"{module}.weight"] for module in self.shapes}
        return {
            unit: list(dict.fromkeys(n for module in modules for n in self._held(module)))
            for unit, modules in self.units.items()
        }

    def _held(self, module: str) -> list[str]:
        names = self.layout.names(self.targets[module])
        if not names:
            raise UserError(
                f"{self.checkpoint.name}: has no {self.targets[module].name}, which {self._adapters_of(module)} updates"
            )
        return [n for n in names if n in self.checkpoint.files or n in self.untied]  # else it stays tied

    @cached_property
    def untied(self) -> dict[str, str]:
        """What the base ties and the folded model stores apart -> the tensor that holds its values in the base."""
        if self.plain:
            return {}
        modules = {target.name: module for module, target in self.targets.items()}
        apart = {
            name
            for name, source in self.layout.tied.items()
            if (name in modules or source in modules) and not self._alike(modules.get(name), modules.get(source))
        }
        if apart and self.layout.architecture.untie(self.checkpoint.config) != self.checkpoint.config:
            apart = self.layout.tied.keys()  # without ties all that shared is written
        return {
            written: self.layout.names(Target(self.layout.tied[name]))[0]
            for name in apart
            for written in self.layout.names(Target(name))
        }

    def _alike(self, module: str | None, other: str | None) -> bool:
        if module is None or other is None:
            return module is other
        return all(
            module in m.shapes and other in m.shapes and torch.equal(m.delta(module), m.delta(other))
            for m in self.ledger
        )

    def _adapters_of(self, module: str) -> str:
        return ", ".join(f"`{a.name}`" for m in self.ledger for a in m.adapters if module in a.updates)

    def check(self) -> None:
        """Find every mistake that can be found before anything is written."""
        assert self.places is not None  # an update that fits nothing is the first mistake to report
        for adapter in (a for m in self.ledger for a in m.adapters):
            check_complete(adapter, self.layout, self.plain)
        if not self.plain and not all(m.method == "linear" and m.space is None for m in self.ledger):
            self._check_apart()

    def _check_apart(self) -> None:
        """A method that is not linear has to see all updates of a parameter together, under one name."""
        taken: dict[tuple[str, int | None], str] = {}
        partly: dict[str, str] = {}
        for module, target in self.targets.items():
            whole = self.layout.wholes(target)
            other = taken.get((target.name, target.expert)) or next(
                (m for n in whole if (m := taken.get((n, None)))), None
            )
            if not target.is_whole:
                partly |= dict.fromkeys(whole, module)
            elif not other:
                other = partly.get(target.name)
            if other:
                raise UserError(
                    f"{target.name}: adapters update it under two names, {module} and {other}; save them in one "
                    "layout, or merge with method linear"
                )
            taken[target.name, target.expert] = module

    def pieces(self, unit: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the ledger adds to the stored tensors that hold one unit."""
        if self.plain:
            return {f"{unit}.weight": self._delta(unit, dtype)}
        placed = self.layout.place({module: self._delta(module, dtype) for module in self.units[unit]})
        return {name: placed[name] for name in self.places[unit]}

    def _delta(self, module: str, dtype: torch.dtype) -> Tensor:
        first, *others = (m for m in self.ledger if module in m.shapes)
        delta = first.delta(module, dtype)
        for m in others:
            delta += m.delta(module, dtype)
        return delta

    def base_square(self, module: str) -> float:
        """|W|^2 of one module's weight."""
        weight = self.checkpoint.tensor(f"{module}.weight") if self.plain else self.layout.weight(module)
        return float(weight.float().square().sum(dtype=torch.float64))

    def dtype_of(self, name: str) -> tuple[torch.dtype, torch.dtype]:
        """What a tensor is written in, and what it is computed in."""
        source = self.untied.get(name, name)
        stored = self.checkpoint.files[source].entries[source].dtype
        to = self.dtype if self.dtype and stored.is_floating_point else stored
        if to != stored and source in self.kept:
            to = torch.float32
        exact = torch.float64 if torch.float32 in (stored, to) or torch.float64 in (stored, to) else torch.float32
        return to, exact

    @cached_property
    def kept(self) -> set[str]:
        """The stored tensors that transformers holds in fp32 where it loads the model in `dtype`: routers' corrections.

        Where it has no such class, those that a model of 16 bits stores in fp32.
        """
        try:
            loaded = load(self.checkpoint, self.dtype)
        except UserError:
            loaded = None
        if loaded is None:
            formats = {name: file.entries[name].dtype for name, file in self.checkpoint.files.items()}
            is_mixed = any(dtype in (torch.bfloat16, torch.float16) for dtype in formats.values())
            return {name for name, dtype in formats.items() if is_mixed and dtype == torch.float32}
        held = {name: t.dtype for name, t in loaded.model.state_dict().items()}
        ways = self.layout.conversion.ways if self.layout.conversion else {}
        return {name for name, way in ways.items() if held.get(way.parameter) == torch.float32 != self.dtype}

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


def check_complete(adapter: Adapter, layout: Layout, plain: bool) -> None:
    """UserError when an adapter's config asks for something of the base for which the adapter has nothing.

    The config speaks of the model that was trained: its names are the stored ones where the adapter's own are, and
    those of this model otherwise. An adapter of the text model alone has nothing of what sees or hears beside it.
    """
    missing = _missing(adapter, layout.checkpoint.files, {f"{module}.weight" for module in adapter.updates})
    whole = any(adapter.targets.get(key) for key in ("modules_to_save", "target_parameters"))
    if plain and not missing and not whole and not is_target(adapter.targets, HEAD):
        return
    targets = {module: layout.target(module) for module in adapter.updates}
    have = {name for target in targets.values() for name in (target.name, *layout.names(target))}
    stored = layout.checkpoint.files
    speaks_stored = any(n in stored and n not in layout.parameters for m in targets for n in (f"{m}.weight", m))
    own = stored if speaks_stored else sorted(layout.parameters)
    beside = any(layout.is_beside(name) for name in have)
    if missing := [name for name in _missing(adapter, own, have) if beside or not layout.is_beside(name)]:
        raise UserError(
            f"adapter `{adapter.name}`: its config asks for {missing[0]}, but it holds nothing for it; "
            "it is damaged or of another base"
        )


def _missing(adapter: Adapter, names: Iterable[str], have: Container[str]) -> list[str]:
    """Those of the names that an adapter's config asks for and that it does not have."""
    saved, parameters = (adapter.targets.get(key) or () for key in ("modules_to_save", "target_parameters"))
    missing: list[str] = []
    for name in names:
        module, _, parameter = name.rpartition(".")
        asked = parameter == "weight" and is_target(adapter.targets, module)
        asked = asked or any(is_within(module, t) for t in saved) or any(ends(name, t) for t in parameters)
        if asked and name not in have:
            missing.append(name)
    return missing
