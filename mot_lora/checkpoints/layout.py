"""How a checkpoint stores a model's parameters: under which names, transposed, tied, stacked or in pieces."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from mot_lora.checkpoints.architecture import Architecture
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.conversion import Conversion, Way
from mot_lora.errors import UserError

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")

EXPERT = re.compile(r"(.+\.experts\.\w+_proj)s\.(\d+)(?:\.weight)?")
"""One of gpt-oss's stacked experts as Unsloth's linear layers name it: `experts.gate_up_projs.3`."""


@dataclass(frozen=True)
class Target:
    """What an adapter's update is of: a parameter, one expert of it, or a piece that a converter makes it of."""

    name: str
    expert: int | None = None
    way: Way | None = None

    @property
    def is_whole(self) -> bool:
        return self.expert is None and self.way is None


@dataclass(frozen=True)
class Layout:
    """A checkpoint as transformers understands it: where an update, which is [out, in], goes.

    The model itself, without weights, is built only where names and shapes leave a doubt: it takes seconds. Where
    transformers does not have its class, the stored names are taken for the model's.
    """

    checkpoint: Checkpoint

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture(self.checkpoint)

    @property
    def model(self) -> nn.Module | None:
        """The model that the config describes, on no device; None where transformers has no such class."""
        return self.architecture.model

    @cached_property
    def conversion(self) -> Conversion | None:
        """What transformers makes of the stored tensors."""
        return Conversion(self.model, tuple(self.checkpoint.files)) if self.model else None

    @cached_property
    def parameters(self) -> set[str]:
        """The names of the model's parameters."""
        if self.model is None:
            return set(self.checkpoint.files)
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)}

    @property
    def tied(self) -> Mapping[str, str]:
        """Parameters that share another's values: `lm_head.weight` -> `model.embed_tokens.weight`.

        As from_pretrained decides: not where both are stored and differ, and to the one that is stored.
        """
        return self._tied

    @cached_property
    def _tied(self) -> Mapping[str, str]:
        said = self.architecture.tied
        tied: dict[str, str] = {}
        for source in dict.fromkeys(said.values()):
            family = [source, *(name for name, other in said.items() if other == source)]
            first = next((name for name in family if self.holders.get(name)), source)
            tied |= {name: first for name in family if name != first and self._shares(name, first)}
        return tied

    def _shares(self, name: str, other: str) -> bool:
        stored = [self.holders.get(n) for n in (name, other)]
        return not all(stored) or torch.equal(*(self.checkpoint.tensor(s[0]) for s in stored if s))

    @cached_property
    def holders(self) -> Mapping[str, list[str]]:
        """What is stored of a parameter or a piece: under one name, or under several, all of which are one's copies."""
        if self.conversion is None:
            return {name: [name] for name in self.checkpoint.files}
        holders: dict[str, list[str]] = {}
        for name, way in self.conversion.ways.items():
            holders.setdefault(way.piece if way.pattern else way.parameter, []).append(name)
        return holders

    @cached_property
    def made(self) -> Mapping[str, Way]:
        """The parameters that loading makes of stored pieces, and how."""
        if self.conversion is None:
            return {}
        ways = {way.parameter: way for way in self.conversion.ways.values() if way.pattern}
        return {name: way for way in ways.values() for name in self.conversion.parameters(way)}

    def is_plain(self, shapes: Mapping[str, torch.Size]) -> bool:
        """Whether these updates are surely of linear layers stored as they are, [out, in], and tied to nothing."""
        shown = False
        for module, shape in shapes.items():
            stored = self.stored_shape(f"{module}.weight")
            inside = any(part.isdigit() for part in module.split("."))  # of a layer: neither embedding nor head
            if stored is None or stored != tuple(shape) or not inside:
                return False
            shown = shown or (len(shape) == 2 and shape[0] != shape[1])  # a square would not show a transpose
        return shown

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a stored tensor, None when there is none of that name."""
        file = self.checkpoint.files.get(name)
        return file.entries[name].shape if file else None

    # --- what an adapter's names mean ------------------------------------------------------------

    def target(self, module: str) -> Target:
        """What a module's update belongs to: its weight, unless it is named in full.

        A name may be that of this model, of the same in an older or newer transformers, or of its text model alone.

        Errors: UserError for a name that is none of these.
        """
        if module in self._targets:
            return self._targets[module]
        names = (f"{module}.weight", module)
        text_names = (other for name in names for other in self.architecture.text_names(name))
        for name in chain(names, text_names):
            if found := self._target(name):
                self._check_told(found.name)
                return self._targets.setdefault(module, found)
        what = f"{module}: its layer has no bias to add the adapter's to" if module.endswith(".bias") else module
        raise UserError(f"{self.checkpoint.name}: has no {what}, which an adapter updates; is this their base model?")

    def _check_told(self, name: str) -> None:
        """Without the model's class, what shares the values of an embedding or a head is unknown."""
        inside = any(part.isdigit() for part in name.split("."))
        said = [self.checkpoint.config, *(self.checkpoint.config.get(key) or {} for key in TEXT_CONFIGS)]
        ties = {config["tie_word_embeddings"] for config in said if "tie_word_embeddings" in config}
        if self.model or inside or ties == {False}:
            return
        if len(self.stored_shape(name) or ()) > 1:
            kind = ", ".join(self.checkpoint.config.get("architectures") or ["?"])
            raise UserError(
                f"{self.checkpoint.name}: transformers does not know `{kind}`, so whether {name} is tied to another "
                "parameter is unknown; if it is not, set `tie_word_embeddings: false` in its config.json"
            )

    @cached_property
    def _targets(self) -> dict[str, Target]:
        return {}

    def _target(self, name: str) -> Target | None:
        if name in self.parameters:
            return Target(name)
        if self.conversion is None:
            return None
        if (one := EXPERT.fullmatch(name)) and (stacked := self._target(one[1])):
            return Target(stacked.name, int(one[2]))
        way = self.conversion.way(name)
        if way and way.pattern:
            return Target(way.piece, way=way)
        return Target(way.parameter) if way and way.parameter in self.parameters else None

    def parameter(self, module: str) -> str:
        """The model's name for what a module's update is of."""
        return self.target(module).name

    def module(self, name: str) -> nn.Module:
        """A module of the model, by any of its names. UserError when there is none."""
        if self.model is None:
            return nn.Module()
        renamed = self._conversion.renamed(f"{name}.weight").removesuffix(".weight")
        for known in (name, renamed, *self.architecture.text_names(name)):
            try:
                return self.model.get_submodule(known)
            except AttributeError:
                continue
        raise UserError(f"{self.checkpoint.name}: has no {name}, which an adapter updates; is this their base model?")

    def is_beside(self, name: str) -> bool:
        """Whether a parameter, or a stored tensor, is of what stands beside the text model: one that sees or hears."""
        if self.conversion and name not in self.parameters and (way := self.conversion.way(name)):
            name = way.parameter
        return not self.architecture.is_text(name)

    # --- and where it is stored ------------------------------------------------------------------

    def names(self, target: Target) -> list[str]:
        """The stored tensors that an update goes to; of what is tied and not stored, its name if it were."""
        if target.name in self.holders:
            return self.holders[target.name]
        if self.conversion is None:
            return []
        if target.way:
            return [n for p in self.conversion.parameters(target.way) for n in self.names(Target(p))]
        if way := self.made.get(target.name):
            return [n for piece in self.conversion.pieces(way) for n in self._held(piece)]
        return [self.conversion.name_for(target.name)] if target.name in self.tied else []

    def wholes(self, target: Target) -> list[str]:
        """The parameters that an update is of, or of a part of which it is."""
        return self._conversion.parameters(target.way) if target.way else [target.name]

    def shape(self, target: Target) -> torch.Size:
        """The shape of its updates, [out, in]."""
        if target.way:
            return self._conversion.pieces(target.way)[target.name]
        shape = None if self.conversion is None else self.conversion.shapes.get(target.name)
        for name in self.holders.get(self.tied.get(target.name, target.name), ()):
            shape = self.stored_shape(name)
        if way := self.made.get(target.name):
            for piece, wanted in self._conversion.pieces(way).items():
                for name in self._held(piece):
                    if (stored := self.stored_shape(name)) != wanted:
                        raise UserError(f"{self.checkpoint.name}: {name} is {stored}, its config wants {list(wanted)}")
        whole = torch.empty(shape or (), device="meta")
        return self._turned(target, whole if target.expert is None else whole[target.expert]).shape

    def place(self, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Modules' updates, of all modules that share some stored tensor, as what is added to the stored tensors."""
        parameters: dict[str, Tensor] = {}
        pieces: dict[str, dict[str, Tensor]] = {}
        ways: dict[str, Way] = {}
        placed: dict[str, Tensor] = {}
        for module, update in updates.items():
            target = self.target(module)
            if target.name in self.holders and target.way:
                _add(placed, self.holders[target.name], update)
            elif target.way:
                ways[target.way.parameter] = target.way
                _add(pieces.setdefault(target.way.parameter, {}), [target.name], update)
            elif target.expert is None:
                _add(parameters, [target.name], self._turned(target, update))
            else:
                if target.name not in parameters:
                    parameters[target.name] = update.new_zeros(self._conversion.shapes[target.name])
                parameters[target.name][target.expert] += self._turned(target, update)
        for name, some in pieces.items():
            for parameter, update in self._converted(ways[name], some, together=True).items():
                _add(parameters, [parameter], update)
        for way in {way.parameter: way for name in parameters if (way := self.made.get(name))}.values():
            mine = {n: parameters.pop(n) for n in list(parameters) if self.made.get(n) == way}
            for piece, update in self._converted(way, mine, together=False).items():
                _add(placed, self._held(piece), update)
        for name, update in parameters.items():
            _add(placed, self.names(Target(name)), update)
        return placed

    def weight(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A module's weight as it is multiplied with, [out, in]."""
        target = self.target(module)
        if not target.way:
            whole = self._parameter(target.name, dtype)
            return self._turned(target, whole if target.expert is None else whole[target.expert])
        if held := self.holders.get(target.name):
            return self.checkpoint.tensor(held[0]).to(dtype)
        whole = {name: self._parameter(name, dtype) for name in self._conversion.parameters(target.way)}
        return self._converted(target.way, whole, together=False)[target.name]

    def _parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter's values, as the model has them."""
        name = self.tied.get(name, name)
        if held := self.holders.get(name):
            return self.checkpoint.tensor(held[0]).to(dtype)
        if not (way := self.made.get(name)):
            raise UserError(f"{self.checkpoint.name}: has no {name}, which an adapter needs; is this their base model?")
        pieces = {p: self.checkpoint.tensor(self._held(p)[0]).to(dtype) for p in self._conversion.pieces(way)}
        return self._converted(way, pieces, together=True)[name]

    def _turned(self, target: Target, tensor: Tensor) -> Tensor:
        """A parameter's update, [out, in], as the model stores it; and the other way round."""
        owner = None if self.model is None else self.model.get_submodule(target.name.rpartition(".")[0])
        stacked = tensor.ndim == 3 or target.expert is not None
        if stacked and getattr(owner, "is_transposed", False):
            return tensor.mT
        return tensor.T if tensor.ndim == 2 and type(owner).__name__ == "Conv1D" else tensor

    def _converted(self, way: Way, tensors: Mapping[str, Tensor], together: bool) -> dict[str, Tensor]:
        convert = self._conversion.put_together if together else self._conversion.take_apart
        try:
            return convert(way, tensors)
        except (RuntimeError, ValueError, LookupError, NotImplementedError, AttributeError, TypeError) as e:
            raise UserError(
                f"{self.checkpoint.name}: {way.parameter} is stored in pieces that transformers cannot "
                f"{'join' if together else 'make'} one by one ({' '.join(str(e).split())})"
            ) from e

    def _held(self, piece: str) -> list[str]:
        if piece not in self.holders:
            raise UserError(f"{self.checkpoint.name}: has no {piece}, a piece of what an adapter updates")
        return self.holders[piece]

    @property
    def _conversion(self) -> Conversion:
        return cast("Conversion", self.conversion)


def _add(sums: dict[str, Tensor], names: Iterable[str], update: Tensor) -> None:
    for name in names:
        sums[name] = sums[name] + update if name in sums else update
