"""The results of a comparison's arms, read from their runs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mot_lora.analysis.arms import BOTH, PAPER, Arm, placed
from mot_lora.analysis.comparison import ArmRun, Budget
from mot_lora.config import Config
from mot_lora.data.scoring import elected, is_right, mean_score
from mot_lora.durable import read_lines, read_record
from mot_lora.records import Answer, EvaluationRecord, RunRecord
from mot_lora.runs.ledger import read_run
from mot_lora.runs.rundir import RunDir


def read_arms(
    config: Config,
    seeds: Sequence[int],
    out: str | Path,
    names: Sequence[str] = PAPER,
    budgets: Sequence[Budget] = BOTH,
) -> list[ArmRun]:
    """The results of every finished arm; unfinished ones are left out."""
    results: list[ArmRun] = []
    for seed in seeds:
        done: list[tuple[Arm, RunRecord]] = []
        for arm in placed(config, seed, out, names, budgets):
            rundir = RunDir(Path(arm.config.output))
            record = read_run(rundir) if (rundir.path / "config.yaml").exists() else None
            if record and record.stopped:
                done.append((arm, record))
        if done and "base" in names:
            results.append(_before(*done[0]))
        results += [_arm_run(arm, record) for arm, record in done]
        if "vote" in names:
            results += _votes(done, [f"std:{t.name}" for t in config.teachers])
    wanted = [(r, tuple(b for b in r.budgets if b in budgets)) for r in results]
    return [r.model_copy(update={"budgets": which}) for r, which in wanted if which]


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
    """The majority vote of the single-teacher students, in each budget in which all of them are finished."""
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
    """The score of the majority vote of several students on one question, over samples."""
    ballots = zip(*(a.texts for a in answers), strict=True)
    right = (answers[0].answer, *answers[0].also)
    return mean_score([float(is_right(elected(texts), right)) for texts in ballots])[0]
