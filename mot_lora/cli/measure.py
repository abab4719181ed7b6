"""The commands that measure: a student on benchmarks, and merging against its alternatives."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mot_lora.cli.ending import resumable
from mot_lora.cli.options import ConfigFile, Json, Overrides, RunFolder, Student, print_json


def eval_(
    run_folder: RunFolder,
    tasks: Annotated[str, typer.Option(help="names of tasks or groups, e.g. gsm8k,arc_challenge")],
    round: Annotated[int | None, typer.Option(help="round to measure; default: the best one")] = None,
    student: Student = None,
    base: Annotated[
        bool, typer.Option("--base", help="also measure the student before the run, and the change")
    ] = False,
    quantized: Annotated[
        bool, typer.Option("--quantized", help="measure it quantized, as in the run; default: as exported, in bf16")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first questions of each task")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="worked examples; default: the task's own")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens of an answer; default: the task's own, often 256")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions at a time")] = 8,
    chat_template: Annotated[
        bool, typer.Option("--chat-template/--no-chat-template", help="ask in a chat, or as plain text")
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


def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option(help="one run of every arm for each, e.g. 0,1,2")] = "0,1,2,3,4",
    names: Annotated[
        str, typer.Option("--arms", help="base, std, mtd, one_shot, linear, ties, ...; or all; default: the paper's")
    ] = "",
    budgets: Annotated[
        str, typer.Option(help="equal steps per branch, or equal branch-steps in total")
    ] = "steps,total",
    out: Annotated[Path | None, typer.Option(help="folder of the comparison; default: the config's output")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="show only the last line")] = False,
    as_json: Json = False,
) -> None:
    """Compare merging with single teachers, their union and a vote: over seeds, at equal compute.

    Writes compare.html, .csv and .json; the same command resumes where it stopped.

    Example: mot-lora compare my.yaml --seeds 0,1,2 --arms std,mtd,linear,ties --out runs/compared
    """
    from mot_lora.analysis.arms import choose, numbers
    from mot_lora.reader import load_config

    overrides = overrides or []
    settings = load_config(config, overrides)
    chosen = numbers(seeds), *choose(settings, names, budgets)
    out = out or Path(settings.output)
    command = ["mot-lora", "compare", str(config), *overrides, "--seeds", seeds, *(["--arms", names] if names else [])]
    command += [*(["--budgets", budgets] if budgets != "steps,total" else []), "--out", str(out)]
    with resumable(command):
        from mot_lora.analysis.experiment import comparison_stages
        from mot_lora.reports.display import live, screen
        from mot_lora.reports.publish import compare as compare_arms
        from mot_lora.reports.publish import publish
        from mot_lora.reports.tables import comparison_tables

        origin = {"Command": shlex.join(command), "Config": config.read_text(encoding="utf-8")}
        console = screen(as_json, quiet)
        with live(console, comparison_stages(settings, *chosen), quiet) as progress:
            runs = compare_arms(
                settings, chosen[0], out, *chosen[1:], progress=progress, told=lambda r: publish(r, out, origin)
            )
        comparison = publish(runs, out, origin)
    if as_json:
        print_json({"out": str(out), **comparison.model_dump(mode="json")})
        return
    for shown in [] if quiet else comparison_tables(comparison):
        console.print(shown)
    console.print(f"comparison: {out} (open compare.html)", soft_wrap=True, highlight=False)
