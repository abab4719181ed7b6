"""What people look at, written where they look for it: a run's page, and a comparison's page and tables."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from mot_lora.analysis import experiment
from mot_lora.analysis.comparison import ArmRun, Comparison, comparison_csv, summarize
from mot_lora.analysis.confidence import read_consensus
from mot_lora.durable import read_lines, write_text
from mot_lora.errors import UserError
from mot_lora.records import Answer
from mot_lora.reports.comparison_page import compare_page
from mot_lora.reports.run_page import Page, report
from mot_lora.runs import distillation
from mot_lora.runs.ledger import read_run
from mot_lora.runs.rundir import RunDir

P = ParamSpec("P")
R = TypeVar("R")

PAGE = "report.html"


def read_page(rundir: RunDir) -> Page:
    """Everything that a run's page shows, as far as the run is. Errors: UserError for a run with nothing finished."""
    record = read_run(rundir)
    if record is None:
        raise UserError(f"{rundir.path}: nothing is finished yet")
    last = record.best or len(record.rounds)
    return Page(
        name=rundir.path.resolve().name,
        record=record,
        data=rundir.data_record(),
        before=read_lines(rundir.before_answers, Answer),
        after=read_lines(rundir.round(last) / "answers.jsonl", Answer) if last else (),
        config=(rundir.path / "config.yaml").read_text(encoding="utf-8"),
        environment=rundir.environment(),
        consensus=read_consensus(rundir),
    )


def write_page(rundir: RunDir, out: Path | None = None) -> Path:
    """Write a run's page, and say where. Errors: UserError for a run with nothing finished."""
    out = out or rundir.path / PAGE
    write_text(out, report(read_page(rundir)))
    return out


def _with_page(work: Callable[P, R]) -> Callable[P, R]:
    """The same work, which ends with the page of every run that it finishes, unless it is given another end."""

    @wraps(work)
    def with_page(*args: P.args, **kwargs: P.kwargs) -> R:
        kwargs.setdefault("finished", write_page)
        return work(*args, **kwargs)

    return with_page


run = _with_page(distillation.run)
compare = _with_page(experiment.compare)


def publish(runs: Sequence[ArmRun], out: str | Path, settings: Mapping[str, str]) -> Comparison:
    """Write what a comparison came to as compare.json, compare.csv and compare.html, and return its summary.

    settings: texts by title that say how it was made: the command, the config.
    """
    comparison, out = summarize(runs), Path(out)
    versions = next((_versions(RunDir(f.parent)) for f in sorted(out.glob("seed-*/*/environment.json"))), None)
    said = {**settings, **(versions or {})}
    tree = {
        "settings": said,
        "comparison": comparison.model_dump(mode="json"),
        "runs": [r.model_dump(mode="json") for r in runs],
    }
    write_text(out / "compare.json", json.dumps(tree, indent=1) + "\n")
    write_text(out / "compare.csv", comparison_csv(runs))
    write_text(out / "compare.html", compare_page(comparison, out.resolve().name, said))
    return comparison


def _versions(rundir: RunDir) -> dict[str, str]:
    found = rundir.environment()
    lines = [f"device: {found.get('device', '')}", *(f"{k}: {v}" for k, v in found.get("versions", {}).items())]
    return {"Versions and device": "\n".join(lines)}
