"""The saved states from which an interrupted branch resumes: Trainer checkpoints, sealed once complete."""

import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from mot_lora.durable import check_files, read_record, sha256, sync, write_record
from mot_lora.records import Record

SEAL = "sealed.json"  # a checkpoint is complete if it has this record
SCHEDULE = 2  # version of the learning rate's schedule, `rate_share`; version 1 started with a step at rate 0


class SealRecord(Record):
    """A complete saved state of a branch: the sha256 of its files, learning rate, version of the schedule, tokens and
    seconds so far.
    """

    files: dict[str, str]
    learning_rate: float
    schedule: int = 1
    tokens: int
    seconds: float


def seal(checkpoint: Path, learning_rate: float, tokens: int, seconds: float) -> None:
    """Mark a checkpoint as complete, by a record of its files' checksums that is written last; delete older ones."""
    found = [f for f in sorted(checkpoint.rglob("*")) if f.is_file() and f.name != SEAL]
    files = {f.relative_to(checkpoint).as_posix(): f for f in found}
    for file in (*files.values(), checkpoint):  # in a power cut the seal must not survive without them
        sync(file)
    checksums = {name: sha256(f) for name, f in files.items()}
    record = SealRecord(files=checksums, learning_rate=learning_rate, schedule=SCHEDULE, tokens=tokens, seconds=seconds)
    write_record(checkpoint / SEAL, record)
    discard(p for p in checkpoint.parent.glob("checkpoint-*") if p != checkpoint)


def discard(checkpoints: Iterable[Path]) -> None:
    """Delete checkpoints, the seals first, so that a half-deleted one does not count as damaged after a kill."""
    for checkpoint in list(checkpoints):
        (checkpoint / SEAL).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)


def newest(folder: Path) -> tuple[Path, SealRecord] | None:
    """The last complete checkpoint in a folder; one that a kill left half-written has no seal and is ignored.

    Errors: DamagedError if its files do not match the checksums in its seal.
    """
    complete = [p for p in folder.glob("checkpoint-*") if is_sealed(p)]
    if not complete:
        return None
    last = max(complete, key=step_of)
    record = read_record(last / SEAL, SealRecord)
    assert record is not None
    check_files(last, record.files)
    return last, record


def is_sealed(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete."""
    return (checkpoint / SEAL).exists()


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def remember_randomness() -> Callable[[], None]:
    """Save the state of every global random generator; calling the result restores it."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore
