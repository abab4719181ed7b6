"""A comparison at work: every arm with every seed, each a run of the loop in a folder of its own."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mot_lora import branch
from mot_lora import evaluate as evaluation
from mot_lora.arms import BOTH, PAPER, Arm, arms
from mot_lora.compare_page import compare_page
from mot_lora.comparison import ArmRun, Budget, Comparison, comparison_csv, summarize
from mot_lora.config import Config
from mot_lora.durable import check_files, read_lines, read_record, staged, write_record, write_text
from mot_lora.errors import UserError
from mot_lora.ledger import read_run
from mot_lora.progress import Progress, silent
from mot_lora.records import Answer, EvaluationRecord, RunRecord
from mot_lora.rounds import Evaluate, Train, run, stages
from mot_lora.rundir import RunDir
from mot_lora.scoring import elected, is_right, mean_score

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
) -> list[ArmRun]:
    """Run every arm with every seed, and give what each came to.

    Works in `out`, in a folder for each arm within one for each seed. What is finished there is never done again; the
    student before, and branches of the first round, are taken from an arm of the same seed that has them. Several
    processes may work in one `out`, on different seeds. `told` is given what there is after each arm.

    Errors: UserError as `arms` and `run`.

    >>> compare(load_config("recipes/compare_demo.yaml"), [0, 1, 2], "runs/compare")  # doctest: +SKIP
    """
    if (Path(out) / "config.yaml").exists():
        raise UserError(f"{out}: is a run; choose another folder for the comparison")
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
                run(arm.config, train=train, evaluate=evaluate, progress=watch, started=begun)
            except UserError as e:
                raise UserError(f"seed {seed}, arm {arm.name}: {e}") from e
            if told:
                told(read_arms(config, seeds, out, names, budgets))
        _check_inputs(chosen)
    return read_arms(config, seeds, out, names, budgets)


def _is_done(arm: Arm) -> bool:
    """Whether the arm's run is finished, was asked the same, and is as it was written."""
    rundir = RunDir(Path(arm.config.output))
    if not (rundir.path / "config.yaml").exists() or rundir.config() != arm.config:
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


def placed(
    config: Config, seed: int, out: str | Path, names: Sequence[str] = PAPER, budgets: Sequence[Budget] = BOTH
) -> list[Arm]:
    """The runs of a seed, each with its folder as output."""
    found = arms(config.model_copy(update={"seed": seed}), names, budgets)
    return [a.at(Path(out) / f"seed-{seed}" / a.folder) for a in found]


def borrow(config: Config, others: Sequence[RunDir]) -> None:
    """Copy what another run has finished that would come out the same here: how the student did before, and branches
    of the first round. Only from runs with the same inputs; what is there is left.
    """
    rundir, asked = RunDir(Path(config.output)), config.model_dump(mode="json")
    inputs = rundir.environment()["inputs"]
    for other in others:
        found = other.config().model_dump(mode="json")
        theirs = other.environment().get("inputs", {})
        longest = found["branch"]["max_length"] == asked["branch"]["max_length"]  # of the held-out traces too
        if not longest or any(found[k] != asked[k] for k in BEFORE) or _differ(theirs, inputs):
            continue
        if rundir.before() is None and (before := other.before()):
            check_files(other.path, before.files)
            shutil.copyfile(other.before_answers, rundir.before_answers)
            write_record(rundir.path / "before.json", before)
        for teacher in asked["teachers"] if all(found[k] == asked[k] for k in BRANCH) else ():
            name = teacher["name"]
            record = other.branch_record(1, name) if teacher in found["teachers"] else None
            if record and rundir.branch_record(1, name) is None:
                check_files(other.branch(1, name), record.files)
                with staged(rundir.branch(1, name)) as folder:
                    shutil.copytree(other.branch(1, name), folder, dirs_exist_ok=True)


def _differ(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The inputs that both have and that are not the same."""
    return sorted(k for k in one.keys() & other.keys() if one[k] != other[k])


def read_arms(
    config: Config,
    seeds: Sequence[int],
    out: str | Path,
    names: Sequence[str] = PAPER,
    budgets: Sequence[Budget] = BOTH,
) -> list[ArmRun]:
    """What every finished arm came to; those that are not finished are left out."""
    found: list[ArmRun] = []
    for seed in seeds:
        done: list[tuple[Arm, RunRecord]] = []
        for arm in placed(config, seed, out, names, budgets):
            rundir = RunDir(Path(arm.config.output))
            record = read_run(rundir) if (rundir.path / "config.yaml").exists() else None
            if record and record.stopped:
                done.append((arm, record))
        if done and "base" in names:
            found.append(_before(*done[0]))
        found += [_arm_run(arm, record) for arm, record in done]
        if "vote" in names:
            found += _votes(done, [f"std:{t.name}" for t in config.teachers])
    return found


def _before(arm: Arm, record: RunRecord) -> ArmRun:
    return _arm_run(Arm("base", BOTH, arm.config), record.model_copy(update={"branches": (), "rounds": ()}))


def _arm_run(arm: Arm, record: RunRecord) -> ArmRun:
    rundir = RunDir(Path(arm.config.output))
    evaluations = [record.before, *(r.evaluation for r in record.rounds)]
    weighed = [read_record(f, EvaluationRecord) for f in sorted(rundir.path.glob("round-*/validation-*.json"))]
    return ArmRun(
        arm=arm.name,
        budgets=arm.budgets,
        seed=arm.config.seed,
        accuracy=tuple(e.accuracy for e in evaluations if e.accuracy is not None),
        loss=tuple(e.loss for e in evaluations if e.loss is not None),
        forgetting={n: tuple(e.forgetting[n] for e in evaluations) for n in record.before.forgetting},
        scores=tuple(a.score for a in _answers(arm, len(record.rounds))),
        branch_steps=sum(b.train.steps for b in record.branches),
        tokens=sum(b.train.tokens for b in record.branches),
        seconds=sum(b.train.seconds for b in record.branches)
        + sum(r.fold_seconds for r in record.rounds)
        + sum(v.seconds for v in weighed if v and record.rounds),
    )


def _answers(arm: Arm, number: int) -> list[Answer]:
    rundir = RunDir(Path(arm.config.output))
    return read_lines(rundir.round(number) / "answers.jsonl" if number else rundir.before_answers, Answer)


def _votes(done: Sequence[tuple[Arm, RunRecord]], voters: Sequence[str]) -> Iterator[ArmRun]:
    """What most of the single-teacher students answer, in each budget in which all of them are finished."""
    for budget in BOTH:
        students = [(arm, record) for arm, record in done if arm.name in voters and budget in arm.budgets]
        if len(students) < len(voters) or not students[0][1].before.questions:
            continue
        runs = [_arm_run(arm, record) for arm, record in students]
        rounds = [
            [_vote(same) for same in zip(*(_answers(arm, number) for arm, _ in students), strict=True)]
            for number in range(1 + len(students[0][1].rounds))
        ]
        yield ArmRun(
            arm="vote",
            budgets=(budget,),
            seed=runs[0].seed,
            accuracy=tuple(mean_score(scores)[0] for scores in rounds),
            scores=tuple(rounds[-1]),
            branch_steps=sum(r.branch_steps for r in runs),
            tokens=sum(r.tokens for r in runs),
            seconds=sum(r.seconds for r in runs),
        )


def _vote(answers: Sequence[Answer]) -> float:
    """The score of what most of several students say to one question, sample by sample."""
    ballots = zip(*(a.texts for a in answers), strict=True)
    return mean_score([float(is_right(elected(texts), answers[0].answer)) for texts in ballots])[0]


def publish(runs: Sequence[ArmRun], out: str | Path, settings: Mapping[str, str]) -> Comparison:
    """Write what a comparison came to as compare.json, compare.csv and compare.html, and return its summary.

    settings: texts by title that say how it was made: the command, the config.
    """
    comparison, out = summarize(runs), Path(out)
    versions = next((_versions(RunDir(f.parent)) for f in sorted(out.glob("seed-*/*/environment.json"))), {})
    said = {**settings, **versions}
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
