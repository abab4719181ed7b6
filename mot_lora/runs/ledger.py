"""The contents of a run folder put together: the ledger of merged updates, and the record of the whole run."""

import torch

from mot_lora.adapters.load import load_adapter
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import Config
from mot_lora.errors import UserError
from mot_lora.merging.averages import nesterov
from mot_lora.merging.merged import Merged, combine
from mot_lora.records import BranchRecord, RoundRecord, RunRecord, score
from mot_lora.runs.inputs import missing
from mot_lora.runs.records import StateRecord
from mot_lora.runs.rundir import RunDir
from mot_lora.training.savepoint import newest, step_of

FINAL = ("samples", "temperature", "top_p", "max_new_tokens", "limit")  # settings of eval.final kept in its record


def settings(rundir: RunDir, student: str | None = None) -> Config:
    """A run's settings with its inputs at their current paths; `student` overrides the student's.

    Errors: UserError if the folder is not a run.
    """
    config = rundir.config()
    return rundir.here(config if student is None else config.model_copy(update={"student": student}))


def open_student(rundir: RunDir, config: Config) -> Checkpoint:
    """The student of a run, as it was before the first round.

    Errors: UserError if it is missing or differs from the student that the run started with.
    """
    if "student" in missing(config):
        raise UserError(f"{config.student}: the student of {rundir.path} is not there; give its path with --student")
    checkpoint = Checkpoint.open(config.student)
    recorded = {"student": None, **rundir.environment().get("inputs", {})}
    if any(recorded.get(what, current) != current for what, current in checkpoint.fingerprints().items()):
        raise UserError(
            f"{config.student}: not the model that {rundir.path} started with; restore that model, or give its path "
            "with --student"
        )
    return checkpoint


def read_merges(rundir: RunDir, rounds: int, device: str | torch.device = "cpu") -> list[Merged]:
    """The merged updates of a run's first `rounds` rounds, before momentum.

    Errors: UserError for a round that is not finished.
    """
    merges: list[Merged] = []
    for number in range(1, rounds + 1):
        record = rundir.round_record(number)
        if record is None:
            raise UserError(f"{rundir.path}: round {number} is not finished")
        adapters = [load_adapter(rundir.branch(number, t), t, device) for t in record.teachers]
        merges.append(
            combine(adapters, record.method, record.weights, record.density, record.scale, record.seed, record.space)
        )
    return merges


def read_ledger(rundir: RunDir, rounds: int, device: str | torch.device = "cpu") -> list[Merged]:
    """The updates added to W_0 by a run's first `rounds` rounds: each round's merge times its weight under momentum.

    Errors: UserError for a round that is not finished.
    """
    merges = read_merges(rundir, rounds, device)
    last = rundir.round_record(rounds)
    return [m.scaled(w) for m, w in zip(merges, nesterov(rounds, last.momentum if last else 0.0), strict=True)]


def read_run(rundir: RunDir) -> RunRecord | None:
    """The record of a run so far; None if nothing is finished. `stopped` is empty while rounds remain.

    Errors: UserError if the folder is not a run, or a record in it is damaged.
    """
    config = rundir.config()
    before = rundir.before()
    if before is None:
        return None
    branches: list[BranchRecord] = []
    rounds: list[RoundRecord] = []
    for number in range(1, config.rounds + 1):
        branches += [r for t in config.teachers if (r := rundir.branch_record(number, t.name))]
        record = rundir.round_record(number)
        if record is None:
            break
        rounds.append(record)
    scores = [score(before, config.metric), *(score(r.evaluation, config.metric) for r in rounds)]
    best = scores.index(max(scores))
    patience = config.stop.patience
    if patience is not None and len(rounds) - best >= patience:
        stopped = f"{config.metric} has not improved for {patience} round{'s' * (patience > 1)}"
    else:
        stopped = "all rounds are done" if len(rounds) == config.rounds else ""
    return RunRecord(
        before=before,
        branches=tuple(branches),
        rounds=tuple(rounds),
        metric=config.metric,
        best=best,
        stopped=stopped,
        final=rundir.final(),
    )


def final_due(config: Config, record: RunRecord) -> int | None:
    """The round that `eval.final` still has to measure once all rounds are done; 0 is the original student."""
    if config.eval.final is None or not record.stopped:
        return None
    number = record.best if config.eval.final.round == "best" else len(record.rounds)
    requested = (number, *(getattr(config.eval.at_last, key) for key in FINAL))
    done = record.final
    return None if done and requested == (done.round, *(getattr(done, key) for key in FINAL)) else number


def read_state(rundir: RunDir) -> StateRecord:
    """A run's progress. Errors: UserError if the folder is not a run, or a record in it is damaged."""
    config, record = rundir.config(), read_run(rundir)
    done = len(record.rounds) if record else 0
    trained = [t.name for t in config.teachers if done < config.rounds and rundir.branch_record(done + 1, t.name)]
    saved = {t.name: newest(rundir.job(done + 1, t.name).state) for t in config.teachers}
    return StateRecord(
        rounds_done=done,
        rounds=config.rounds,
        branches=tuple(trained),
        begun={name: step_of(state[0]) for name, state in saved.items() if state},
        at_work=rundir.at_work(),
        stopped=record.stopped if record else "",
        final=final_due(config, record) if record else None,
    )
