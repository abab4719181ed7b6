"""What the commands share: options, and how they say what they did as JSON."""

import json
import sys
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


def print_json(value: dict[str, Any]) -> None:
    """Print one object on standard output."""
    json.dump(value, sys.stdout)
    sys.stdout.write("\n")
