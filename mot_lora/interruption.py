"""Ctrl-C and SIGTERM as exceptions, deferred during steps that must not be interrupted."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTS = (KeyboardInterrupt, SystemExit)
"""What a signal is raised as: Ctrl-C as the first, those of `ENDING` as SystemExit(128 + signal)."""

# SIGHUP is not known to Windows, where SIGBREAK comes of Ctrl-Break and of a window that is closed
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
"""The signals that ask a process to end."""


@contextmanager
def signals_raise() -> Generator[None]:
    """Signals that ask for an end end the block as Ctrl-C does, by an exception, so that what can be saved is."""

    def end(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
        raise SystemExit(128 + number)

    before = {s: signal.getsignal(s) for s in ENDING}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:  # nohup ignores SIGHUP, which must stay ignored
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Shield:
    """Within its `with` block, defers signals between `hold` and `release`; a deferred one is raised at `release`.

    It wraps the existing handlers, and does nothing outside the main thread.

    >>> with Shield() as shield:
    ...     shield.hold()  # a step runs here
    ...     shield.release()
    """

    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._held = False
        self._pending: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> "Shield":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *ENDING):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._before[number] = handler
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.release()

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        self._held = False
        if self._pending:
            (number, frame), self._pending = self._pending, None
            self._before[number](number, frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._pending = number, frame
        else:
            self._before[number](number, frame)
