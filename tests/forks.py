"""Processes that begin with everything imported: forked from one that has loaded it, once a session or worker."""

import multiprocessing
from collections.abc import Callable
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["preload"])


def exit_status(work: Callable[..., object], *arguments: Any) -> int:
    """Call a function in a process of its own: the exit status, or minus the signal that ended it."""
    process = FORKS.Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
