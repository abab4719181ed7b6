"""The program: its commands, and its exit."""

import os
import sys
import warnings
from typing import Annotated, Any

import typer

from mot_lora.cli import adapters, measure, prepare, runs
from mot_lora.cli.ending import INTERRUPTED, Reported, end, status_of
from mot_lora.cli.options import WithSettings
from mot_lora.errors import Remark, UserError
from mot_lora.interruption import signals_raise

USAGE_ERROR: Any = typer.BadParameter.__base__  # click's UsageError, or that of Typer's own copy of click
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Merge-of-Thought distillation on one GPU, and exact merging and folding of PEFT adapters.",
    epilog="Example: mot-lora init my.yaml, then mot-lora data my.yaml, then mot-lora run my.yaml",
)


def _version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print(version("mot-lora"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options before a command."""


LOOP, ADAPTERS = "Distill teachers into a student", "Merge adapters that you have"  # how --help groups the commands
app.command(rich_help_panel=LOOP)(prepare.init)
app.command(rich_help_panel=LOOP, cls=WithSettings)(prepare.data)
app.command(rich_help_panel=LOOP)(prepare.doctor)
app.command(rich_help_panel=LOOP, cls=WithSettings)(prepare.plan)
app.command(rich_help_panel=LOOP, cls=WithSettings)(runs.run)
app.command(rich_help_panel=LOOP)(runs.show)
app.command(rich_help_panel=LOOP)(runs.report)
app.command(rich_help_panel=LOOP)(runs.export)
app.command("eval", rich_help_panel=LOOP)(measure.eval_)
app.command(rich_help_panel=LOOP, cls=WithSettings)(measure.compare)
app.command(rich_help_panel=ADAPTERS)(adapters.merge)
app.command(rich_help_panel=ADAPTERS)(adapters.fold)
app.command(rich_help_panel=ADAPTERS)(adapters.inspect)


def _show(message: Warning | str, category: type[Warning], file: str, line: int, *_: Any) -> None:
    is_ours = category is Remark
    sys.stderr.write(f"note: {message}\n" if is_ours else warnings.formatwarning(message, category, file, line))


def main() -> None:
    """Run a command; a user's mistake ends with exit status 2 and one line."""
    warnings.simplefilter("ignore", FutureWarning)  # between libraries, about their next versions
    warnings.simplefilter("always", Remark)
    warnings.showwarning = _show
    # waiting threads that spin make CPU work many times slower when other programs run
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        with signals_raise():
            status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UserError as e:
        end(2, "error: " + " ".join(str(e).split()))
    except USAGE_ERROR as e:
        end(2, "error: " + " ".join(e.format_message().split()) + "; see mot-lora --help")
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Reported:
        raise
    except SystemExit as e:
        status = status_of(e)
    if status and status > 128:  # a signal; INTERRUPTED is also what Typer makes of a KeyboardInterrupt
        end(status, "stopped; nothing half-written is left")
    raise SystemExit(status or 0)
