"""Adapters from folders, the Hub and live models, read and merged."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mot_lora.adapters.bases import compare
from mot_lora.adapters.load import load_adapter, two_names
from mot_lora.adapters.updates import LazyUpdates
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.layout import Layout
from mot_lora.errors import UserError, remark
from mot_lora.merging.lowrank import Adapter, Update
from mot_lora.merging.merged import Merged, combine
from mot_lora.merging.methods import Method
from mot_lora.patterns import PerModule

if TYPE_CHECKING:
    from peft import PeftModel

    Source = Adapter | str | Path | PeftModel | tuple[PeftModel, str]


def merge_adapters(
    adapters: "Sequence[Source]",
    method: str | Method = "linear",
    weights: Sequence[PerModule] | None = None,
    density: PerModule | None = None,
    scale: PerModule = 1.0,
    seed: int = 0,
    space: str | None = None,
    base: str | Path | Checkpoint | None = None,
) -> Merged:
    """Merge adapters by their true deltas, lazily: nothing is computed before a module is asked for.

    `adapters` are folders, Hub names, Adapters, live PEFT models (their active adapter) or pairs of a model and an
    adapter's name. D_module = method(scaling_i * B_i @ A_i); all else as in `merged.combine`. `base` is the model that
    they are all for: DoRA and the like need it, and with it adapters may name different bases.

    Errors: UserError for what an adapter or the merge cannot do, and for adapters that name different bases.

    >>> merge_adapters(["adapters/a", "adapters/b"], "ties", density=0.5)  # doctest: +SKIP
    """
    read = read_adapters(adapters, base)
    if base is None:
        check_bases(read)
    else:
        read = with_common_names(read, base)
    return combine(read, method, weights, density, scale, seed, space)


def read_adapters(adapters: "Sequence[Source]", base: str | Path | Checkpoint | None = None) -> list[Adapter]:
    """Read adapters. Folders of one name are called by as much of their paths as distinguishes them."""
    folders = [Path(a) for a in adapters if isinstance(a, str | Path)]
    if twice := next((f for f in folders if [g.resolve() for g in folders].count(f.resolve()) > 1), None):
        raise UserError(f"{twice}: listed twice; to count it more, give it a weight")
    names = iter(short_names(folders))
    return [load_adapter(a, next(names), base=base) if isinstance(a, str | Path) else _read(a) for a in adapters]


def _read(source: Any) -> Adapter:
    if isinstance(source, Adapter):
        return source
    from mot_lora.adapters.live import adapter_from_peft  # peft takes seconds to load

    pair = cast("tuple[Any, str]", source) if isinstance(source, tuple) else (source, None)
    model, name = pair
    while not hasattr(model, "get_base_model") and hasattr(model, "module"):  # DataParallel, DDP, DeepSpeed
        model = model.module
    if not hasattr(model, "get_base_model"):
        raise UserError(f"{type(model).__name__} is no adapter: give a folder, a Hub name, an Adapter or a PeftModel")
    return adapter_from_peft(model, name)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as distinguish them all.

    >>> short_names([Path("a/checkpoint-9"), Path("b/checkpoint-9")])
    ['a/checkpoint-9', 'b/checkpoint-9']
    """
    parts = [f.resolve().parts if f.is_dir() else f.parts for f in folders]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(f) for f in folders]


def with_common_names(adapters: Sequence[Adapter], base: str | Path | Checkpoint) -> Sequence[Adapter]:
    """Adapters with the base's names of modules, where they do not use the same ones themselves."""
    if two_names(adapters) is None:
        return adapters
    layout = Layout(base if isinstance(base, Checkpoint) else Checkpoint.open(base))
    return [replace(a, updates=_renamed(a.updates, layout)) for a in adapters]


def _renamed(updates: Mapping[str, Update], layout: Layout) -> Mapping[str, Update]:
    def name(module: str) -> str:
        target = layout.target(module)
        return target.name.removesuffix(".weight") if target.is_whole else module

    names = {module: name(module) for module in updates}
    if isinstance(updates, LazyUpdates):
        return replace(updates, makers={names[module]: make for module, make in updates.makers.items()})
    return {names[module]: update for module, update in updates.items()}


def check_bases(adapters: Sequence[Adapter]) -> None:
    """Check that adapters name one base, by its folders where these exist, else by its names.

    Errors: UserError for two bases, and for folders of one name that may hold any model; a Remark where only the name
    is the same.
    """
    said_by = [(a.name, a.base) for a in adapters if a.base]
    for name, base in said_by[1:]:
        verdict = compare(said_by[0][1], base)
        said = f"adapter `{said_by[0][0]}` was trained on {said_by[0][1]}, `{name}` on {base}"
        if verdict == "by name":
            remark(f"{said}: the same base by name only; to be sure, name it with base= or --base")
        elif verdict != "one":
            why = ", which does not say what model it is" if verdict == "unknown" else ""
            raise UserError(f"{said}{why}; if these are the same weights, say so with base= or --base")
