"""The commands that measure: a student on benchmarks, and merging beside its alternatives."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mot_lora.cli.ending import resumable
from mot_lora.cli.options import ConfigFile, Json, Overrides, RunFolder, Student, print_json


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
    with resumable(command):
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
    if as_json:
        print_json({"out": str(out), **comparison.model_dump(mode="json")})
        return
    for shown in [] if quiet else comparison_tables(comparison):
        console.print(shown)
    console.print(f"comparison: {out} (compare.html is its picture)", soft_wrap=True, highlight=False)
