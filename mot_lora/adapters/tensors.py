"""PEFT's tensors of every kind as updates of the base's parameters, or refused by name."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mot_lora.adapters.wrappers import PREFIX, unwrapped
from mot_lora.checkpoints.targets import ends, is_target, is_within, refusal
from mot_lora.errors import UserError
from mot_lora.merging.lowrank import Dense, Factors, Form, Origin, Update, concatenate
from mot_lora.patterns import first_match

CONFIG_FILE = "adapter_config.json"

CLASSIFIERS = ("classifier", "score")

Read = Callable[[str], Tensor]
Maker = Callable[[Read], Update]


class Base(Protocol):
    """What some adapters need of their base: a parameter's values as they are multiplied with, and its modules."""

    @property
    def tied(self) -> Mapping[str, str]: ...
    def parameter(self, module: str) -> str: ...
    def module(self, name: str) -> nn.Module: ...
    def weight(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor: ...


UNGATHERED = "it was saved empty, as DeepSpeed ZeRO-3 does with what it has not gathered: save it again"


@dataclass
class Source:
    """An adapter's config, in PEFT's names, and its tensors, wherever they come from; it makes updates of them.

    `label` is what errors name; `open_base` gives the base when an update first needs it.
    """

    label: str
    config: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]
    read: Read
    open_base: Callable[[], Base]
    scaling: Callable[[str], float] | None = None
    _base: Base | None = None

    @property
    def base(self) -> Base:
        self._base = self._base or self.open_base()
        return self._base

    def updates(self) -> Mapping[str, Update]:
        """Every update of the adapter, made when it is asked for.

        Errors: UserError for what cannot be exact, and for any tensor that belongs to nothing.
        """
        if why := refusal(self.config):
            raise UserError(f"{self.label}: cannot be merged exactly: {why}")
        groups: dict[str, dict[str, str]] = {}
        for key, name in unwrapped(self.shapes, self.label, self._same).items():
            module, kind = _classify(name, key, self.label)
            if any(part.startswith("_") for part in module.split(".")):
                self._check_module(module, key)
            groups.setdefault(module, {})[kind] = key
        makers: dict[str, Maker] = {}
        for module in _in_order(groups):
            for key, make in self._module(module, groups[module], groups).items():
                makers[key] = self._sum(key, makers[key], make) if key in makers else make
        if not makers:
            raise UserError(f"{self.label}: holds no LoRA factors")
        self._check_targets(groups, makers)
        return Made(makers, self.read, lambda key: torch.empty(self.shapes[key], device="meta"))

    def _same(self, one: str, other: str) -> bool:
        return torch.equal(self.read(one), self.read(other))

    def _module(
        self, module: str, keys: Mapping[str, str], groups: Mapping[str, Mapping[str, str]]
    ) -> dict[str, Maker]:
        """The updates that one module's tensors are."""
        left = dict(keys)
        out: dict[str, Maker] = {}
        name = module.replace(".base_layer", "")
        if tokens := left.pop("tokens", None):
            out |= self._tokens(name, tokens, groups)
        embedding = "embedding_A" in left or "embedding_B" in left
        pair = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        if any(kind in left for kind in pair):
            if not all(kind in left for kind in pair):
                raise UserError(f"{self.label}: module {name} has only its lora_{next(k for k in pair if k in left)}")
            a, b = (left.pop(kind) for kind in pair)
            key, factors = self._factors(module, name, a, b, embedding, groups)
            for setting, kind in (("use_dora", "magnitude"), ("lora_bias", "B.bias")):
                if self.config.get(setting) and kind not in left:
                    raise UserError(f"{self.label}: module {name} has no {kind}, which {setting} asks for")
            if self.config.get("use_dora"):
                factors = self._dora(key, factors, left.pop("magnitude"))
            out[key] = factors
            if self.config.get("lora_bias"):
                out[f"{name}.bias"] = self._bias(name, left.pop("B.bias"))
        for kind in [k for k in left if k.startswith(("whole.", "copy."))]:
            said, _, parameter = kind.partition(".")
            full = f"{name}.{parameter}" if name else parameter
            key = name if parameter == "weight" else full
            if said == "whole" and self._is_whole(name):
                out[key] = self._whole(key, full, left.pop(kind))
            else:
                self._check_copy(key, full, left.pop(kind), trainable=said == "whole")
        if left:
            raise UserError(f"{self.label}: key {next(iter(left.values()))} is no part of a LoRA; it cannot be merged")
        return out

    def _factors(
        self, module: str, name: str, a: str, b: str, embedding: bool, groups: Mapping[str, Any]
    ) -> tuple[str, Callable[[Read], Factors]]:
        shape_a, shape_b = list(self.shapes[a]), list(self.shapes[b])
        if len(shape_a) != 2 or len(shape_b) != 2 or not 0 < shape_a[0] == shape_b[1]:
            why = f"; {UNGATHERED}" if 0 in (*shape_a, *shape_b) else ""
            raise UserError(
                f"{self.label}: module {name}: A {shape_a} and B {shape_b} are not [r, in] and [out, r]{why}"
            )
        parameter = None if embedding else self._parameter(module, name, groups)
        full = f"{name}.{parameter}" if parameter else name
        rank = self._rank(full)
        if shape_a[0] != rank and not (parameter and rank and shape_a[0] % rank == 0):
            raise UserError(f"{self.label}: module {full} has rank {shape_a[0]}, but {CONFIG_FILE} says {rank}")
        scaling = self.scaling(full) if self.scaling else self._scaling(full, rank)
        experts = shape_a[0] // rank

        def linear(read: Read) -> Factors:
            return Factors(read(a), read(b), scaling, "parameter" if parameter else "linear")

        def lookup(read: Read) -> Factors:  # D = (B A)^T: rows are tokens
            return Factors(read(b).T, read(a).T, scaling, "embedding")

        def stacked(read: Read) -> Factors:  # PEFT stacks A by expert, and interleaves them in B
            factors_a = read(a).unflatten(0, (experts, rank))
            return Factors(factors_a, read(b).unflatten(1, (rank, experts)).permute(2, 0, 1), scaling, "parameter")

        if embedding:
            return full, lookup
        if experts > 1:
            return full, stacked
        return full, linear

    def _parameter(self, module: str, name: str, groups: Mapping[str, Any]) -> str | None:
        """Which bare parameter of a module this LoRA is of; None for a LoRA of a linear layer."""
        targets = [t.rpartition(".") for t in self.config.get("target_parameters") or ()]
        mine = sorted({p for m, _, p in targets if m and ends(name, m)}) or sorted({p for m, _, p in targets if not m})
        nested = sorted((g for g in groups if g.replace(".base_layer", "") == name), key=len, reverse=True)
        if not mine or (len(nested) == 1 and is_target(self.config, name)):
            return None
        if len(mine) == 1:
            return mine[0]
        # PEFT wraps a module's parameters in the order in which the module has them, and names none of them
        known = [n for n, _ in self.base.module(name).named_parameters(recurse=False) if n in mine]
        if len(known) != len(nested):
            raise UserError(
                f"{self.label}: {name} has {len(nested)} LoRAs of bare parameters, but its base has "
                f"{', '.join(known) or 'none'} of {', '.join(mine)}"
            )
        return known[nested.index(module)]

    def _rank(self, module: str) -> int:
        patterns = self.config.get("rank_pattern") or {}
        rank = patterns.get(first_match(patterns, module), self.config.get("r"))
        if not isinstance(rank, int) or rank < 1:
            raise UserError(f"{self.label}: {CONFIG_FILE} says rank {rank!r} for {module}")
        return rank

    def _scaling(self, module: str, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(first_match(patterns, module), self.config.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise UserError(f"{self.label}: {CONFIG_FILE} says lora_alpha {alpha!r} for {module}, not a number")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _dora(self, key: str, factors: Callable[[Read], Factors], magnitude: str) -> Maker:
        """DoRA (arXiv 2402.09353): D = m (W + B A) / |W + B A| - W, the norm taken for each output."""
        base = self.base

        def make(read: Read) -> Dense:
            update = factors(read)
            across = 0 if update.form == "embedding" else 1

            def delta(dtype: torch.dtype) -> Tensor:
                weight = base.weight(key, dtype)
                new = weight + update.delta(dtype)
                size = read(magnitude).to(dtype) / torch.linalg.norm(new, dim=across)  # pyright: ignore
                return new.mul_(size.unsqueeze(across)).sub_(weight)

            return Dense(update.shape, delta, update.form)

        return make

    def _bias(self, name: str, key: str) -> Maker:
        scaling = self.scaling(name) if self.scaling else self._scaling(name, self._rank(name))

        def make(read: Read) -> Dense:
            return Dense(torch.Size(self.shapes[key]), lambda dtype: read(key).to(dtype) * scaling, "bias")

        return make

    def _tokens(self, name: str, key: str, groups: Mapping[str, Any]) -> dict[str, Maker]:
        """Trained rows of an embedding, as the low-rank update one-hot rows @ (new - old); a tied head shares them."""
        said: Any = self.config.get("trainable_token_indices")
        tokens: Any = said if not isinstance(said, dict) else said.get(first_match(said, name) or "")
        if tokens is None or len(tokens) != self.shapes[key][0]:
            raise UserError(f"{self.label}: {key} does not fit trainable_token_indices of {CONFIG_FILE}")
        base = self.base
        size = len(base.weight(name))
        if len(set(tokens)) != len(tokens) or not all(isinstance(t, int) and 0 <= t < size for t in tokens):
            raise UserError(f"{self.label}: trainable_token_indices are not different tokens of the {size} of {name}")

        def make(form: Form) -> Maker:
            def factors(read: Read) -> Factors:
                new, old = read(key).double(), base.weight(name)
                rows = torch.zeros(len(old), len(tokens), dtype=new.dtype)
                rows[tokens, range(len(tokens))] = 1.0
                return Factors(new - old[tokens].to(new), rows.to(new.device), 1.0, form)

            return factors

        heads = [t.removesuffix(".weight") for t, s in base.tied.items() if s == base.parameter(name)]
        form: Form = "embedding" if isinstance(base.module(name), nn.Embedding) else "linear"
        return {name: make(form), **{h: make("linear") for h in heads if "tokens" not in groups.get(h, ())}}

    def _sum(self, key: str, one: Maker, other: Maker) -> Maker:
        """A head's own LoRA beside the trained tokens that it shares with the embedding."""
        if not self.config.get("trainable_token_indices") or self.config.get("use_dora"):
            raise UserError(f"{self.label}: holds {key} twice, so it cannot be merged")
        return lambda read: concatenate([cast("Factors", one(read)), cast("Factors", other(read))], [1.0, 1.0])

    def _is_whole(self, name: str) -> bool:
        if any(is_within(name, m) for m in self.config.get("modules_to_save") or ()):
            return True
        return bool(self.config.get("ensure_weight_tying")) and self.base.parameter(name) in self.base.tied

    def _whole(self, key: str, full: str, stored: str) -> Maker:
        """A trained copy of a parameter: D = copy - W."""
        base = self.base

        def make(read: Read) -> Dense:
            def delta(dtype: torch.dtype) -> Tensor:
                new = read(stored).to(dtype)
                return (new.T if flip else new) - base.weight(key, dtype).to(new.device)

            origin = Origin(full, lambda dtype: base.weight(key, dtype), flip)
            return Dense(torch.Size(shape), delta, "whole", origin)

        flip = self._is_turned(full, stored)
        shape = list(self.shapes[stored])[:: -1 if flip else 1]
        size = list(base.weight(key).shape)
        if size != shape:
            raise UserError(self._resized(stored, shape, size))
        return make

    def _is_turned(self, full: str, stored: str) -> bool:
        """Whether a parameter is stored [in, out]."""
        owner = self.base.module(full.rpartition(".")[0])
        return len(self.shapes[stored]) == 2 and type(owner).__name__ == "Conv1D"

    def _check_copy(self, key: str, full: str, stored: str, trainable: bool) -> None:
        """PEFT saves the base's embeddings and head beside a LoRA that may need them; they must be the base's own.

        A vocabulary that was cut to the tokenizer's size, and no row of it trained, is the base's too.
        """
        try:
            base = self.base
        except UserError as e:
            raise UserError(
                f"{self.label}: key {stored} is no part of a LoRA, and whether it is the base's own weight cannot be "
                f"told without it ({e})"
            ) from e
        weight, copy = torch.atleast_1d(base.weight(key)), torch.atleast_1d(self.read(stored))
        copy = copy.T if self._is_turned(full, stored) else copy
        same = copy.shape[1:] == weight.shape[1:] and 0 < len(copy) <= len(weight)
        if same and _are_rounded(weight[: len(copy)].to(copy.device), copy):
            return
        listed = f"list `{full.rpartition('.')[0]}` in modules_to_save of {CONFIG_FILE}" if trainable else ""
        if copy.shape != weight.shape:
            also = f"; then {listed} if it was trained" if listed else ""
            raise UserError(self._resized(stored, list(copy.shape), list(weight.shape)) + also)
        raise UserError(
            f"{self.label}: {stored} is not the base's weight: it was trained too, or is of another base; "
            f"name that one with base= or --base{f', or {listed} if it was trained' if listed else ''}"
        )

    def _resized(self, stored: str, shape: list[int], size: list[int]) -> str:
        line = f"{self.label}: {stored} is {shape}, its base's has another shape, {size}"
        if 0 in shape:
            return f"{line}; {UNGATHERED}"
        if shape[1:] == size[1:]:
            return (
                f"{line}: its vocabulary was resized; resize the base's as well (model.resize_token_embeddings("
                f"{shape[0]}), save_pretrained with the adapter's tokenizer) and name that one with base= or --base"
            )
        return f"{line}; is it its base?"

    def _check_module(self, module: str, key: str) -> None:
        """UserError for a name that some wrapper has left; only the base knows a model's own such names."""
        try:
            self.base.module(module)
        except UserError as e:
            raise UserError(f"{self.label}: key {key} holds a name that is a wrapper's or its base's own: {e}") from e

    def _check_targets(self, groups: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        """Each module that the config lists must be there; a name that the model never had cannot be told from it."""
        listed = self.config.get("modules_to_save") or ()
        for target in listed:
            either = CLASSIFIERS if target in CLASSIFIERS else (target,)  # PEFT lists both, and models have one
            if not any(is_within(g, t) for g in groups for t in either):
                raise UserError(f"{self.label}: holds nothing of `{target}`, which modules_to_save lists")
        said: Any = self.config.get("trainable_token_indices") or ()
        have = {m for m, kinds in groups.items() if "tokens" in kinds}
        if said and not have:
            raise UserError(f"{self.label}: holds no tokens, which trainable_token_indices lists")
        for target in said if isinstance(said, dict) else ():
            mine = {self.base.parameter(m): m for m in have}
            tied = {
                t.removesuffix(".weight")
                for t, s in self.base.tied.items()
                if (m := mine.get(s)) and said[first_match(said, m) or ""] == said[target]
            }
            if not any(first_match([target], m) for m in have | tied):
                raise UserError(f"{self.label}: holds no tokens of `{target}`, which trainable_token_indices lists")
        targets = self.config.get("target_modules") or ()
        listed = {t.rpartition(".")[2] for t in [*listed, *([] if isinstance(targets, str) else targets)]}
        if self.config.get("ensure_weight_tying") and listed & {"embed_tokens", "lm_head"}:  # PEFT's rule
            have = {self.base.parameter(module) for module in made}
            for pair in ((t.removesuffix(".weight"), s.removesuffix(".weight")) for t, s in self.base.tied.items()):
                if lone := [m for m in pair if f"{m}.weight" not in have]:
                    raise UserError(f"{self.label}: holds nothing of `{lone[0]}`, which ensure_weight_tying asks for")


@dataclass(frozen=True)
class Made(Mapping[str, Update]):
    """Updates that are made when they are asked for, and not kept; `sketches` are the same without their numbers."""

    makers: Mapping[str, Maker]
    read: Read
    sketch: Read

    @property
    def sketches(self) -> "Made":
        return Made(self.makers, self.sketch, self.sketch)

    def __getitem__(self, module: str) -> Update:
        return self.makers[module](self.read)

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


KINDS = {
    r"lora_([AB])\.weight": r"\2",
    r"lora_B\.bias": "B.bias",
    r"lora_embedding_([AB])": r"embedding_\2",
    r"lora_magnitude_vector(?:\.weight)?": "magnitude",
    r"(?:token_adapter\.base_layer|base_layer|original_module)\.(weight|bias)": r"copy.\2",
    r"token_adapter\.trainable_tokens_delta": "tokens",
}


def _classify(name: str, key: str, label: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and what it is of it."""
    name = name.removeprefix(PREFIX)
    for pattern, kind in KINDS.items():
        if match := re.fullmatch(rf"(.+?)\.{pattern}", name):
            return match[1], match.expand(kind)
    if "lora_" in name:
        raise UserError(f"{label}: key {key} is not a LoRA factor that can be merged")
    module, _, parameter = name.rpartition(".")
    return module, f"whole.{parameter}"


def _are_rounded(weight: Tensor, copy: Tensor) -> bool:
    """Whether a copy is of these numbers, also where the base was loaded in fewer bits; some rows at a time."""
    rows = list(zip(weight.split(4096), copy.split(4096), strict=True))
    return any(
        all(torch.equal(w.to(bits).to(copy.dtype), c) for w, c in rows)
        for bits in (copy.dtype, torch.bfloat16, torch.float16)
    )


def _in_order(groups: Mapping[str, Any]) -> list[str]:
    """Modules by name, the LoRAs of one module's bare parameters from the innermost, as PEFT wraps them."""
    return sorted(groups, key=lambda g: (g.replace(".base_layer", ""), -len(g)))
