"""Two expressions compared by math-verify, in a process of its own with limits of time and memory.

sympy evaluates what it is given: 9^{9^{9^9}} takes all memory, and nothing inside a process can stop it. The process is
started at the first use, serves every thread, ends itself when a comparison takes too long, and ends with its parent.
"""

import atexit
import faulthandler
import json
import logging
import os
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from mot_lora.errors import UserError

SECONDS = 5.0
MEMORY = 2 << 30

_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None


@lru_cache(maxsize=4096)
def equal(gold: str, answer: str) -> bool:
    r"""Whether two expressions in LaTeX are equal in value; False where that takes more than a few seconds.

    Errors: UserError when math-verify cannot be loaded.

    >>> equal(r"(x+1)^2", "x^2 + 2x + 1"), equal("10^{10^{10}}", "7")
    (True, False)
    """
    global _process
    with _lock:
        said = ""
        if _process and _process.poll() is not None:
            _stop()
        try:
            _process = _process or _start()
            said = _ask(_process, [gold, answer])
        finally:
            if not said:  # it took too long, or Ctrl-C came: its answer would be taken for the next one's
                _stop()
    return said == "true"


def _start() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-X", "utf8", "-W", "ignore", "-m", "mot_lora.data.judge", str(SECONDS), str(MEMORY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)},
        start_new_session=True,  # a Ctrl-C of the terminal is the parent's
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
    )
    try:
        if (said := _hear(process)) != "ready":
            raise UserError(f"answers cannot be judged: math-verify does not load ({said or 'its process ended'})")
    except BaseException:
        _end(process)
        raise
    return process


def _hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def _ask(process: subprocess.Popen[str], pair: list[str]) -> str:
    """What the process says; nothing when it has ended."""
    assert process.stdin
    try:
        process.stdin.write(json.dumps(pair) + "\n")
        process.stdin.flush()
        return _hear(process)
    except OSError:  # a broken pipe, which Windows calls an invalid argument
        return ""


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with suppress(OSError):  # what was not yet written to it
        process.communicate()


def _stop() -> None:
    global _process
    process, _process = _process, None
    if process:
        _end(process)


def _forget() -> None:
    """A forked process must not use its parent's pipes."""
    global _process, _lock
    if _process and _process.stdin and _process.stdout:
        _process.stdin.close()
        _process.stdout.close()
        _process.returncode = 0  # it is not for this one to end
    _process, _lock = None, threading.Lock()


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def serve(seconds: float, memory: int) -> None:
    """Answer pairs of expressions, a line each, from standard input until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    _bound(memory)
    try:
        verify = _verifier()
    except Exception as e:
        print(" ".join(f"{type(e).__name__}: {e}".split())[:300], file=answers, flush=True)
        return
    print("ready", file=answers, flush=True)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        for line in sys.stdin:
            # ends the process from a thread that needs no lock of the interpreter's
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            try:
                right = verify(*json.loads(line))
            except (Exception, RecursionError, MemoryError):
                right = False
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(right), file=answers, flush=True)


def _bound(memory: int) -> None:
    with suppress(ImportError, ValueError, OSError):  # where there are no such limits
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (memory if most < 0 else min(memory, most), most))


def _verifier() -> Any:
    names = "math_verify.grader", "math_verify.parser", "latex2sympy2_extended.math_normalization", "sympy"
    grader, parser, latex, sympy = map(cast("Any", import_module), names)
    logging.disable()
    solve_alike = grader.sympy_solve_and_compare

    def solved_alike(gold: Any, answer: Any, *how: Any) -> bool:
        """Of two equations that sympy finds no solutions for, nothing is known."""
        return bool(sympy.solve(gold, gold.free_symbols)) and solve_alike(gold, answer, *how)

    grader.sympy_solve_and_compare = solved_alike
    grader.sympy_numeric_eq = _same_number  # its own rounds to six places and takes 1/2^{99} for 1/2^{98}
    style = latex.NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, boxed="none")

    def parsed(expression: str) -> Any:
        # all of it: parse() looks for an expression in a text, and may find a part of one
        return parser.parse_latex_cached(latex.normalize_latex(" ".join(expression.split()), config=style))

    def verify(gold: str, answer: str) -> bool:
        both = parsed(gold), parsed(answer)
        return bool(grader.verify(*both, timeout_seconds=None, allow_set_relation_comp=True))

    return verify


def _same_number(a: Any, b: Any, *_: Any) -> bool:
    """Whether two of sympy's numbers or matrices are equal: exactly, or to six digits where one is a decimal."""
    sympy = cast("Any", import_module("sympy"))
    a, b = a.doit(), b.doit()
    if getattr(a, "shape", None) or getattr(b, "shape", None):
        same_shape = getattr(a, "shape", None) == getattr(b, "shape", None)
        return same_shape and all(_same_number(x, y) or sympy.simplify(x - y) == 0 for x, y in zip(a, b, strict=True))
    endless = sympy.nan, sympy.zoo, sympy.oo, -sympy.oo
    if not (a.is_number and b.is_number):
        return False
    if (a.is_Rational and b.is_Rational) or a.has(*endless) or b.has(*endless):
        return bool(a == b)
    decimal = a.has(sympy.Float) or b.has(sympy.Float)
    a, b = a.evalf(60), b.evalf(60)
    far = abs(a - b)
    return bool(far <= max(abs(a), abs(b)) * sympy.Rational(1, 10 ** (6 if decimal else 50))) and (
        not decimal or bool(far < sympy.Rational(1, 10**6))
    )


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
