"""A comparison at work: every arm with every seed, each a run of the loop in a folder of its own."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mot_lora import branch
from mot_lora import evaluate as evaluation
from mot_lora.arms import BOTH, PAPER, Arm, arms
from mot_lora.comparison import ArmRun
from mot_lora.config import Config
from mot_lora.durable import check_files, read_lines, read_record, staged, write_record
from mot_lora.errors import UserError
from mot_lora.ledger import read_run
from mot_lora.progress import Progress, silent
from mot_lora.records import Answer, EvaluationRecord, RunRecord
from mot_lora.rounds import Evaluate, Train, run
from mot_lora.rundir import RunDir
from mot_lora.scoring import elected, is_right, mean_score

# What the student before the first round depends on, and with its own teacher a branch of the first round.
SHARED = ("student", "lora", "branch", "quantization", "eval", "device", "trust_remote_code", "seed")


def compare(
    config: Config,
    seeds: Sequence[int],
    out: str | Path,
    names: Sequence[str] = PAPER,
    *,
    train: Train = branch.train,
    evaluate: Evaluate = evaluation.evaluate,
    progress: Progress = silent,
) -> list[ArmRun]:
    """Run every arm with every seed, and give what each came to.

    Works in `out`, in a folder for each arm within one for each seed. What is finished there is never done again; the
    student before, and branches of the first round, are taken from an arm of the same seed that has them. Several
    processes may work in one `out`, on different seeds.

    Errors: UserError as `arms` and `run`.

    >>> compare(load_config("recipes/compare_demo.yaml"), [0, 1, 2], "runs/compare")  # doctest: +SKIP
    """
    for seed in seeds:
        chosen = placed(config, seed, out, names)
        for arm in chosen:
            others = [RunDir(Path(a.config.output)) for a in chosen if a is not arm]

            def watch(stage: str, *counts: Any, who: str = f"seed {seed}, {arm.name}", **numbers: Any) -> None:
                progress(f"{who}, {stage}", *counts, **numbers)

            def begun(_data: object, arm: Arm = arm, others: Sequence[RunDir] = others) -> None:
                borrow(arm.config, others)

            try:
                run(arm.config, train=train, evaluate=evaluate, progress=watch, started=begun)
            except UserError as e:
                raise UserError(f"seed {seed}, arm {arm.name}: {e}") from e
    return read_arms(config, seeds, out, names)


def placed(config: Config, seed: int, out: str | Path, names: Sequence[str]) -> list[Arm]:
    """The runs of a seed, each with its folder as output."""
    found = arms(config.model_copy(update={"seed": seed}), names)
    return [a.at(Path(out) / f"seed-{seed}" / a.folder) for a in found]


def borrow(config: Config, others: Sequence[RunDir]) -> None:
    """Copy what another run has finished that would come out the same here: the student before, and branches of the
    first round. Only from runs with the same inputs, and what is there is left.
    """
    rundir, asked = RunDir(Path(config.output)), config.model_dump(mode="json")
    inputs = rundir.environment()["inputs"]
    for other in others:
        if not (other.path / "config.yaml").exists():
            continue
        found = other.config().model_dump(mode="json")
        theirs = other.environment().get("inputs", {})
        if any(found[k] != asked[k] for k in SHARED) or any(theirs[k] != inputs[k] for k in theirs.keys() & inputs):
            continue
        if rundir.before() is None and (before := other.before()):
            check_files(other.path, before.files)
            shutil.copyfile(other.before_answers, rundir.before_answers)
            write_record(rundir.path / "before.json", before)
        for teacher in asked["teachers"]:
            name = teacher["name"]
            record = other.branch_record(1, name) if teacher in found["teachers"] else None
            if record and rundir.branch_record(1, name) is None:
                check_files(other.branch(1, name), record.files)
                with staged(rundir.branch(1, name)) as folder:
                    shutil.copytree(other.branch(1, name), folder, dirs_exist_ok=True)


def read_arms(config: Config, seeds: Sequence[int], out: str | Path, names: Sequence[str] = PAPER) -> list[ArmRun]:
    """What every finished arm came to; those that are not finished are left out."""
    found: list[ArmRun] = []
    for seed in seeds:
        done: list[tuple[Arm, RunRecord]] = []
        for arm in placed(config, seed, out, names):
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
