"""How commands end: each with one line on standard error and an exit status."""

import shlex
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from mot_lora.interruption import INTERRUPTS

INTERRUPTED = 130


class Said(SystemExit):
    """An end whose reason the user has read."""


def end(status: int, line: str) -> NoReturn:
    """Say why, and end."""
    print(line, file=sys.stderr)
    raise Said(status) from None


def status_of(interrupt: BaseException) -> int:
    """The exit status of what a signal is raised as."""
    return int(interrupt.code or 0) if isinstance(interrupt, SystemExit) else INTERRUPTED


@contextmanager
def resumable(command: Sequence[str]) -> Generator[None]:
    """Work that a signal stops, and that the command goes on with."""
    try:
        yield
    except INTERRUPTS as e:
        end(status_of(e), f"stopped; nothing that was finished is lost, go on with: {shlex.join(command)}")
