"""The commands. Each is one call into the package, and says what it did as a table or as JSON."""

import json
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from mot_lora.errors import UserError
from mot_lora.interruption import INTERRUPTS, signals_raise

if TYPE_CHECKING:
    from mot_lora.records import DataRecord

INTERRUPTED = 130
USAGE_ERROR: Any = typer.BadParameter.__base__  # click's UsageError, or that of Typer's own copy of click
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Merge-of-Thought distillation on one GPU, and PEFT adapters merged and folded right.",
    epilog="Example: mot-lora init my.yaml, then mot-lora data my.yaml, then mot-lora run my.yaml",
)
LOOP, ADAPTERS = "Distill teachers into a student", "Merge adapters that you have"  # how --help groups the commands
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("mot-lora"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What the program takes before a command."""


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML config, e.g. recipes/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings that replace the file's, e.g. rounds=2")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]


@app.command(rich_help_panel=LOOP)
def init(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the file to write; it must not exist")] = Path(
        "mot.yaml"
    ),
    as_json: Json = False,
) -> None:
    """Write a config to start from, with every setting and what it means.

    Example: mot-lora init my.yaml
    """
    from importlib import resources

    from mot_lora.errors import writing

    if config.exists():
        raise UserError(f"{config}: exists; name another file, nothing is overwritten")
    with writing(config):
        config.write_text(resources.files("mot_lora").joinpath("template.yaml").read_text("utf-8"), encoding="utf-8")
    if as_json:
        _print_json({"config": str(config)})
    else:
        print(f"{config}: name your student and teachers in it, then: mot-lora data {config}")


@app.command(rich_help_panel=LOOP)
def data(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what a run would train on: rows used, left out and why, tokens, and a sample with its trained part marked.

    Example: mot-lora data my.yaml branch.max_length=8192
    """
    from mot_lora.reader import load_config

    settings = load_config(config, overrides or [])
    from mot_lora.chat import load_tokenizer
    from mot_lora.checkpoint import COMPANIONS, locate
    from mot_lora.data import load_data
    from mot_lora.display import live, screen
    from mot_lora.tables import data_tables

    console = screen(as_json)
    with live(console) as progress:
        folder = locate(settings.student, list(COMPANIONS))
        record = load_data(settings, load_tokenizer(folder, settings.trust_remote_code), progress).record
    if as_json:
        _print_json(record.model_dump(mode="json"))
        return
    for shown in data_tables(record):
        console.print(shown)


@app.command(rich_help_panel=LOOP)
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="begin anew, in a folder beside the one that is there")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="set damaged parts aside, with what was built on them, and do them again")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="show nothing but the last line")] = False,
    as_json: Json = False,
) -> None:
    """Distill the teachers of a config into its student; the same command goes on where it stopped.

    Example: mot-lora run recipes/quickstart.yaml rounds=2 output=runs/two
    """
    from mot_lora.reader import load_config

    overrides = overrides or []
    settings = load_config(config, overrides)  # a mistake is told before torch is loaded
    if from_scratch:
        from mot_lora.durable import beside

        overrides = [o for o in overrides if not o.startswith("output=")] + [f"output={beside(Path(settings.output))}"]
        settings = load_config(config, overrides)

    def started(record: "DataRecord") -> None:
        for shown in [] if quiet else data_tables(record):
            console.print(shown)

    try:
        from mot_lora.display import live, screen
        from mot_lora.rounds import run as run_rounds
        from mot_lora.rounds import stages
        from mot_lora.tables import data_tables, table

        console = screen(as_json, quiet)
        with live(console, stages(settings), quiet) as progress:
            record = run_rounds(settings, progress=progress, repair=repair, started=started)
    except INTERRUPTS as e:
        again = shlex.join(["mot-lora", "run", str(config), *overrides])
        _end(_status(e), f"stopped; nothing that was finished is lost, go on with: {again}")
    if as_json:
        _print_json({"run": settings.output, **record.model_dump(mode="json")})
        return
    if not quiet:
        console.print(table(record))
        best = f"round {record.best}" if record.best else "none"
        console.print(f"{record.stopped}; best by {record.metric}: {best}")
    console.print(f"run folder: {settings.output} (report.html is its picture)", soft_wrap=True, highlight=False)


@app.command(rich_help_panel=LOOP)
def show(run_folder: RunFolder, as_json: Json = False) -> None:
    """Say where a run stands: what is finished, what can go on, who is at work on it.

    Example: mot-lora show runs/quickstart
    """
    from mot_lora.display import screen
    from mot_lora.ledger import read_run, read_state
    from mot_lora.rundir import RunDir
    from mot_lora.tables import table

    rundir = RunDir(run_folder)
    state, record = read_state(rundir), read_run(rundir)
    if as_json:
        run = record.model_dump(mode="json") if record else None
        _print_json({"run_folder": str(run_folder), **state.model_dump(mode="json"), "run": run})
        return
    console = screen()
    if record:
        console.print(table(record))
    console.print(f"{run_folder}: {state.line}", soft_wrap=True, highlight=False)


@app.command(rich_help_panel=LOOP)
def report(
    run_folder: RunFolder,
    out: Annotated[Path | None, typer.Option(help="the page to write; report.html in the run unless given")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's page: scores, losses, agreement of the teachers, answers, data, settings. It may be at work still.

    Example: mot-lora report runs/quickstart --out quickstart.html
    """
    from mot_lora.durable import write_text
    from mot_lora.ledger import read_page
    from mot_lora.report import report as page_of
    from mot_lora.rundir import RunDir

    page = page_of(read_page(RunDir(run_folder)))
    out = out or run_folder / "report.html"
    write_text(out, page)
    if as_json:
        _print_json({"report": str(out)})
    else:
        print(out)


@app.command(rich_help_panel=LOOP)
def export(
    run_folder: RunFolder,
    out: Annotated[Path, typer.Option(help="the folder to write; it must not exist")],
    round: Annotated[int | None, typer.Option(help="the round to export; the best one unless given")] = None,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="what weights are rounded to")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Write a round's student as a full checkpoint that transformers loads as it is.

    Example: mot-lora export runs/quickstart --out student
    """
    import torch

    from mot_lora.display import live, screen
    from mot_lora.export import export as export_round

    console = screen(as_json)
    with live(console) as progress:
        number = export_round(run_folder, out, round=round, dtype=getattr(torch, dtype), progress=progress)
    if as_json:
        _print_json({"out": str(out), "round": number, "dtype": dtype})
    else:
        console.print(f"round {number} in {dtype}: {out}", soft_wrap=True)


Adapters = Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="PEFT LoRA folders or Hub names")]
Method = Annotated[
    str | None, typer.Option(help="linear, ties, dare_linear, dare_ties, della, sce, or module:function of your own")
]
Weights = Annotated[str | None, typer.Option(help="one number an adapter, e.g. 2,1,1; equal unless given")]
Density = Annotated[str | None, typer.Option(help="share of entries kept: a number, or PATTERN=NUMBER,... by module")]
Scale = Annotated[str | None, typer.Option(help="multiplies the merge: a number, or PATTERN=NUMBER,... by module")]
Space = Annotated[str | None, typer.Option(help="where the updates meet: core or knots; the weights' own unless given")]
Seed = Annotated[int, typer.Option(help="of dare and della")]
Spec = Annotated[Path | None, typer.Option(help="a YAML file of these settings, as under `merge:` in a config")]
BaseModel = Annotated[str | None, typer.Option("--base", help="the model that the adapters are for")]


@app.command(rich_help_panel=ADAPTERS)
def merge(
    adapters: Adapters,
    out: Annotated[Path, typer.Option(help="the adapter folder to write; it must not exist")],
    method: Method = None,
    weights: Weights = None,
    density: Density = None,
    scale: Scale = None,
    space: Space = None,
    seed: Seed = 0,
    rank: Annotated[int | None, typer.Option(help="the rank to write; exact where the merge is low-rank")] = None,
    spec: Spec = None,
    base: BaseModel = None,
    as_json: Json = False,
) -> None:
    """Merge PEFT LoRA adapters by their true updates into one that PEFT loads.

    Example: mot-lora merge a b c --method ties --density 0.5 --rank 32 --out merged
    """
    settings = _merge_settings(spec, method, weights, density, scale, space)
    _check_new(out)
    from mot_lora.display import live, screen
    from mot_lora.pack import save_adapter
    from mot_lora.sources import merge_adapters
    from mot_lora.tables import save_table

    console = screen(as_json)
    merged = merge_adapters(adapters, **settings, seed=seed, base=base)
    with live(console) as progress:
        record = save_adapter(merged, out, rank, progress)
    if as_json:
        _print_json({"out": str(out), **record.model_dump(mode="json")})
        return
    if record.lost:
        console.print(save_table(record))
    lost = f"{record.lost:.2%} of the merge lost" if record.lost else "exact"
    console.print(f"adapter of rank {record.rank}, {lost}: {out}", soft_wrap=True, highlight=False)


@app.command(rich_help_panel=ADAPTERS)
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
        Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="what is written; the base's unless given")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="read it back and check every tensor")] = False,
    as_json: Json = False,
) -> None:
    """Merge PEFT LoRA adapters and fold them into their base: a full checkpoint, exact, a tensor in memory at a time.

    Example: mot-lora fold Qwen/Qwen3-0.6B a b c --out model --verify
    """
    settings = _merge_settings(spec, method, weights, density, scale, space)
    _check_new(out)
    import torch

    from mot_lora.checkpoint import Checkpoint
    from mot_lora.display import live, screen
    from mot_lora.fold import fold_checkpoint
    from mot_lora.sources import merge_adapters
    from mot_lora.tables import verify_table
    from mot_lora.verify import verify_checkpoint

    console = screen(as_json)
    checkpoint = Checkpoint.open(base)
    merged = merge_adapters(adapters, **settings, seed=seed, base=checkpoint)
    to = getattr(torch, dtype) if dtype else None
    with live(console) as progress:
        fold_checkpoint(checkpoint, merged, out, to, progress=progress)
        record = verify_checkpoint(checkpoint, merged, out, to, progress) if verify else None
    if as_json:
        verified = record.model_dump(mode="json") if record else None
        _print_json({"out": str(out), "modules": len(merged.shapes), "verified": verified})
        return
    if record:
        console.print(verify_table(record))
    console.print(f"{len(merged.shapes)} modules of {base} updated: {out}", soft_wrap=True, highlight=False)


@app.command(rich_help_panel=ADAPTERS)
def inspect(
    adapters: Adapters,
    base: BaseModel = None,
    plot: Annotated[Path | None, typer.Option(help="also draw it: a .png, .svg or .pdf file")] = None,
    as_json: Json = False,
) -> None:
    """Look at adapters before merging: ranks, norms, how far they agree, what a rank-r copy of their mean loses.

    Example: mot-lora inspect a b c --base Qwen/Qwen3-0.6B --plot agreement.png
    """
    from mot_lora.picture import check_picture, save_picture

    if plot:
        check_picture(plot)
    from mot_lora.display import live, screen
    from mot_lora.inspection import inspect_adapters
    from mot_lora.tables import inspect_tables

    console = screen(as_json)
    with live(console) as progress:
        record = inspect_adapters(adapters, base, progress)
    if plot:
        save_picture(record, plot)
    if as_json:
        _print_json(record.model_dump(mode="json"))
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
    said = load_merge(spec, method=method, weights=numbers, density=density, scale=scale, space=space)
    return said.model_dump()


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists; choose another --out, nothing is overwritten")


def _print_json(value: dict[str, Any]) -> None:
    json.dump(value, sys.stdout)
    sys.stdout.write("\n")


def _status(interrupt: BaseException) -> int:
    return int(interrupt.code or 0) if isinstance(interrupt, SystemExit) else INTERRUPTED


class _Told(SystemExit):
    """An end of which the user has been told."""


def _end(status: int, line: str) -> NoReturn:
    print(line, file=sys.stderr)
    raise _Told(status) from None


def main() -> None:
    """Run a command; a mistake of the user's ends with exit status 2 and one line."""
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other about their next versions
    # threads that wait by spinning make CPU work many times slower wherever something else runs beside it
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        with signals_raise():
            status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UserError as e:
        _end(2, "error: " + " ".join(str(e).split()))
    except USAGE_ERROR as e:
        _end(2, "error: " + " ".join(e.format_message().split()) + "; see mot-lora --help")
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except _Told:
        raise
    except SystemExit as e:
        status = _status(e)
    if status and status > 128:  # a signal; INTERRUPTED is also what Typer makes of a KeyboardInterrupt
        _end(status, "stopped; nothing half-written is left")
    raise SystemExit(status or 0)


if __name__ == "__main__":
    main()
