"""The commands for runs: start or resume one, show its state, write its page, export its student."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mot_lora.cli.ending import resumable
from mot_lora.cli.options import ConfigFile, Json, Overrides, RunFolder, Student, print_json
from mot_lora.errors import UserError

if TYPE_CHECKING:
    from mot_lora.data.records import DataRecord
    from mot_lora.planning.fit import PlanRecord


def run(
    config: ConfigFile,
    overrides: Overrides = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="start over in a new folder beside the existing one")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="set damaged parts aside, with all built on them, and repeat them")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="run even if the plan says that it does not fit")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="show only the last line")] = False,
    as_json: Json = False,
) -> None:
    """Distill the teachers of a config into its student; the same command resumes where it stopped.

    Example: mot-lora run recipes/quickstart.yaml rounds=2 output=runs/two
    """
    from mot_lora.reader import load_config

    overrides = overrides or []
    settings = load_config(config, overrides)  # mistakes are found before torch is loaded
    if from_scratch:
        from mot_lora.durable import beside

        overrides = [o for o in overrides if not o.startswith("output=")] + [f"output={beside(Path(settings.output))}"]
        settings = load_config(config, overrides)

    with resumable(["mot-lora", "run", str(config), *overrides, *(["--force"] if force else [])]):
        from mot_lora.reports.display import live, screen
        from mot_lora.reports.publish import run as run_rounds
        from mot_lora.reports.tables import data_tables, faded_line, plan_tables, table
        from mot_lora.runs.distillation import stages

        console = screen(as_json, quiet)

        def started(record: "DataRecord") -> None:
            for shown in [] if quiet else data_tables(record):
                console.print(shown)

        def planned(record: "PlanRecord") -> None:
            for shown in [] if quiet else plan_tables(record):
                console.print(shown)

        with live(console, stages(settings), quiet) as progress:
            record = run_rounds(
                settings, progress=progress, repair=repair, started=started, planned=planned, force=force
            )
    if as_json:
        print_json({"run": settings.output, **record.model_dump(mode="json")})
        return
    if not quiet:
        console.print(table(record))
        best = f"round {record.best}" if record.best else "none"
        console.print(f"{record.stopped}; best by {record.metric}: {best}")
        if settings.quantization == "none" and (line := faded_line(record)):
            console.print(line, soft_wrap=True, highlight=False)
    console.print(f"run folder: {settings.output} (open report.html)", soft_wrap=True, highlight=False)


def show(run_folder: RunFolder, as_json: Json = False) -> None:
    """Show the state of a run: what is finished, what can be resumed, and which process is running it.

    Example: mot-lora show runs/quickstart
    """
    from mot_lora.reports.display import screen
    from mot_lora.reports.tables import table
    from mot_lora.runs.ledger import read_run, read_state
    from mot_lora.runs.rundir import RunDir

    rundir = RunDir(run_folder)
    state, record = read_state(rundir), read_run(rundir)
    if as_json:
        run = record.model_dump(mode="json") if record else None
        print_json({"run_folder": str(run_folder), **state.model_dump(mode="json"), "run": run})
        return
    console = screen()
    if record:
        console.print(table(record))
    console.print(f"{run_folder}: {state.line}", soft_wrap=True, highlight=False)


def report(
    run_folder: RunFolder,
    out: Annotated[Path | None, typer.Option(help="page to write; default: report.html in the run")] = None,
    traces: Annotated[int, typer.Option(help="held-out traces a teacher to measure consensus on", min=1)] = 8,
    student: Student = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="do not load the student; show the consensus measured before, if any")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a run's page: scores, losses, agreement, consensus, answers, data, settings; also for a run in progress.

    With two or more rounds it loads the student and measures what the branches agree on; the result is kept in the run.

    Example: mot-lora report runs/quickstart --out quickstart.html
    """
    from mot_lora.analysis.confidence import CONSENSUS, read_consensus
    from mot_lora.reports.publish import read_page, write_page
    from mot_lora.runs.rundir import RunDir

    rundir = RunDir(run_folder)
    if len(read_page(rundir).record.rounds) > 1 and not quick:
        from mot_lora.analysis.consensus import consensus
        from mot_lora.reports.display import live, screen

        console = screen(as_json)
        console.print(f"consensus, on at most {traces} held-out traces a teacher; --quick leaves it out")
        try:
            with live(console) as progress:
                consensus(run_folder, traces=traces, student=student, progress=progress)
        except UserError as e:
            console.print(f"without consensus: {e}", soft_wrap=True, highlight=False)
    out = write_page(rundir, out)
    if as_json:
        measured = read_consensus(rundir) is not None
        print_json({"report": str(out), "consensus": str(run_folder / CONSENSUS) if measured else None})
    else:
        print(out)


def export(
    run_folder: RunFolder,
    out: Annotated[Path, typer.Option(help="the folder to write; it must not exist")],
    round: Annotated[int | None, typer.Option(help="round to export; default: the best one")] = None,
    student: Student = None,
    form: Annotated[
        Literal["checkpoint", "lora"],
        typer.Option("--as", help="a full model, or all rounds as one PEFT adapter of the base, in float32"),
    ] = "checkpoint",
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="dtype of the checkpoint's weights; default: bfloat16"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="rank with --as lora; default: exact, for a linear merge")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a round's student as a full checkpoint that transformers loads, or as an adapter that PEFT loads.

    Reports how much of the update survived: in 16 bits a small one is lost to rounding.

    Example: mot-lora export runs/quickstart --out student
    """
    if form == "checkpoint" and rank is not None:
        raise UserError(f"--rank {rank}: a checkpoint has no rank; add --as lora, or leave --rank out")
    if form == "lora" and dtype == "bfloat16":
        raise UserError("--dtype bfloat16: an adapter is written in float32; leave out --dtype or --as lora")
    import torch

    from mot_lora.reports.display import live, screen
    from mot_lora.reports.tables import export_lines
    from mot_lora.runs.export import export as export_checkpoint
    from mot_lora.runs.export import export_adapter

    console = screen(as_json)
    with live(console) as progress:
        if form == "lora":
            record = export_adapter(run_folder, out, round=round, student=student, rank=rank, progress=progress)
        else:
            to = getattr(torch, dtype or "bfloat16")
            record = export_checkpoint(run_folder, out, round=round, student=student, dtype=to, progress=progress)
    if as_json:
        print_json({"out": str(out), **record.model_dump(mode="json")})
        return
    for line in export_lines(record, out):
        console.print(line, soft_wrap=True, highlight=False)
