"""Whole adapters merged, one module at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mot_lora.errors import UserError
from mot_lora.lowrank import Adapter, Factors, concatenate
from mot_lora.merge import METHODS, NEEDS_DENSITY, RANDOM, Method, check_density, check_weights, seed_for


@dataclass(frozen=True)
class Merged:
    """Adapters and the way to merge them: computes one module's update at a time, when asked.

    Iterating yields (module name, fp32 delta [out, in]). A module that an adapter does not have counts as an update of
    0. `factors(module)` is the exact low-rank form, which only a linear merge has.
    """

    adapters: tuple[Adapter, ...]
    method: str | Method = "linear"
    weights: tuple[float, ...] = ()
    density: float | None = None
    scale: float = 1.0
    seed: int = 0
    shapes: Mapping[str, torch.Size] = field(default_factory=dict[str, torch.Size])

    def delta(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The merged update of one module, [out, in], computed in `dtype`."""
        parts = [a.factors.get(module) for a in self.adapters]
        made = [None if p is None else p.delta(dtype) for p in parts]
        zeros = torch.zeros_like(next(d for d in made if d is not None))
        deltas = [zeros if d is None else d for d in made]
        settings: dict[str, object] = {"scale": self.scale}
        if self.density is not None:
            settings["density"] = self.density
        if self.method in RANDOM:
            seeds = [seed_for(self.seed, a.name, module) for a in self.adapters]
            settings["generator"] = [torch.Generator().manual_seed(s) for s in seeds]
        method = METHODS[self.method] if isinstance(self.method, str) else self.method
        return method(deltas, self.weights, **settings)

    def factors(self, module: str) -> Factors:
        """The merged update of one module as exact factors of rank sum(r). UserError unless linear."""
        if self.method != "linear":
            method = self.method if isinstance(self.method, str) else getattr(self.method, "__name__", "custom")
            raise UserError(f"a {method} merge is not low-rank: fold it, or give a rank")
        total = sum(self.weights)
        pairs = [(a.factors.get(module), w) for a, w in zip(self.adapters, self.weights, strict=True)]
        have = [(f, self.scale * w / total) for f, w in pairs if f is not None]
        return concatenate([f for f, _ in have], [w for _, w in have])

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((module, self.delta(module)) for module in self.shapes)


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str | Method = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Merged:
    """Merge adapters by their true deltas, lazily.

    D_module = method(scaling_i * B_i @ A_i). `method` is a name in METHODS or a function (deltas, weights, **settings)
    -> Tensor. DARE draws from (seed, adapter name, module), so neither the order of adapters nor global state matters.

    Errors: UserError for no adapters, repeated names, an unknown method, a missing or unused density, wrong weights, or
    modules whose shapes differ between adapters.

    >>> one = Adapter("a", {"m": Factors(torch.eye(2), torch.eye(2))})
    >>> dict(merge_adapters([one]))["m"]
    tensor([[1., 0.],
            [0., 1.]])
    """
    if not adapters:
        raise UserError("no adapters to merge: give at least one")
    names = [a.name for a in adapters]
    if len(set(names)) < len(names):
        raise UserError(f"adapters need different names, not {names}")
    if isinstance(method, str) and method not in METHODS:
        raise UserError(f"unknown merge method `{method}`: use one of {', '.join(METHODS)}")
    if method in NEEDS_DENSITY and density is None:
        raise UserError(f"method `{method}` needs a density in (0, 1]")
    if method == "linear" and density is not None:
        raise UserError("method `linear` takes no density: leave it out, or choose another method")
    if density is not None:
        check_density(density)
    shapes: dict[str, torch.Size] = {}
    for adapter in adapters:
        for module, factors in adapter.factors.items():
            if shapes.setdefault(module, factors.shape) != factors.shape:
                raise UserError(
                    f"adapter `{adapter.name}`, module {module}: shape {list(factors.shape)}, "
                    f"but others have {list(shapes[module])}; they are not for one base"
                )
    w = tuple(check_weights(weights, len(adapters)))
    return Merged(tuple(adapters), method, w, density, scale, seed, shapes)
