"""Running a comparison: every arm with every seed, each a run of the loop in its own folder."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mot_lora.analysis.arms import BOTH, PAPER, Arm, placed
from mot_lora.analysis.comparison import ArmRun, Budget
from mot_lora.analysis.outcomes import read_arms
from mot_lora.config import Config
from mot_lora.durable import check_files, staged, write_record
from mot_lora.errors import UserError
from mot_lora.progress import Progress, silent
from mot_lora.runs.distillation import Evaluate, Train, run, stages
from mot_lora.runs.inputs import by_content, resolved
from mot_lora.runs.ledger import read_run
from mot_lora.runs.rundir import RunDir
from mot_lora.training import branch, evaluation
from mot_lora.training.student import device_of

# Settings on which the evaluation before the first round depends; and, beside its teacher, a branch of the first round.
BEFORE = ("student", "quantization", "eval", "device", "trust_remote_code", "seed")
BRANCH = (*BEFORE, "lora", "branch")


def compare(
    config: Config,
    seeds: Sequence[int],
    out: str | Path,
    names: Sequence[str] = PAPER,
    budgets: Sequence[Budget] = BOTH,
    *,
    train: Train = branch.train,
    evaluate: Evaluate = evaluation.evaluate,
    progress: Progress = silent,
    told: Callable[[list[ArmRun]], object] | None = None,
    finished: Callable[[RunDir], object] | None = None,
) -> list[ArmRun]:
    """Run every arm with every seed, and return the results.

    Each arm has a folder in `out`, under its seed. Finished work is never repeated; the evaluation before the first
    round and the branches of the first round are copied from another arm of the same seed that has them. Several
    processes may use one `out` for different seeds. `told` is called with all results so far after each arm,
    `finished` with the folder of each finished run.

    Errors: UserError as in `arms` and `run`.

    >>> compare(load_config("recipes/compare_demo.yaml"), [0, 1, 2], "runs/compare")  # doctest: +SKIP
    """
    if (Path(out) / "config.yaml").exists():
        raise UserError(f"{out}: is a run folder; choose another folder for the comparison")
    kind = device_of(config).type
    there = [RunDir(file.parent) for file in sorted(Path(out).glob("seed-*/*/environment.json"))]
    for rundir in there:
        rundir.check_device(config.device, kind)
    config = there[0].here(config) if there else resolved(config)
    for seed in seeds:
        chosen = placed(config, seed, out, names, budgets)
        for arm in chosen:
            if _is_done(arm):
                continue

            def watch(stage: str, *counts: Any, who: str = _who(seed, arm), **numbers: Any) -> None:
                progress(f"{who}, {stage}", *counts, **numbers)

            def begun(_data: object, arm: Arm = arm) -> None:
                there = sorted(Path(arm.config.output).parent.glob("*/config.yaml"))
                borrow(arm.config, [RunDir(f.parent) for f in there if f.parent.name != arm.folder])

            try:
                run(arm.config, train=train, evaluate=evaluate, progress=watch, started=begun, finished=finished)
            except UserError as e:
                raise UserError(f"seed {seed}, arm {arm.name}: {e}") from e
            if told:
                told(read_arms(config, seeds, out, names, budgets))
        _check_inputs(chosen)
    return read_arms(config, seeds, out, names, budgets)


def _is_done(arm: Arm) -> bool:
    """Whether the arm's run is finished, with the same settings and intact files."""
    rundir = RunDir(Path(arm.config.output))
    if not (rundir.path / "config.yaml").exists():
        return False
    if rundir.config().model_copy(update={"output": arm.config.output}) != arm.config:
        return False
    record = read_run(rundir)
    rundir.check(arm.config)
    return bool(record and record.stopped)


def _check_inputs(chosen: Sequence[Arm]) -> None:
    """Errors: UserError if arms were run with different inputs under the same name."""
    inputs = [(arm, RunDir(Path(arm.config.output)).environment()["inputs"]) for arm in chosen]
    for arm, its_own in inputs:
        if changed := _differ(inputs[0][1], its_own):
            raise UserError(
                f"{arm.config.output}: has other inputs than {inputs[0][0].config.output} "
                f"({', '.join(changed)} changed in between); compare in another folder"
            )


def comparison_stages(
    config: Config, seeds: Sequence[int], names: Sequence[str] = PAPER, budgets: Sequence[Budget] = BOTH
) -> list[str]:
    """The stages of a comparison in order, as its progress names them; some may be done already."""
    return [
        f"{_who(seed, arm)}, {stage}"
        for seed in seeds
        for arm in placed(config, seed, "", names, budgets)
        for stage in stages(arm.config)
    ]


def _who(seed: int, arm: Arm) -> str:
    return f"seed {seed}, {arm.folder}"


def borrow(config: Config, others: Sequence[RunDir]) -> None:
    """Copy from other runs what would come out the same here: the evaluation before the first round, and branches of
    the first round. Only runs with the same inputs on the same kind of device count; existing files are kept.
    """
    rundir, kind = RunDir(Path(config.output)), device_of(config).type
    ours = by_content(config, rundir.environment()["inputs"])
    for other in others:
        theirs = by_content(other.config(), other.environment().get("inputs", {}))
        longest = theirs["branch"]["max_length"] == ours["branch"]["max_length"]  # it selects held-out traces too
        if not longest or any(theirs[k] != ours[k] for k in BEFORE):
            continue
        if rundir.before() is None and other.kind == kind and (before := other.before()):
            check_files(other.path, before.files)
            shutil.copyfile(other.before_answers, rundir.before_answers)
            write_record(rundir.path / "before.json", before)
        for teacher in ours["teachers"] if all(theirs[k] == ours[k] for k in BRANCH) else ():
            name = teacher["name"]
            record = other.branch_record(1, name) if teacher in theirs["teachers"] else None
            on = record.device.kind if record and record.device else other.kind
            if record and on == kind and rundir.branch_record(1, name) is None:
                check_files(other.branch(1, name), record.files)
                with staged(rundir.branch(1, name)) as folder:
                    shutil.copytree(other.branch(1, name), folder, dirs_exist_ok=True)


def _differ(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The inputs that both have and that differ."""
    return sorted(k for k in one.keys() & other.keys() if one[k] != other[k])
