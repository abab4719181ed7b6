"""The seam through which long work says how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Called with a stage's name, how much of it is done, out of how much, and a short note (a loss, say)."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """The progress of work that nobody watches."""
