"""The commands before a run: write a config, show its data, check the machine, plan memory and time."""

from pathlib import Path
from typing import Annotated

import typer

from mot_lora.cli.options import ConfigFile, Json, Overrides, print_json
from mot_lora.errors import UserError


def init(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the file to write; it must not exist")] = Path(
        "mot.yaml"
    ),
    as_json: Json = False,
) -> None:
    """Write a config to start from, with every setting and what it means.

    Example: mot-lora init my.yaml
    """
    from mot_lora.errors import writing
    from mot_lora.settings import template

    if config.exists():
        raise UserError(f"{config}: exists, and nothing is overwritten; choose another file")
    with writing(config):
        config.write_text(template(), encoding="utf-8")
    if as_json:
        print_json({"config": str(config)})
    else:
        print(f"{config}: name your student and teachers in it, then: mot-lora data {config}")


def data(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what a run would train on: rows used, left out and why, tokens, and a sample with its trained part marked.

    Example: mot-lora data my.yaml branch.max_length=8192
    """
    from mot_lora.reader import load_config

    settings = load_config(config, overrides or [])
    from mot_lora.checkpoints.checkpoint import Checkpoint
    from mot_lora.data.dataset import load_data
    from mot_lora.data.tokenizer import load_tokenizer
    from mot_lora.reports.display import live, screen
    from mot_lora.reports.tables import data_tables
    from mot_lora.runs.rundir import RunDir

    settings = RunDir(Path(settings.output)).here(settings)

    console = screen(as_json)
    with live(console) as progress:
        folder = Checkpoint.open(settings.student, weights=False).path
        record = load_data(settings, load_tokenizer(folder, settings.trust_remote_code), progress).record
    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    for shown in data_tables(record):
        console.print(shown)


def doctor(as_json: Json = False) -> None:
    """Report on this machine, and on what would stop a run on it; exit status 1 if anything would.

    Example: mot-lora doctor
    """
    from mot_lora.planning.machine import doctor as look
    from mot_lora.reports.display import screen
    from mot_lora.reports.tables import machine_table

    machine = look()
    if as_json:
        print_json({**machine.model_dump(mode="json"), "stops": machine.stops, "remarks": machine.remarks})
    else:
        console = screen()
        console.print(machine_table(machine))
        for line in (*machine.remarks, *(f"stops a run: {stop}" for stop in machine.stops)):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        if not machine.stops:
            console.print("nothing would stop a run on this machine")
    if machine.stops:
        raise typer.Exit(1)


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    card: Annotated[str | None, typer.Option(help="e.g. 'RTX 4090' or T4; default: this machine's GPU")] = None,
    gpu_gib: Annotated[float | None, typer.Option(min=1, help="memory of the card, if it differs")] = None,
    as_json: Json = False,
) -> None:
    """Report whether a run fits on a card and how long it takes, before any weights are downloaded.

    Example: mot-lora plan recipes/qwen3_8b_24gb.yaml --card 'RTX 3090' branch.max_length=32768
    """
    from mot_lora.reader import load_config

    settings = load_config(config, overrides or [])
    from mot_lora.reports.display import live, screen
    from mot_lora.reports.tables import plan_tables
    from mot_lora.runs.distillation import preview

    console = screen(as_json)
    with live(console) as progress:
        record, unread = preview(settings, card, gpu_gib, progress)
    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    for shown in plan_tables(record):
        console.print(shown)
    if unread:
        console.print(f"traces of {settings.branch.max_length} tokens are assumed: {unread}", soft_wrap=True)
