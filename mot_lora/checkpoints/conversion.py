"""What transformers makes of stored tensors: the model's parameters, under other names, stacked, split or turned."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Way:
    """What a stored tensor becomes when it is loaded: a parameter, or with others a part of one.

    `pattern` is that of the converter that it goes through, None where it is only renamed; `piece` its name there.
    """

    parameter: str
    piece: str
    pattern: str | None = None


@dataclass(frozen=True)
class Conversion:
    """The weight conversions of a transformers model for a checkpoint's tensors, either way, for names and updates.

    All of them are linear: what is added to a parameter is, taken apart, what is added to the tensors it is made of.
    """

    model: nn.Module
    stored: Iterable[str]

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The model's parameters and buffers; a parameter that is tied has all its names."""
        parameters = {n: p.shape for n, p in self.model.named_parameters(remove_duplicate=False)}
        return {n: t.shape for n, t in self.model.state_dict().items()} | parameters

    @cached_property
    def ways(self) -> dict[str, Way]:
        """The way of each stored tensor that is loaded, in the order in which they are."""
        from transformers.core_model_loading import dot_natural_key

        found = ((name, self.way(name)) for name in sorted(self.stored, key=dot_natural_key))
        return {name: way for name, way in found if way}

    def way(self, name: str) -> Way | None:
        """What a tensor that is stored under this name becomes; None where it is not loaded."""
        found, pattern = self._rename(name, self._renamings, self._converters)
        if found not in self.shapes and name in self.shapes:  # it was right as it is
            found, pattern = self._rename(name, [], [])
        if found not in self.shapes:
            return None
        return Way(found, self._bare(self.renamed(name)), pattern)

    def renamed(self, name: str) -> str:
        """A stored tensor's name as loading changes it, whether there is such a parameter or not."""
        return self._rename(name, self._renamings, [])[0]

    def name_for(self, parameter: str) -> str:
        """What a parameter would be stored under in this checkpoint: as its other tensors are named."""
        older = parameter
        for renaming in reversed(self._renamings):
            older = renaming.reverse_transform().rename_source_key(older)[0]
        begun = {name.partition(".")[0] for name in self.stored}
        for name in (older, self._bare(older), parameter, self._bare(parameter)):
            found = self.way(name)
            if name.partition(".")[0] in begun and found and found.parameter == parameter:
                return name
        return parameter

    def parameters(self, way: Way) -> list[str]:
        """All parameters that are made together with that of `way`."""
        if way.pattern is None:
            return [way.parameter]
        first, *others = self._by_pattern[way.pattern].target_patterns
        return [way.parameter, *(way.parameter.replace(first, other, 1) for other in others)]

    def pieces(self, way: Way) -> dict[str, torch.Size]:
        """The pieces that a converter makes its parameters of, and their shapes."""
        if way.parameter not in self._pieces:
            whole = {n: torch.empty(self.shapes[n], device="meta") for n in self.parameters(way)}
            self._pieces[way.parameter] = {name: piece.shape for name, piece in self.take_apart(way, whole).items()}
        return self._pieces[way.parameter]

    def take_apart(self, way: Way, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Updates of a converter's parameters as updates of its pieces. None of a parameter is an update of 0."""
        some = next(iter(updates.values()))
        reverse = self._by_pattern[cast("str", way.pattern)].reverse_transform()
        first = way.parameter
        for name in self.parameters(way):
            update = updates[name] if name in updates else some.new_zeros(self.shapes[name])
            first, pattern = reverse.rename_source_key(name)
            reverse.add_tensor(first, name, pattern, update)
        made = reverse.convert(first, model=self.model, config=self.model.config)
        return {self._bare(name): _single(piece) for name, piece in made.items()}

    def put_together(self, way: Way, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Updates of a converter's pieces as updates of its parameters. None of a piece is an update of 0."""
        from transformers.core_model_loading import dot_natural_key

        some = next(iter(updates.values()))
        converter = deepcopy(self._by_pattern[cast("str", way.pattern)])
        full = f"{self._prefix}." if self._prefix and way.parameter.startswith(f"{self._prefix}.") else ""
        pieces = self.pieces(way)
        for name in sorted(pieces, key=dot_natural_key):
            update = updates[name] if name in updates else some.new_zeros(pieces[name])
            converter.add_tensor(way.parameter, name, converter.rename_source_key(full + name)[1], update)
        made = converter.convert(way.parameter, model=self.model, config=self.model.config)
        return {name: _single(parameter) for name, parameter in made.items()}

    def _rename(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key  # pyright: ignore[reportUnknownVariableType]

        return rename_source_key(name, renamings, converters, self._prefix, cast("Any", self.shapes))

    @cached_property
    def _transforms(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return cast("list[Any]", get_model_conversion_mapping(cast("Any", self.model)))

    @cached_property
    def _renamings(self) -> list[Any]:
        from transformers.core_model_loading import WeightRenaming

        return [t for t in self._transforms if isinstance(t, WeightRenaming)]

    @cached_property
    def _converters(self) -> list[Any]:
        from transformers.core_model_loading import WeightConverter

        return [t for t in self._transforms if isinstance(t, WeightConverter)]

    @cached_property
    def _by_pattern(self) -> dict[str, Any]:
        return {pattern: converter for converter in self._converters for pattern in converter.source_patterns}

    @cached_property
    def _pieces(self) -> dict[str, dict[str, torch.Size]]:
        return {}

    @property
    def _prefix(self) -> str:
        return cast("str", self.model.base_model_prefix)

    def _bare(self, name: str) -> str:
        """A name without the base model's prefix, which stored names may have or not."""
        return name.removeprefix(f"{self._prefix}.") if self._prefix else name


def _single(tensor: Any) -> Tensor:
    return cast("Tensor", tensor[0] if isinstance(tensor, list) else tensor)
