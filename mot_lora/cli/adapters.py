"""The commands for adapters that you have: merge, fold, inspect."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mot_lora.cli.options import Json, print_json
from mot_lora.errors import UserError

Adapters = Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="PEFT LoRA folders or Hub names")]
Method = Annotated[
    str | None, typer.Option(help="a merge method, as for `merge.method` in a config, e.g. ties; default: linear")
]
Weights = Annotated[str | None, typer.Option(help="one number an adapter, e.g. 2,1,1; 1,-1 subtracts; default: equal")]
Density = Annotated[str | None, typer.Option(help="share of entries kept: a number, or PATTERN=NUMBER,... by module")]
Scale = Annotated[str | None, typer.Option(help="multiplies the merge: a number, also negative, or PATTERN=NUMBER,...")]
Space = Annotated[str | None, typer.Option(help="space in which updates are merged: core or knots; default: weights")]
Seed = Annotated[int, typer.Option(help="random seed of dare and della")]
Spec = Annotated[Path | None, typer.Option(help="a YAML file of these settings, as under `merge:` in a config")]
BaseModel = Annotated[str | None, typer.Option("--base", help="the model that the adapters are for")]


def merge(
    adapters: Adapters,
    out: Annotated[Path, typer.Option(help="the adapter folder to write; it must not exist")],
    method: Method = None,
    weights: Weights = None,
    density: Density = None,
    scale: Scale = None,
    space: Space = None,
    seed: Seed = 0,
    rank: Annotated[
        int | None, typer.Option(help="rank of the merged adapter; default: exact, if it is low-rank")
    ] = None,
    spec: Spec = None,
    base: BaseModel = None,
    as_json: Json = False,
) -> None:
    """Merge PEFT LoRA adapters by their true updates into one that PEFT loads.

    Example: mot-lora merge a b c --method ties --density 0.5 --rank 32 --out merged
    """
    settings = _merge_settings(spec, method, weights, density, scale, space)
    from mot_lora.durable import check_new

    check_new(out)
    from mot_lora.adapters.save import save_adapter
    from mot_lora.adapters.sources import merge_adapters
    from mot_lora.reports.display import live, screen
    from mot_lora.reports.tables import save_table

    console = screen(as_json)
    merged = merge_adapters(adapters, **settings, seed=seed, base=base)
    with live(console) as progress:
        record = save_adapter(merged, out, rank, progress)
    if as_json:
        print_json({"out": str(out), **record.model_dump(mode="json")})
        return
    if record.lost:
        console.print(save_table(record))
    lost = f"{record.lost:.2%} of the merge lost" if record.lost else "exact"
    console.print(f"adapter of rank {record.rank}, {lost}: {out}", soft_wrap=True, highlight=False)
    if not record.uniform:
        console.print(
            f"its modules have ranks {min(record.ranks.values())} to {record.rank}, which PEFT reads; vLLM and "
            "llama.cpp would scale some of them wrongly: give a smaller --rank for those programs",
            soft_wrap=True,
            highlight=False,
        )


def fold(
    base: Annotated[str, typer.Argument(metavar="BASE", help="a model folder or Hub name, in 16 or 32 bits")],
    adapters: Adapters,
    out: Annotated[Path, typer.Option(help="the model folder to write; it must not exist")],
    method: Method = None,
    weights: Weights = None,
    density: Density = None,
    scale: Scale = None,
    space: Space = None,
    seed: Seed = 0,
    spec: Spec = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="dtype to write; default: the base's")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="read it back and check every tensor")] = False,
    as_json: Json = False,
) -> None:
    """Merge PEFT LoRA adapters and fold them exactly into their base, one tensor in memory at a time.

    Example: mot-lora fold Qwen/Qwen3-0.6B a b c --out model --verify
    """
    settings = _merge_settings(spec, method, weights, density, scale, space)
    from mot_lora.durable import check_new

    check_new(out)
    import torch

    from mot_lora.adapters.sources import merge_adapters
    from mot_lora.checkpoints.checkpoint import Checkpoint
    from mot_lora.checkpoints.fold import fold_placement
    from mot_lora.checkpoints.placement import Placement
    from mot_lora.checkpoints.verify import verify_placement
    from mot_lora.reports.display import live, screen
    from mot_lora.reports.tables import kept_lines, verify_table

    console = screen(as_json)
    checkpoint = Checkpoint.open(base)
    merged = merge_adapters(adapters, **settings, seed=seed, base=checkpoint)
    placement = Placement.of(checkpoint, merged, getattr(torch, dtype) if dtype else None)
    with live(console) as progress:
        kept = fold_placement(placement, out, progress=progress)
        record = verify_placement(placement, out, progress) if verify else None
    if as_json:
        verified = record.model_dump(mode="json") if record else None
        print_json({
            "out": str(out), "modules": len(merged.shapes), **kept.model_dump(mode="json"), "verified": verified
        })  # fmt: skip
        return
    if record:
        console.print(verify_table(record))
    for line in (f"{len(merged.shapes)} modules of {base} updated: {out}", *kept_lines(kept, "`mot-lora merge`")):
        console.print(line, soft_wrap=True, highlight=False)


def inspect(
    adapters: Adapters,
    base: BaseModel = None,
    plot: Annotated[Path | None, typer.Option(help="write a chart too: a .png, .svg or .pdf file")] = None,
    as_json: Json = False,
) -> None:
    """Inspect adapters before merging: ranks, norms, agreement, and what a rank-r copy of their mean would lose.

    Example: mot-lora inspect a b c --base Qwen/Qwen3-0.6B --plot agreement.png
    """
    from mot_lora.reports.adapter_picture import check_picture, save_picture

    if plot:
        check_picture(plot)
    from mot_lora.adapters.inspection import inspect_adapters
    from mot_lora.reports.display import live, screen
    from mot_lora.reports.tables import inspect_tables

    console = screen(as_json)
    with live(console) as progress:
        record = inspect_adapters(adapters, base, progress)
    if plot:
        save_picture(record, plot)
    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    for shown in inspect_tables(record):
        console.print(shown)
    if plot:
        console.print(f"picture: {plot}", soft_wrap=True, highlight=False)


def _merge_settings(
    spec: Path | None,
    method: str | None,
    weights: str | None,
    density: str | None,
    scale: str | None,
    space: str | None,
) -> dict[str, Any]:
    from mot_lora.reader import load_merge

    try:
        numbers = None if weights is None else tuple(float(w) for w in weights.split(","))
    except ValueError as e:
        raise UserError(f"--weights {weights}: give one number an adapter, e.g. 2,1,1") from e
    settings = load_merge(spec, method=method, weights=numbers, density=density, scale=scale, space=space)
    return settings.model_dump()
