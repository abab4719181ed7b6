"""What is known of a run from outside: where it stands, and what was exported."""

from typing import Literal

from mot_lora.checkpoints.records import KeptRecord
from mot_lora.records import Record


class ExportRecord(KeptRecord):
    """An exported round: a full `checkpoint` in this dtype, or one `lora` adapter of this rank.

    `worst` is a layer of a checkpoint, a module of an adapter.
    """

    round: int
    form: Literal["checkpoint", "lora"]
    dtype: str
    rank: int | None = None


class StateRecord(Record):
    """The state of a run: rounds done and planned; in the current round its finished branches and, by unfinished
    branch, the step it can resume from; the process running it, and the round that `eval.final` still has to measure.
    """

    rounds_done: int
    rounds: int
    branches: tuple[str, ...]
    begun: dict[str, int]
    at_work: str | None
    stopped: str
    final: int | None = None

    @property
    def line(self) -> str:
        """The state in one line."""
        status = f"running ({self.at_work})" if self.at_work else "not running"
        if self.stopped and self.final is not None:
            return f"{status}: {self.stopped}, eval.final is left to do"
        if self.stopped:
            return f"finished: {self.stopped}"
        parts = [f"round {self.rounds_done} of {self.rounds} is done" if self.rounds_done else "no round is done yet"]
        if self.branches:
            parts.append(f"of round {self.rounds_done + 1} {', '.join(self.branches)}")
        parts += [f"{name} can resume from step {step}" for name, step in self.begun.items()]
        return f"{status}: {', '.join(parts)}"
