"""Processes that begin with everything imported: forked from one that has loaded it, once a session or worker."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import pytest

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["preload"])


def process(work: Callable[..., object], *arguments: Any) -> Any:
    """A process that is to call a function, not yet started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python tells the server nothing of its own path
        forkserver.ensure_running()
    return FORKS.Process(target=work, args=arguments)


def exit_status(work: Callable[..., object], *arguments: Any) -> int:
    """Call a function in a process of its own: the exit status, or minus the signal that ended it."""
    begun = process(work, *arguments)
    begun.start()
    begun.join()
    return begun.exitcode
