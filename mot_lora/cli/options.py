"""What the commands share: arguments, options, and output as JSON."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML config, e.g. recipes/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings that replace the file's, e.g. rounds=2")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]
Student = Annotated[str | None, typer.Option(metavar="PATH", help="path of the run's student, if it was moved")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


def print_json(value: dict[str, Any]) -> None:
    """Print one object on standard output."""
    json.dump(value, sys.stdout)
    sys.stdout.write("\n")


class WithSettings(TyperCommand):
    """A command that takes settings as KEY=VALUE; its help ends with the list of keys."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Add the keys, which are collected only for the help."""
        from mot_lora.settings import keys

        first = "The settings: KEY=VALUE with dots for inner keys, e.g. branch.steps=20 teachers.0.samples=500"
        last = "mot-lora init writes a config that explains each of them."
        self.epilog = "\n\n".join((first, keys(), last))
        super().format_help(ctx, formatter)
