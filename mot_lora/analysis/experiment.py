"""A comparison at work: every arm with every seed, each a run of the loop in a folder of its own."""

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

# What the student before the first round depends on, and what beside its own teacher a branch of the first round.
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
    """Run every arm with every seed, and give what each came to.

    Works in `out`, in a folder for each arm within one for each seed. What is finished there is never done again; the
    student before, and branches of the first round, are taken from an arm of the same seed that has them. Several
    processes may work in one `out`, on different seeds. `told` is given what there is after each arm, `finished` the
    folder of each finished run.

    Errors: UserError as `arms` and `run`.

    >>> compare(load_config("recipes/compare_demo.yaml"), [0, 1, 2], "runs/compare")  # doctest: +SKIP
    """
    if (Path(out) / "config.yaml").exists():
        raise UserError(f"{out}: is a run; choose another folder for the comparison")
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
    """Whether the arm's run is finished, was asked the same, and is as it was written."""
    rundir = RunDir(Path(arm.config.output))
    if not (rundir.path / "config.yaml").exists():
        return False
    if rundir.config().model_copy(update={"output": arm.config.output}) != arm.config:
        return False
    record = read_run(rundir)
    rundir.check(arm.config)
    return bool(record and record.stopped)


def _check_inputs(chosen: Sequence[Arm]) -> None:
    """Errors: UserError when arms were made with different files of the same name."""
    inputs = [(arm, RunDir(Path(arm.config.output)).environment()["inputs"]) for arm in chosen]
    for arm, found in inputs:
        if changed := _differ(inputs[0][1], found):
            raise UserError(
                f"{arm.config.output}: was made with other inputs than {inputs[0][0].config.output} "
                f"({', '.join(changed)} changed in between); compare in another folder"
            )


def comparison_stages(
    config: Config, seeds: Sequence[int], names: Sequence[str] = PAPER, budgets: Sequence[Budget] = BOTH
) -> list[str]:
    """The stages of a comparison in their order, as its progress names them; some are found done."""
    return [
        f"{_who(seed, arm)}, {stage}"
        for seed in seeds
        for arm in placed(config, seed, "", names, budgets)
        for stage in stages(arm.config)
    ]


def _who(seed: int, arm: Arm) -> str:
    return f"seed {seed}, {arm.folder}"


def borrow(config: Config, others: Sequence[RunDir]) -> None:
    """Copy what another run has finished that would come out the same here: how the student did before, and branches
    of the first round. Only from runs with the same inputs, on the same kind of device; what is there is left.
    """
    rundir, kind = RunDir(Path(config.output)), device_of(config).type
    asked = by_content(config, rundir.environment()["inputs"])
    for other in others:
        found = by_content(other.config(), other.environment().get("inputs", {}))
        longest = found["branch"]["max_length"] == asked["branch"]["max_length"]  # of the held-out traces too
        if not longest or any(found[k] != asked[k] for k in BEFORE):
            continue
        if rundir.before() is None and other.kind == kind and (before := other.before()):
            check_files(other.path, before.files)
            shutil.copyfile(other.before_answers, rundir.before_answers)
            write_record(rundir.path / "before.json", before)
        for teacher in asked["teachers"] if all(found[k] == asked[k] for k in BRANCH) else ():
            name = teacher["name"]
            record = other.branch_record(1, name) if teacher in found["teachers"] else None
            on = record.device.kind if record and record.device else other.kind
            if record and on == kind and rundir.branch_record(1, name) is None:
                check_files(other.branch(1, name), record.files)
                with staged(rundir.branch(1, name)) as folder:
                    shutil.copytree(other.branch(1, name), folder, dirs_exist_ok=True)


def _differ(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The inputs that both have and that are not the same."""
    return sorted(k for k in one.keys() & other.keys() if one[k] != other[k])
