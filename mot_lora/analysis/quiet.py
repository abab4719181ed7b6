"""Silencing lm-eval: its bars, logs, warnings and prints are hidden, and its answers are counted as progress."""

import io
import logging
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any, TextIO

from mot_lora.progress import Progress


class Watch:
    """A cache hook for lm-eval, which calls it after every answer: each call is reported as progress."""

    def __init__(self, lm: Any, who: str, progress: Progress) -> None:
        self._who, self._progress, self._stage, self._done, self._total = who, progress, "", 0, 0
        for method, stage in (
            ("generate_until", "answer"),
            ("loglikelihood", "likelihood"),
            ("loglikelihood_rolling", "likelihood of texts"),
        ):
            setattr(lm, method, partial(self._begin, getattr(lm, method), stage))
        lm.set_cache_hook(self)

    def _begin(self, method: Callable[..., Any], stage: str, requests: Sequence[Any], *more: Any, **named: Any) -> Any:
        self._stage, self._done, self._total = f"{self._who}, {stage}", 0, len(requests)
        self._progress(self._stage, 0, self._total)
        return method(requests, *more, **named)

    def add_partial(self, *_answer: Any) -> None:
        self._done += 1
        self._progress(self._stage, self._done, self._total)


class _Void(io.TextIOBase):
    """Discards what libraries print; rich, also from its own thread, writes to `rich_proxied_file` instead."""

    def __init__(self, real: TextIO) -> None:
        self.rich_proxied_file = getattr(real, "rich_proxied_file", real)

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def hushed(progress: Progress) -> Generator[Progress]:
    """Hide bars, logs, warnings and prints of lm-eval and its libraries; yield a progress that is still shown."""
    out, err, disabled = sys.stdout, sys.stderr, logging.root.manager.disable

    def shown(*counts: Any, **numbers: Any) -> None:
        with redirect_stdout(out), redirect_stderr(err):
            progress(*counts, **numbers)

    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(_Void(out)), redirect_stderr(_Void(err)):
            warnings.simplefilter("ignore")
            yield shown
    finally:
        logging.disable(disabled)
