"""What a run folder adds up to: the ledger of merged updates, and the record of the whole run."""

import torch

from mot_lora.adapters.load import load_adapter
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import Config
from mot_lora.errors import UserError
from mot_lora.merging.averages import nesterov
from mot_lora.merging.merged import Merged, combine
from mot_lora.records import BranchRecord, RoundRecord, RunRecord, StateRecord, score
from mot_lora.runs.inputs import gone
from mot_lora.runs.rundir import RunDir
from mot_lora.training.savepoint import newest, step_of

FINAL = ("samples", "temperature", "top_p", "max_new_tokens", "limit")  # of eval.final, what its record says


def settings(rundir: RunDir, student: str | None = None) -> Config:
    """What a run was asked, with everything where it is now; its student at a place that is given.

    Errors: UserError when the folder is no run.
    """
    config = rundir.config()
    return rundir.here(config if student is None else config.model_copy(update={"student": student}))


def open_student(rundir: RunDir, config: Config) -> Checkpoint:
    """The student of a run, as it was before the first round.

    Errors: UserError where it is not, or is another one than the run was begun with.
    """
    if "student" in gone(config):
        raise UserError(f"{config.student}: the student of {rundir.path} is not there; name its place with --student")
    checkpoint = Checkpoint.open(config.student)
    said = {"student": None, **rundir.environment().get("inputs", {})}
    if any(said.get(what, found) != found for what, found in checkpoint.fingerprints().items()):
        raise UserError(
            f"{config.student}: is not the model that {rundir.path} was begun with; bring that one back, or name its "
            "place with --student"
        )
    return checkpoint


def read_merges(rundir: RunDir, rounds: int, device: str | torch.device = "cpu") -> list[Merged]:
    """The merged updates of a run's first rounds as each round found them, without momentum.

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
    """What is added to W_0 after a run's first rounds: their merged updates, with the weights that momentum gives them.

    Errors: UserError for a round that is not finished.
    """
    merges = read_merges(rundir, rounds, device)
    last = rundir.round_record(rounds)
    return [m.scaled(w) for m, w in zip(merges, nesterov(rounds, last.momentum if last else 0.0), strict=True)]


def read_run(rundir: RunDir) -> RunRecord | None:
    """What a run folder holds so far; None when nothing is finished. `stopped` is empty while rounds are left to do.

    Errors: UserError when the folder is no run, or a record in it is damaged.
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
    """The round that a run whose rounds are done still has to ask as `eval.final` says; 0 is the student before."""
    if config.eval.final is None or not record.stopped:
        return None
    number = record.best if config.eval.final.round == "best" else len(record.rounds)
    asked = (number, *(getattr(config.eval.at_last, key) for key in FINAL))
    done = record.final
    return None if done and asked == (done.round, *(getattr(done, key) for key in FINAL)) else number


def read_state(rundir: RunDir) -> StateRecord:
    """Where a run stands. Errors: UserError when the folder is no run, or a record in it is damaged."""
    config, record = rundir.config(), read_run(rundir)
    done = len(record.rounds) if record else 0
    here = [t.name for t in config.teachers if rundir.branch_record(done + 1, t.name)] if done < config.rounds else []
    saved = {t.name: newest(rundir.job(done + 1, t.name).state) for t in config.teachers}
    return StateRecord(
        rounds_done=done,
        rounds=config.rounds,
        branches=tuple(here),
        begun={name: step_of(found[0]) for name, found in saved.items() if found},
        at_work=rundir.at_work(),
        stopped=record.stopped if record else "",
        final=final_due(config, record) if record else None,
    )
