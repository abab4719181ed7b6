"""How a checkpoint's tensors hold a model's parameters: under which names, transposed, tied, stacked or in pieces."""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.conversion import Conversion, Way
from mot_lora.errors import UserError

TEXT = re.compile(r"^(?:(?:model|thinker|language_model|text_model|llm)\.)+")
"""What a text model's names begin with, alone and within models that also see or hear."""

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")

EXPERT = re.compile(r"(.+\.experts\.\w+_proj)s\.(\d+)(?:\.weight)?")
"""One of gpt-oss's stacked experts as Unsloth's linear layers name it: `experts.gate_up_projs.3`."""


@dataclass(frozen=True)
class Spot:
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

    The model itself, without weights, is built only where names and shapes leave a doubt: it takes seconds. Of a class
    that transformers does not have, whose code comes with it, the stored names are the model's.
    """

    checkpoint: Checkpoint

    @cached_property
    def model(self) -> nn.Module | None:
        """The model that the checkpoint's config describes, on no device; None where transformers has no such class."""
        import transformers
        from transformers.utils import logging

        names: list[str] = self.checkpoint.config.get("architectures") or []
        kind: Any = getattr(transformers, names[0], None) if names else transformers.AutoModelForCausalLM
        if kind is None:
            return None
        said = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            config = cast("Any", transformers.AutoConfig).from_pretrained(self.checkpoint.path)
            with torch.device("meta"):
                return kind(config) if names else kind.from_config(config)
        finally:
            logging.set_verbosity(said)

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
        said = cast("dict[str, str]", getattr(self.model, "all_tied_weights_keys", None) or {})
        tied: dict[str, str] = {}
        for source in dict.fromkeys(said.values()):
            family = [source, *(name for name, other in said.items() if other == source)]
            first = next((name for name in family if self.holders.get(name)), source)
            tied |= {name: first for name in family if name != first and self._shares(name, first)}
        return tied

    def untie(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config.json that says of head and embedding that they are apart, on every level that has them.

        Unchanged where the model's class ties them whatever it says (T5): those it leaves apart where they differ.
        """
        if self.model is None:
            return config
        said: Any = self.model.config
        apart = _untied(config, said)
        return config if cast("Any", type(said)).from_dict(deepcopy(apart)).tie_word_embeddings else apart

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

    def spot(self, module: str) -> Spot:
        """What a module's update belongs to: its weight, unless it is named in full.

        A name may be that of this model, of the same in an older or newer transformers, or of its text model alone.

        Errors: UserError for a name that is none of these.
        """
        if module in self._spots:
            return self._spots[module]
        names = (f"{module}.weight", module)
        text_names = (other for name in names for other in self._text_names(name))
        for name in chain(names, text_names):
            if found := self._spot(name):
                self._check_told(found.name)
                return self._spots.setdefault(module, found)
        what = f"{module}: its layer has no bias to take the adapter's up" if module.endswith(".bias") else module
        raise UserError(f"{self.checkpoint.name}: has no {what}, which an adapter updates; is it their base?")

    def _check_told(self, name: str) -> None:
        """Without the model's class it cannot be told what shares the values of an embedding or a head."""
        inside = any(part.isdigit() for part in name.split("."))
        said = [self.checkpoint.config, *(self.checkpoint.config.get(key) or {} for key in TEXT_CONFIGS)]
        ties = {config["tie_word_embeddings"] for config in said if "tie_word_embeddings" in config}
        if self.model or inside or ties == {False}:
            return
        if len(self.stored_shape(name) or ()) > 1:
            kind = ", ".join(self.checkpoint.config.get("architectures") or ["?"])
            raise UserError(
                f"{self.checkpoint.name}: transformers has no `{kind}`, so that it cannot be told whether {name} is "
                "tied to another; if not, say `tie_word_embeddings: false` in its config.json"
            )

    @cached_property
    def _spots(self) -> dict[str, Spot]:
        return {}

    def _spot(self, name: str) -> Spot | None:
        if name in self.parameters:
            return Spot(name)
        if self.conversion is None:
            return None
        if (one := EXPERT.fullmatch(name)) and (stacked := self._spot(one[1])):
            return Spot(stacked.name, int(one[2]))
        way = self.conversion.way(name)
        if way and way.pattern:
            return Spot(way.piece, way=way)
        return Spot(way.parameter) if way and way.parameter in self.parameters else None

    def _text_names(self, name: str) -> Iterator[str]:
        """What the text model's part of this name may be called here."""
        model: Any = self.model
        rest = TEXT.sub("", name)
        if model is None:
            return
        if rest.startswith("lm_head."):
            part, rest = model.get_output_embeddings(), rest.removeprefix("lm_head.")
        else:
            part = model.get_decoder()
        for where in (name for name, module in model.named_modules() if name and module is part):
            yield from (f"{where}.{rest}", f"{where}.model.{rest}")

    def parameter(self, module: str) -> str:
        """The model's name for what a module's update is of."""
        return self.spot(module).name

    def module(self, name: str) -> nn.Module:
        """A module of the model, by any of its names. UserError when there is none."""
        if self.model is None:
            return nn.Module()
        renamed = self._conversion.renamed(f"{name}.weight").removesuffix(".weight")
        for known in (name, renamed, *self._text_names(name)):
            try:
                return self.model.get_submodule(known)
            except AttributeError:
                continue
        raise UserError(f"{self.checkpoint.name}: has no {name}, which an adapter updates; is it their base?")

    def is_beside(self, name: str) -> bool:
        """Whether a parameter, or a stored tensor, is of what stands beside the text model: one that sees or hears."""
        if self.conversion and name not in self.parameters and (way := self.conversion.way(name)):
            name = way.parameter
        return bool(self._text) and not name.startswith(self._text)

    @cached_property
    def _text(self) -> tuple[str, ...]:
        """What the names of the text model's parameters and of its head begin with, where it is not all there is."""
        model: Any = self.model
        if model is None or model.config.is_encoder_decoder:
            return ()
        parts = (model.get_decoder(), model.get_output_embeddings())
        return tuple(f"{n}." for n, m in model.named_modules() if n and any(m is part for part in parts))

    # --- and where it is stored ------------------------------------------------------------------

    def names(self, spot: Spot) -> list[str]:
        """The stored tensors that an update goes to; of what is tied and not stored, its name if it were."""
        if spot.name in self.holders:
            return self.holders[spot.name]
        if self.conversion is None:
            return []
        if spot.way:
            return [n for p in self.conversion.parameters(spot.way) for n in self.names(Spot(p))]
        if way := self.made.get(spot.name):
            return [n for piece in self.conversion.pieces(way) for n in self._held(piece)]
        return [self.conversion.name_for(spot.name)] if spot.name in self.tied else []

    def wholes(self, spot: Spot) -> list[str]:
        """The parameters that an update is of, or of a part of which it is."""
        return self._conversion.parameters(spot.way) if spot.way else [spot.name]

    def shape(self, spot: Spot) -> torch.Size:
        """The shape of its updates, [out, in]."""
        if spot.way:
            return self._conversion.pieces(spot.way)[spot.name]
        shape = None if self.conversion is None else self.conversion.shapes.get(spot.name)
        for name in self.holders.get(self.tied.get(spot.name, spot.name), ()):
            shape = self.stored_shape(name)
        if way := self.made.get(spot.name):
            for piece, wanted in self._conversion.pieces(way).items():
                for name in self._held(piece):
                    if (stored := self.stored_shape(name)) != wanted:
                        raise UserError(f"{self.checkpoint.name}: {name} is {stored}, its config wants {list(wanted)}")
        whole = torch.empty(shape or (), device="meta")
        return self._turned(spot, whole if spot.expert is None else whole[spot.expert]).shape

    def place(self, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Modules' updates, of all modules that share some stored tensor, as what is added to the stored tensors."""
        parameters: dict[str, Tensor] = {}
        pieces: dict[str, dict[str, Tensor]] = {}
        ways: dict[str, Way] = {}
        placed: dict[str, Tensor] = {}
        for module, update in updates.items():
            spot = self.spot(module)
            if spot.name in self.holders and spot.way:
                _add(placed, self.holders[spot.name], update)
            elif spot.way:
                ways[spot.way.parameter] = spot.way
                _add(pieces.setdefault(spot.way.parameter, {}), [spot.name], update)
            elif spot.expert is None:
                _add(parameters, [spot.name], self._turned(spot, update))
            else:
                if spot.name not in parameters:
                    parameters[spot.name] = update.new_zeros(self._conversion.shapes[spot.name])
                parameters[spot.name][spot.expert] += self._turned(spot, update)
        for name, some in pieces.items():
            for parameter, update in self._converted(ways[name], some, together=True).items():
                _add(parameters, [parameter], update)
        for way in {way.parameter: way for name in parameters if (way := self.made.get(name))}.values():
            mine = {n: parameters.pop(n) for n in list(parameters) if self.made.get(n) == way}
            for piece, update in self._converted(way, mine, together=False).items():
                _add(placed, self._held(piece), update)
        for name, update in parameters.items():
            _add(placed, self.names(Spot(name)), update)
        return placed

    def weight(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A module's weight as it is multiplied with, [out, in]."""
        spot = self.spot(module)
        if not spot.way:
            whole = self._parameter(spot.name, dtype)
            return self._turned(spot, whole if spot.expert is None else whole[spot.expert])
        if held := self.holders.get(spot.name):
            return self.checkpoint.tensor(held[0]).to(dtype)
        whole = {name: self._parameter(name, dtype) for name in self._conversion.parameters(spot.way)}
        return self._converted(spot.way, whole, together=False)[spot.name]

    def _parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter's values, as the model has them."""
        name = self.tied.get(name, name)
        if held := self.holders.get(name):
            return self.checkpoint.tensor(held[0]).to(dtype)
        if not (way := self.made.get(name)):
            raise UserError(f"{self.checkpoint.name}: has no {name}, which an adapter needs; is it their base?")
        pieces = {p: self.checkpoint.tensor(self._held(p)[0]).to(dtype) for p in self._conversion.pieces(way)}
        return self._converted(way, pieces, together=True)[name]

    def _turned(self, spot: Spot, tensor: Tensor) -> Tensor:
        """A parameter's update, [out, in], as the model stores it; and the other way round."""
        owner = None if self.model is None else self.model.get_submodule(spot.name.rpartition(".")[0])
        stacked = tensor.ndim == 3 or spot.expert is not None
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


def _untied(config: dict[str, Any], said: Any) -> dict[str, Any]:
    """A config.json without ties, on each level on which the config that was made of it has one."""
    inner = {
        key: _untied(cast("dict[str, Any]", config[key]), getattr(said, key))
        for key in said.sub_configs
        if isinstance(config.get(key), dict)
    }
    tied = "tie_word_embeddings" in config or getattr(said, "tie_word_embeddings", False)
    return {**config, **inner, **({"tie_word_embeddings": False} if tied else {})}
