"""One branch at work: whose it is, and where it keeps what must not be lost."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A branch of a run: the run's folder, the round, the teacher, the folder of its states and that of its logs.

    `state` keeps what an interruption must not lose; the loop clears it when the branch is saved.
    """

    run: Path
    round: int
    teacher: str
    state: Path
    logs: Path
