"""The ends of commands: one line on standard error and an exit status."""

import shlex
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from mot_lora.interruption import INTERRUPTS

INTERRUPTED = 130


class Reported(SystemExit):
    """An exit whose reason has been printed."""


def end(status: int, line: str) -> NoReturn:
    """Print the reason, and exit."""
    print(line, file=sys.stderr)
    raise Reported(status) from None


def status_of(interrupt: BaseException) -> int:
    """The exit status for the exception that a signal raises."""
    return int(interrupt.code or 0) if isinstance(interrupt, SystemExit) else INTERRUPTED


@contextmanager
def resumable(command: Sequence[str]) -> Generator[None]:
    """Work that a signal may stop and that the same command resumes."""
    try:
        yield
    except INTERRUPTS as e:
        end(status_of(e), f"stopped; no finished work is lost; resume with: {shlex.join(command)}")
