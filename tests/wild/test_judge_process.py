"""math-verify in a process of its own: it ends what takes too long, in every thread, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mot_lora.data import judge
from mot_lora.data.judge import equal
from mot_lora.data.scoring import elected, is_right
from mot_lora.errors import UserError

HUGE = (  # pytorch/torchtitan#4442, huggingface/Math-Verify#63, huggingface/open-r1#420
    r"9^{9^{9^{9}}}",
    r"123456789!",
    r"\sum_{k=1}^{100000} k^{k}",
    r"2^{2^{2^{2^{2^{2}}}}}",
)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process of its own with a limit of one second."""
    judge._stop()
    equal.cache_clear()
    monkeypatch.setattr(judge, "SECONDS", 1.0)
    yield
    judge._stop()
    equal.cache_clear()


def in_thread(work: object) -> None:
    thread = threading.Thread(target=work)  # pyright: ignore[reportArgumentType]
    thread.start()
    thread.join()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("threaded", [False, True])
def test_what_takes_too_long_is_wrong_within_seconds_in_any_thread(threaded: bool) -> None:
    text = HUGE[threaded]
    verdicts: list[bool] = []

    def work() -> None:
        verdicts.append(equal("x+1", "1+x"))  # the process is there
        begun = time.monotonic()
        verdicts.append(is_right(rf"\boxed{{{text}}}", "5"))
        assert time.monotonic() - begun < 15  # a machine may be busy
        verdicts.append(equal("x+2", "2+x"))

    in_thread(work) if threaded else work()
    assert verdicts == [True, False, True]


@pytest.mark.parametrize("text", HUGE)
def test_the_same_huge_expression_is_right_and_costs_nothing(text: str) -> None:
    assert is_right(rf"\boxed{{{text}}}", text)
    assert is_right(rf"${text}$ ends in 9. So the answer is 9", "9")
    assert not is_right(rf"${text}$ ends in 9. So the answer is 9", "8")


def test_threads_share_a_process() -> None:
    pairs = [(f"x+{i}", f"{i}+x" if i % 2 else f"{i}-x") for i in range(40)]
    verdicts: dict[tuple[str, str], bool] = {}

    def work(some: list[tuple[str, str]]) -> None:
        verdicts.update({p: equal(*p) for p in some})

    threads = [threading.Thread(target=work, args=(pairs[k::4],)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert verdicts == {p: i % 2 == 1 for i, p in enumerate(pairs)}


def test_a_process_that_has_died_is_started_again() -> None:
    assert equal("x+50", "50+x")
    process = judge._process
    assert process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert equal("x+51", "51+x")


@pytest.mark.usefixtures("hurried")
def test_an_interrupted_comparison_leaves_no_answer_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not equal("x+1", "x+2")
    process = judge._process
    assert process
    hear = judge._hear

    def interrupted(_: subprocess.Popen[str]) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(judge, "_hear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        equal("y", "y")
    monkeypatch.setattr(judge, "_hear", hear)
    assert gone(process.pid)
    assert not equal("z", "z+1")


def test_a_judge_that_does_not_load_is_said_and_nothing_is_judged_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ImportError: no antlr4'\n")
    python.chmod(0o755)
    judge._stop()
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match=r"math-verify does not load.*no antlr4"):
        is_right("sqrt(19)", r"\sqrt{20}")
    assert is_right("19", "19.0")  # which needs none


PARENT = """
import os, signal, subprocess, sys, threading, time
from mot_lora.data import judge
from mot_lora.data.judge import equal
assert equal("x+1", "1+x")
mine = judge._process.pid
child = os.fork()
if not child:
    ok = equal("x+2", "2+x") and not equal("x+2", "3+x") and judge._process.pid != mine
    judge._stop()
    os._exit(0 if ok else 1)
assert equal("x+3", "3+x") and not equal("x+3", "4+x") and judge._process.pid == mine
assert os.waitpid(child, 0)[1] == 0
print(mine, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "interrupted":
    threading.Timer(0.5, os.killpg, (os.getpgid(0), signal.SIGINT)).start()
    try:
        equal("9^{9^{9^{9}}}", "5")
    except KeyboardInterrupt:
        assert judge._process is None
        print("interrupted")
"""


@pytest.mark.usefixtures("signals_as_usual")
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_the_process_ends_with_its_parent_and_forks_have_their_own(how: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PARENT, how],
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
        check=False,
    )
    assert run.returncode == (-signal.SIGKILL if how == "killed" else 0), run.stderr
    assert run.stderr == ""
    pid, *said = run.stdout.split()
    assert said == (["interrupted"] if how == "interrupted" else [])
    assert gone(int(pid))


def test_a_vote_is_counted_by_the_same_judgement() -> None:
    texts = [r"\boxed{\sqrt{12}}", "1,000", r"so \boxed{2\sqrt{3}}", "The answer is 1000.", "10^3", "B"]
    assert elected(texts) == "1,000"
    assert elected([r"\boxed{3}. No: \boxed{5}", "3", "5"]) == r"\boxed{3}. No: \boxed{5}"
    assert elected(["The answer is (B).", "A", "B) 12 cm"]) == "The answer is (B)."
