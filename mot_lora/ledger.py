"""What a run folder adds up to: the ledger of merged updates, and the record of the whole run."""

import torch

from mot_lora.adapters import load_adapter
from mot_lora.errors import UserError
from mot_lora.merged import Merged, combine
from mot_lora.records import BranchRecord, RoundRecord, RunRecord, score
from mot_lora.rundir import RunDir


def read_ledger(rundir: RunDir, rounds: int, device: str | torch.device = "cpu") -> list[Merged]:
    """The merged updates of a run's first rounds, from what is on disk.

    Errors: UserError for a round that is not finished.
    """
    ledger: list[Merged] = []
    for number in range(1, rounds + 1):
        record = rundir.round_record(number)
        if record is None:
            raise UserError(f"{rundir.path}: round {number} is not finished")
        adapters = [load_adapter(rundir.branch(number, t), t, device) for t in record.teachers]
        ledger.append(
            combine(adapters, record.method, record.weights, record.density, record.scale, record.seed, record.space)
        )
    return ledger


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
        stopped = f"{config.metric} has not improved for {patience} rounds"
    else:
        stopped = "all rounds are done" if len(rounds) == config.rounds else ""
    return RunRecord(
        before=before,
        branches=tuple(branches),
        rounds=tuple(rounds),
        metric=config.metric,
        best=best,
        stopped=stopped,
    )
