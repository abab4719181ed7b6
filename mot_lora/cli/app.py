"""The commands. Each is one call into the package, and says what it did as a table or as JSON."""

import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from mot_lora.cli import adapters as adapter_commands
from mot_lora.cli.options import Json, WithSettings, print_json
from mot_lora.errors import Remark, UserError
from mot_lora.interruption import INTERRUPTS, signals_raise

if TYPE_CHECKING:
    from mot_lora.planning.fit import PlanRecord
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
Student = Annotated[
    str | None, typer.Option(metavar="PATH", help="where the run's student is now, if it was moved to another place")
]


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
    from mot_lora.errors import writing
    from mot_lora.settings import template

    if config.exists():
        raise UserError(f"{config}: exists; name another file, nothing is overwritten")
    with writing(config):
        config.write_text(template(), encoding="utf-8")
    if as_json:
        print_json({"config": str(config)})
    else:
        print(f"{config}: name your student and teachers in it, then: mot-lora data {config}")


@app.command(cls=WithSettings, rich_help_panel=LOOP)
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


@app.command(rich_help_panel=LOOP)
def doctor(as_json: Json = False) -> None:
    """Say what this machine is, and what would stop a run on it; exit status 1 where something would.

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
            console.print("nothing here would stop a run")
    if machine.stops:
        raise typer.Exit(1)


@app.command(cls=WithSettings, rich_help_panel=LOOP)
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    card: Annotated[str | None, typer.Option(help="e.g. 'RTX 4090' or T4; this machine's GPU unless given")] = None,
    gpu_gib: Annotated[float | None, typer.Option(min=1, help="its memory, where it is another")] = None,
    as_json: Json = False,
) -> None:
    """Say whether a run will fit on a card and how long it takes, before the weights are downloaded.

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


@app.command(cls=WithSettings, rich_help_panel=LOOP)
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="begin anew, in a folder beside the one that is there")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="set damaged parts aside, with what was built on them, and do them again")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="begin also where the plan says that it does not fit")] = False,
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

    def planned(record: "PlanRecord") -> None:
        for shown in [] if quiet else plan_tables(record):
            console.print(shown)

    try:
        from mot_lora.reports.display import live, screen
        from mot_lora.reports.publish import run as run_rounds
        from mot_lora.reports.tables import data_tables, faded_line, plan_tables, table
        from mot_lora.runs.distillation import stages

        console = screen(as_json, quiet)
        with live(console, stages(settings), quiet) as progress:
            record = run_rounds(
                settings, progress=progress, repair=repair, started=started, planned=planned, force=force
            )
    except INTERRUPTS as e:
        again = shlex.join(["mot-lora", "run", str(config), *overrides, *(["--force"] if force else [])])
        _end(_status(e), f"stopped; nothing that was finished is lost, go on with: {again}")
    if as_json:
        print_json({"run": settings.output, **record.model_dump(mode="json")})
        return
    if not quiet:
        console.print(table(record))
        best = f"round {record.best}" if record.best else "none"
        console.print(f"{record.stopped}; best by {record.metric}: {best}")
        if settings.quantization == "none" and (line := faded_line(record)):
            console.print(line, soft_wrap=True, highlight=False)
    console.print(f"run folder: {settings.output} (report.html is its picture)", soft_wrap=True, highlight=False)


@app.command(rich_help_panel=LOOP)
def show(run_folder: RunFolder, as_json: Json = False) -> None:
    """Say where a run stands: what is finished, what can go on, who is at work on it.

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


@app.command(rich_help_panel=LOOP)
def report(
    run_folder: RunFolder,
    out: Annotated[Path | None, typer.Option(help="the page to write; report.html in the run unless given")] = None,
    traces: Annotated[int, typer.Option(help="held-out traces a teacher to look at consensus on", min=1)] = 8,
    student: Student = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="do not look with the student; what was found before is shown")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a run's page: scores, losses, agreement, consensus, answers, data, settings. It may be at work still.

    From two rounds on it looks at what the branches agree on, with the student, and keeps that in the run.

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
            console.print(f"without looking at consensus: {e}", soft_wrap=True, highlight=False)
    out = write_page(rundir, out)
    if as_json:
        looked = read_consensus(rundir) is not None
        print_json({"report": str(out), "consensus": str(run_folder / CONSENSUS) if looked else None})
    else:
        print(out)


@app.command(rich_help_panel=LOOP)
def export(
    run_folder: RunFolder,
    out: Annotated[Path, typer.Option(help="the folder to write; it must not exist")],
    round: Annotated[int | None, typer.Option(help="the round to export; the best one unless given")] = None,
    student: Student = None,
    form: Annotated[
        Literal["checkpoint", "lora"],
        typer.Option("--as", help="a model of its own, or all rounds as one PEFT adapter of the base, in float32"),
    ] = "checkpoint",
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="what a checkpoint's weights are rounded to; bfloat16 unless given"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="of --as lora; what is exact unless given, for a linear merge")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a round's student as a full checkpoint that transformers loads, or as an adapter that PEFT loads.

    Says how much of the update survived: in 16 bits a small one rounds away.

    Example: mot-lora export runs/quickstart --out student
    """
    if form == "checkpoint" and rank is not None:
        raise UserError(f"--rank {rank}: a checkpoint has none; add --as lora, or leave --rank out")
    if form == "lora" and dtype == "bfloat16":
        raise UserError("--dtype bfloat16: an adapter is written in float32; leave --dtype out, or --as lora")
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


@app.command("eval", rich_help_panel=LOOP)
def eval_(
    run_folder: RunFolder,
    tasks: Annotated[str, typer.Option(help="names of tasks or groups, e.g. gsm8k,arc_challenge")],
    round: Annotated[int | None, typer.Option(help="the round to measure; the best one unless given")] = None,
    student: Student = None,
    base: Annotated[
        bool, typer.Option("--base", help="measure the student before the run too, and the change")
    ] = False,
    quantized: Annotated[
        bool, typer.Option("--quantized", help="as the loop has it in memory; as exported, in bf16, unless given")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first questions of each task")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="worked examples; the task's own unless given")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="of an answer; the task's own, often 256, unless given")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions at a time")] = 8,
    chat_template: Annotated[
        bool, typer.Option("--chat-template/--no-chat-template", help="ask as a chat, or as plain text")
    ] = True,
    include_path: Annotated[Path | None, typer.Option(metavar="DIR", help="a folder of task YAMLs of your own")] = None,
    as_json: Json = False,
) -> None:
    """Measure a round's student on standard benchmarks, with lm-evaluation-harness; results are kept in the run.

    Example: mot-lora eval runs/quickstart --tasks gsm8k,arc_challenge --base --limit 200
    """
    from mot_lora.analysis.harness import evaluate_run
    from mot_lora.reports.display import live, screen
    from mot_lora.reports.tables import eval_table

    console = screen(as_json)
    with live(console) as progress:
        record = evaluate_run(
            run_folder,
            [t.strip() for t in tasks.split(",") if t.strip()],
            round=round,
            student=student,
            quantized=quantized,
            base=base,
            limit=limit,
            num_fewshot=num_fewshot,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            chat_template=chat_template,
            include_path=include_path,
            progress=progress,
        )
    if as_json:
        print_json({"run": str(run_folder), **record.model_dump(mode="json")})
    else:
        console.print(eval_table(record))


@app.command(cls=WithSettings, rich_help_panel=LOOP)
def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option(help="one run of every arm for each, e.g. 0,1,2")] = "0,1,2,3,4",
    names: Annotated[
        str, typer.Option("--arms", help="base, std, mtd, one_shot, linear, ties, ...; all; the paper's unless given")
    ] = "",
    budgets: Annotated[
        str, typer.Option(help="the same steps a branch, or the same branch-steps in all")
    ] = "steps,total",
    out: Annotated[Path | None, typer.Option(help="where to work; the config's output unless given")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="show nothing but the last line")] = False,
    as_json: Json = False,
) -> None:
    """Compare merging with single teachers, their union and a vote: over seeds, at equal compute.

    Writes compare.html, .csv and .json; the same command goes on where it stopped.

    Example: mot-lora compare my.yaml --seeds 0,1,2 --arms std,mtd,linear,ties --out runs/compared
    """
    from mot_lora.analysis.arms import choose, numbers
    from mot_lora.reader import load_config

    overrides = overrides or []
    settings = load_config(config, overrides)
    asked = numbers(seeds), *choose(settings, names, budgets)
    out = out or Path(settings.output)
    command = ["mot-lora", "compare", str(config), *overrides, "--seeds", seeds, *(["--arms", names] if names else [])]
    command += [*(["--budgets", budgets] if budgets != "steps,total" else []), "--out", str(out)]
    try:
        from mot_lora.analysis.experiment import comparison_stages
        from mot_lora.reports.display import live, screen
        from mot_lora.reports.publish import compare as compare_arms
        from mot_lora.reports.publish import publish
        from mot_lora.reports.tables import comparison_tables

        said = {"Command": shlex.join(command), "Config": config.read_text(encoding="utf-8")}
        console = screen(as_json, quiet)
        with live(console, comparison_stages(settings, *asked), quiet) as progress:
            runs = compare_arms(
                settings, asked[0], out, *asked[1:], progress=progress, told=lambda r: publish(r, out, said)
            )
        comparison = publish(runs, out, said)
    except INTERRUPTS as e:
        _end(_status(e), f"stopped; nothing that was finished is lost, go on with: {shlex.join(command)}")
    if as_json:
        print_json({"out": str(out), **comparison.model_dump(mode="json")})
        return
    for shown in [] if quiet else comparison_tables(comparison):
        console.print(shown)
    console.print(f"comparison: {out} (compare.html is its picture)", soft_wrap=True, highlight=False)


for adapter_command in (adapter_commands.merge, adapter_commands.fold, adapter_commands.inspect):
    app.command(rich_help_panel=ADAPTERS)(adapter_command)


def _status(interrupt: BaseException) -> int:
    return int(interrupt.code or 0) if isinstance(interrupt, SystemExit) else INTERRUPTED


class _Told(SystemExit):
    """An end of which the user has been told."""


def _end(status: int, line: str) -> NoReturn:
    print(line, file=sys.stderr)
    raise _Told(status) from None


def _show(message: Warning | str, category: type[Warning], file: str, line: int, *_: Any) -> None:
    is_ours = category is Remark
    sys.stderr.write(f"note: {message}\n" if is_ours else warnings.formatwarning(message, category, file, line))


def main() -> None:
    """Run a command; a mistake of the user's ends with exit status 2 and one line."""
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other about their next versions
    warnings.simplefilter("always", Remark)
    warnings.showwarning = _show
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
