"""What the commands share: options, and how they say what they did as JSON."""

import json
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


def print_json(value: dict[str, Any]) -> None:
    """Print one object on standard output."""
    json.dump(value, sys.stdout)
    sys.stdout.write("\n")


class WithSettings(TyperCommand):
    """A command that takes settings as KEY=VALUE: its help ends with their keys."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Add the keys, which are made only where somebody asks."""
        from mot_lora.settings import keys

        first = "The settings: KEY=VALUE with dots for inner keys, e.g. branch.steps=20 teachers.0.samples=500"
        last = "mot-lora init writes a config with each of them and what it means."
        self.epilog = "\n\n".join((first, keys(), last))
        super().format_help(ctx, formatter)
