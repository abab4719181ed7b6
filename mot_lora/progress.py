"""The seam through which long work reports its progress."""

from typing import Any, Protocol


class Progress(Protocol):
    """Called with a stage's name, how much of it is done, out of how much, and a short note.

    A training stage also gives the step's mean loss, in nats per token, and the tokens trained on so far in the stage.
    """

    def __call__(
        self,
        stage: str,
        done: int,
        total: int,
        note: str = "",
        *,
        loss: float | None = None,
        tokens: int | None = None,
    ) -> None: ...


def silent(*_counts: Any, **_numbers: Any) -> None:
    """A progress that reports nothing."""
