"""The commands. Each is one call into the package, and says what it did as a table or as JSON."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from mot_lora.errors import UserError

INTERRUPTED = 130
USAGE_ERROR: Any = typer.BadParameter.__base__  # click's UsageError, or that of Typer's own copy of click
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Merge-of-Thought distillation on one GPU: several teachers, one 4-bit student.",
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="a YAML config, e.g. recipes/quickstart.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings that replace the file's, e.g. rounds=2")
    ] = None,
    as_json: Json = False,
) -> None:
    """Distill the teachers of a config into its student; the same command goes on where it stopped.

    Example: mot-lora run recipes/quickstart.yaml rounds=2 output=runs/two
    """
    from mot_lora.config import load_config

    settings = load_config(config, overrides or [])  # a mistake is told before torch is loaded
    from mot_lora.display import live, screen, table
    from mot_lora.rounds import run as run_rounds

    console = screen(as_json)
    with live(console) as progress:
        record = run_rounds(settings, progress=progress)
    if as_json:
        _print_json({"run": settings.output, **record.model_dump(mode="json")})
        return
    console.print(table(record))
    console.print(f"{record.stopped}; best by {record.metric}: {f'round {record.best}' if record.best else 'none'}")
    console.print(f"run folder: {settings.output} (report.html is its picture)", soft_wrap=True, highlight=False)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")],
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


def _print_json(value: dict[str, Any]) -> None:
    json.dump(value, sys.stdout)
    sys.stdout.write("\n")


def _end(status: int, line: str) -> NoReturn:
    print(line, file=sys.stderr)
    raise SystemExit(status) from None


def main() -> None:
    """Run a command; a mistake of the user's ends with exit status 2 and one line."""
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other about their next versions
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UserError as e:
        _end(2, "error: " + " ".join(str(e).split()))
    except USAGE_ERROR as e:
        _end(2, "error: " + " ".join(e.format_message().split()) + "; see mot-lora --help")
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
        _end(INTERRUPTED, "stopped; the same command goes on from what is finished")
    raise SystemExit(status or 0)


if __name__ == "__main__":
    main()
