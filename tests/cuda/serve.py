"""Runs tests on a false GPU, each in a fork of this process, in which what they all import is loaded once.

Is told lines of JSON on its standard input, {"card", "arguments", "log", "seconds"}, and answers each with one:
pytest's exit status, or null where the time was over. Started by false_gpu.py, under run.py.
"""

import contextlib
import gc
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import falsecuda
import pytest

HERE = str(Path(__file__).parent)


def run(card: dict[str, Any], arguments: list[str], log: str, seconds: float) -> int | None:
    """Run pytest on that card in a fork."""
    child = os.fork()
    if not child:
        os.setsid()
        said = os.open(log, os.O_WRONLY | os.O_CREAT)
        for stream, to in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said), (2, said)):
            os.dup2(to, stream)
        status = 3  # pytest's own fault
        try:
            falsecuda.become(falsecuda.Card(**card))
            status = int(pytest.main(arguments))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.redirect_stdout(io.StringIO()):
        # imports what tests do; nothing is judged yet
        pytest.main(
            ["--collect-only", "-q", "-W", "ignore", "-p", "no:unraisableexception", "-p", "no:cacheprovider", HERE]
        )
    gc.collect()
    gc.freeze()  # what is loaded is not looked through again and again
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
