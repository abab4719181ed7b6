"""Whole adapters merged, one module at a time."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from mot_lora.errors import UserError
from mot_lora.merging.align import SPACES
from mot_lora.merging.averages import check_weights, divisor
from mot_lora.merging.lowrank import Adapter, Dense, Factors, Form, Update, concatenate
from mot_lora.merging.methods import ELECTS, METHODS, NEEDS_DENSITY, Method
from mot_lora.merging.seeds import seed_for
from mot_lora.merging.sparsify import check_density
from mot_lora.patterns import PerModule, compiled, first_match, for_module


@dataclass(frozen=True)
class Merged:
    """Adapters and the way to merge them: computes one module's update at a time, when asked.

    Iterating yields (module name, fp32 delta). A module that an adapter does not have counts as an update of 0.
    `factors(module)` is the exact low-rank form, which a linear merge has and one in a common space.
    """

    adapters: tuple[Adapter, ...]
    method: str | Method = "linear"
    weights: tuple[PerModule, ...] = ()
    density: PerModule | None = None
    scale: PerModule = 1.0
    seed: int = 0
    space: str | None = None
    shapes: Mapping[str, torch.Size] = field(default_factory=dict[str, torch.Size])
    forms: Mapping[str, Form] = field(default_factory=dict[str, Form])

    def delta(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The merged update of one module, of `shapes[module]`, computed in `dtype`."""
        parts = self.parts(module)
        if self._stays_low_rank(parts):
            return self._factors(module, parts, dtype).delta(dtype)
        shape, device = self.shapes[module], next((p.a.device for p in parts if isinstance(p, Factors)), None)
        merge = self._method(module)
        if not self._stacked(parts):
            return merge(
                lambda i: torch.zeros(shape, dtype=dtype, device=device) if (p := parts[i]) is None else p.delta(dtype)
            )
        zero = torch.zeros(shape[1:], dtype=dtype, device=device)
        matrices = [_expert(parts, e) for e in range(shape[0])]
        return torch.stack([merge(lambda i, m=m: zero if (p := m[i]) is None else p.delta(dtype)) for m in matrices])

    def factors(self, module: str, dtype: torch.dtype = torch.float32) -> Factors:
        """The merged update of one module as exact factors of rank sum(r). UserError where it is not low-rank."""
        return self._factors(module, self.parts(module), dtype)

    def _factors(self, module: str, parts: Sequence[Update | None], dtype: torch.dtype) -> Factors:
        if not self._stays_low_rank(parts):
            raise UserError(f"a {method_name(self.method)} merge of {module} is not low-rank: fold it, or give a rank")
        if self.space is None:
            weights = check_weights(self.weights_of(module), len(parts))
            scale = for_module(self.scale, module) / divisor(weights)
            have = [(p, w * scale) for p, w in zip(parts, weights, strict=True) if isinstance(p, Factors)]
            both = concatenate([p for p, _ in have], [w for _, w in have], dtype)
            return replace(both, form=self.forms[module])
        merge = self._method(module)
        if not self._stacked(parts):
            return _aligned(self.space, parts, merge)
        matrices = [_aligned(self.space, _expert(parts, e), merge) for e in range(self.shapes[module][0])]
        k = max(m.rank for m in matrices)
        a = torch.stack([pad(m.a, (0, 0, 0, k - m.rank)) for m in matrices])
        b = torch.stack([pad(m.b, (0, k - m.rank)) for m in matrices])
        return Factors(a, b, form=self.forms[module])

    def parts(self, module: str) -> list[Update | None]:
        """Each adapter's update of one module."""
        return [a.updates.get(module) for a in self.adapters]

    def weights_of(self, module: str) -> list[float]:
        """Each adapter's weight for one module."""
        return [for_module(w, module) for w in self.weights]

    def scaled(self, factor: float) -> "Merged":
        """The same merge, so many times as large."""
        if factor == 1:
            return self
        if isinstance(self.scale, dict):
            every = {**self.scale, ".*": self.scale.get(".*", 1.0)}  # a module without a match has scale 1
            return replace(self, scale={pattern: value * factor for pattern, value in every.items()})
        return replace(self, scale=self.scale * factor)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((module, self.delta(module)) for module in self.shapes)

    def _stays_low_rank(self, parts: Sequence[Update | None]) -> bool:
        exact = self.method == "linear" or self.space is not None
        return exact and all(p is None or isinstance(p, Factors) for p in parts)

    def _stacked(self, parts: Sequence[Update | None]) -> bool:
        """Whether these are stacked experts, each of which is merged as a matrix of its own."""
        return all(p is None or (isinstance(p, Factors) and p.a.ndim == 3) for p in parts)

    def _method(self, module: str) -> Callable[[Callable[[int], Tensor]], Tensor]:
        """The method with its settings for one module, as a function of `read(i)`, which gives adapter i's update."""
        method, weights, scale = resolve(self.method), self.weights_of(module), for_module(self.scale, module)
        settings: dict[str, Any] = {}
        if self.density is not None:
            settings["density"] = for_module(self.density, module)
        if "generator" in _arguments(method):
            seeds = [seed_for(self.seed, a.name, module) for a in self.adapters]
            settings["generator"] = [torch.Generator().manual_seed(s) for s in seeds]

        def merge(read: Callable[[int], Tensor]) -> Tensor:
            deltas = Lazy(len(self.adapters), read)
            try:
                if method in METHODS.values():
                    out = method(deltas, weights, **settings)
                else:  # a function of the user's own gets one tensor, [n, ...]
                    out = _checked(method, torch.stack(list(deltas)), weights, settings)
            except UserError as e:
                raise UserError(f"{module}: {e}") from e
            return out * scale if scale != 1 else out

        return merge


def total(ledger: Sequence[Merged], module: str) -> Update:
    """What several merges add to one module together: as exact factors where each has them, else made on demand."""
    have = [m for m in ledger if module in m.shapes]
    try:
        return concatenate([m.factors(module) for m in have], [1.0] * len(have))
    except UserError:

        def make(dtype: torch.dtype) -> Tensor:
            return sum((m.delta(module, dtype) for m in have[1:]), start=have[0].delta(module, dtype))

        return Dense(have[0].shapes[module], make, have[0].forms[module])


def _arguments(method: Method) -> Sequence[str]:
    try:
        return list(inspect.signature(method).parameters)
    except ValueError:  # a builtin has none to show
        return []


def _checked(method: Method, deltas: Tensor, weights: Sequence[float], settings: Mapping[str, Any]) -> Tensor:
    out = method(deltas, weights, **settings)
    if not isinstance(out, Tensor) or out.shape != deltas.shape[1:]:  # pyright: ignore[reportUnnecessaryIsInstance]
        gave = getattr(out, "shape", out)
        raise UserError(f"merge method `{method_name(method)}` gave {gave}, not an update of {list(deltas.shape[1:])}")
    return out


def _expert(parts: Sequence[Update | None], e: int) -> list[Factors | None]:
    return [Factors(p.a[e], p.b[e], p.scaling) if isinstance(p, Factors) else None for p in parts]


def _aligned(space: str, parts: Sequence[Update | None], merge: Callable[[Callable[[int], Tensor]], Tensor]) -> Factors:
    """Merge the coordinates of low-rank updates in their common space."""
    have = [p for p in parts if isinstance(p, Factors)]
    aligned = SPACES[space](have)
    made, zero = iter(aligned.coordinates), torch.zeros_like(aligned.coordinates[0])
    coordinates = [zero if p is None else next(made) for p in parts]
    return replace(aligned.factors(merge(lambda i: coordinates[i])), form=have[0].form)


@dataclass(frozen=True)
class Lazy(Sequence[Tensor]):
    """`size` tensors that are made when they are asked for, and not kept."""

    size: int
    read: Callable[[int], Tensor]

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        at = range(self.size)[index]
        return [self.read(i) for i in at] if isinstance(at, range) else self.read(at)


def combine(
    adapters: Sequence[Adapter],
    method: str | Method = "linear",
    weights: Sequence[PerModule] | None = None,
    density: PerModule | None = None,
    scale: PerModule = 1.0,
    seed: int = 0,
    space: str | None = None,
) -> Merged:
    """Merge adapters by their true deltas, lazily.

    D_module = method(scaling_i * B_i @ A_i). `method` is a name in METHODS, a function (deltas [n, ...], weights,
    **settings) -> Tensor or its place as `module:function`; it gets `density` when one is given, and `generator`s when
    it names them. They draw from (seed, adapter name, module), so neither the order of adapters nor global state
    matters. weights, density and scale are numbers, or numbers by module pattern (`{"mlp.*": 0.5}`), of which the first
    that matches counts; a module without a match has weight 1, density 1 and scale 1. `space` is where the updates
    meet: `core` or `knots` (see `align`); None is the weights' own.

    Errors: UserError for no adapters, repeated names, an unknown method, a missing or unused density, wrong weights,
    a pattern that matches nothing, or modules whose shapes differ between adapters.

    >>> one = Adapter("a", {"m": Factors(torch.eye(2), torch.eye(2))})
    >>> dict(combine([one]))["m"]
    tensor([[1., 0.],
            [0., 1.]])
    """
    _check_names(adapters)
    method = _fitting(method, density, space)
    shapes, forms = _modules(adapters)
    given: Sequence[PerModule] = [1.0] * len(adapters) if weights is None else list(weights)
    if len(given) != len(adapters):
        raise UserError(f"{len(given)} weights for {len(adapters)} adapters: give one for each")
    for key, setting in (("density", density), ("scale", scale), *(("weight", w) for w in given)):
        _check_patterns(key, setting, shapes)
    for number in density.values() if isinstance(density, dict) else [] if density is None else [density]:
        check_density(number)
    merged = Merged(tuple(adapters), method, tuple(given), density, scale, seed, space, shapes, forms)
    for module in shapes:
        try:
            check_weights(merged.weights_of(module), len(adapters), method in ELECTS)
        except UserError as e:
            raise UserError(f"{module}: {e}") from e
    return merged


def _check_names(adapters: Sequence[Adapter]) -> None:
    if not adapters:
        raise UserError("no adapters to merge: give at least one")
    names = [a.name for a in adapters]
    if len(set(names)) < len(names):
        raise UserError(f"adapters need different names, not {names}")


def _fitting(method: str | Method, density: PerModule | None, space: str | None) -> str | Method:
    """The method, by its name where it has one. Errors: UserError for settings that it does not take."""
    resolve(method)
    method = next((name for name, function in METHODS.items() if function is method), method)
    if method in NEEDS_DENSITY and density is None:
        raise UserError(f"method `{method_name(method)}` needs a density in (0, 1]")
    if method == "linear" and density is not None:
        raise UserError("method `linear` takes no density: leave it out, or choose another method")
    if space is not None and space not in SPACES:
        raise UserError(f"unknown space `{space}`: use {' or '.join(SPACES)}, or leave it out")
    return method


def _modules(adapters: Sequence[Adapter]) -> tuple[dict[str, torch.Size], dict[str, Form]]:
    """The shape and the form of every module that an adapter updates. Errors: UserError where two contradict."""
    shapes: dict[str, torch.Size] = {}
    forms: dict[str, Form] = {}
    for adapter in adapters:
        for module, update in adapter.meta_updates.items():
            if shapes.setdefault(module, update.shape) != update.shape:
                raise UserError(
                    f"adapter `{adapter.name}`, module {module}: shape {list(update.shape)}, "
                    f"but others have {list(shapes[module])}; merge adapters of one base model"
                )
            other = forms.get(module, update.form)
            forms[module] = other if FORMS.index(other) > FORMS.index(update.form) else update.form
    for module in shapes:
        if f"{module}.weight" in shapes:
            raise UserError(f"{module}: some adapters hold it as a layer, others as a bare parameter; save them alike")
    return shapes, forms


def _check_patterns(key: str, setting: PerModule | None, modules: Iterable[str]) -> None:
    """Errors: UserError for a pattern that is none, or that matches no module."""
    for pattern in setting if isinstance(setting, dict) else ():
        try:
            compiled(pattern)
        except ValueError as e:
            raise UserError(f"{key}: {' '.join(str(e).split())}") from e
        if not any(first_match([pattern], m) for m in modules):
            raise UserError(f"{key} pattern `{pattern}` matches no module, e.g. not {next(iter(modules))}")


# what an update that adapters hold in different forms is held in: the later one can hold the earlier
FORMS: tuple[Form, ...] = ("linear", "embedding", "parameter", "bias", "whole")


def resolve(method: str | Method) -> Method:
    """The function that a method's name stands for. UserError for one that does not exist."""
    if not isinstance(method, str):
        return method
    if method in METHODS:
        return METHODS[method]
    module, colon, name = method.partition(":")
    if not colon:
        raise UserError(f"unknown merge method `{method}`: use one of {', '.join(METHODS)}, or module:function")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, TypeError, ValueError) as e:
        raise UserError(f"merge method `{method}` cannot be imported ({e}); is its folder on PYTHONPATH?") from e
    if not callable(found):
        raise UserError(f"merge method `{method}` is not a function")
    return cast("Method", found)


def method_name(method: str | Method) -> str:
    """A method as one writes it: its name, or `module:function` for a function."""
    if isinstance(method, str):
        return method
    return f"{getattr(method, '__module__', '?')}:{getattr(method, '__qualname__', repr(method))}"
