"""The identity of a branch, and the paths of its saved states and logs."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A branch of a run: the run's folder, the round, the teacher, and the folders of its states and its logs.

    An interrupted branch resumes from `state`; the loop deletes it when the branch is saved.
    """

    run: Path
    round: int
    teacher: str
    state: Path
    logs: Path
