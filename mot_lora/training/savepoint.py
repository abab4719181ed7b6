"""The states of a branch at work, from which an interrupted one goes on: Trainer checkpoints under a seal."""

import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from mot_lora.durable import check_files, read_record, sha256, sync, write_record
from mot_lora.records import SealRecord

SEAL = "sealed.json"  # what makes a checkpoint whole
SCHEDULE = 2  # of the learning rate, as `rate_share` has it; the first one began with a step at rate 0


def seal(checkpoint: Path, learning_rate: float, tokens: int, seconds: float) -> None:
    """Declare a checkpoint whole, by a record of its files that is written last; older ones then go."""
    files = {str(f.relative_to(checkpoint)): f for f in sorted(checkpoint.rglob("*")) if f.is_file() and f.name != SEAL}
    for file in (*files.values(), checkpoint):  # a seal must not outlive in a power cut what it vouches for
        sync(file)
    checksums = {name: sha256(f) for name, f in files.items()}
    record = SealRecord(files=checksums, learning_rate=learning_rate, schedule=SCHEDULE, tokens=tokens, seconds=seconds)
    write_record(checkpoint / SEAL, record)
    discard(p for p in checkpoint.parent.glob("checkpoint-*") if p != checkpoint)


def discard(checkpoints: Iterable[Path]) -> None:
    """Delete checkpoints, the seals first: what a kill leaves of one is then not taken for damaged."""
    for checkpoint in list(checkpoints):
        (checkpoint / SEAL).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)


def newest(folder: Path) -> tuple[Path, SealRecord] | None:
    """The last whole checkpoint in a folder; what a kill left half-written has no seal and does not count.

    Errors: DamagedError when it is not as it was sealed.
    """
    found = [p for p in folder.glob("checkpoint-*") if is_sealed(p)]
    if not found:
        return None
    last = max(found, key=step_of)
    record = read_record(last / SEAL, SealRecord)
    assert record is not None
    check_files(last, record.files)
    return last, record


def is_sealed(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole."""
    return (checkpoint / SEAL).exists()


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was taken."""
    return int(checkpoint.name.rpartition("-")[2])


def remember_randomness() -> Callable[[], None]:
    """The state of every global random generator; call the result to go back to it."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore
