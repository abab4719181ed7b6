"""A map that works ahead: same results, bounded, and no thread is left."""

import itertools
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mot_lora.checkpoints.prefetch import prefetch

LIMIT = 20  # seconds after which something hangs


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not threads()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(), max_size=12), st.integers(0, 14))
def test_it_is_a_map(items: list[int], n: int) -> None:
    assert list(prefetch(str, items, n)) == list(map(str, items))
    assert not threads()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 12), st.integers(0, 6), st.data())
def test_no_more_than_n_wait(size: int, n: int, data: st.DataObject) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item

    results = prefetch(work, range(size), n)
    for taken in range(1, data.draw(st.integers(1, size), "taken") + 1):
        assert next(results) == taken - 1
        if data.draw(st.booleans(), "wait"):
            time.sleep(0.001)
        assert len(begun) <= min(size, taken + n)
    results.close()
    assert begun == list(range(len(begun)))  # in order, each once
    assert not threads()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_n_results_are_made_while_nobody_asks(n: int) -> None:
    made = threading.Semaphore(0)

    def work(item: int) -> int:
        made.release()
        return item

    results = prefetch(work, itertools.count(), n)
    assert next(results) == 0
    for _ in range(1 + n):  # the one that was asked for, and those ahead
        assert made.acquire(timeout=LIMIT)
    assert not made.acquire(timeout=0.05)
    results.close()


def test_without_anything_ahead_it_is_as_lazy_as_a_map() -> None:
    begun: list[int] = []
    results = prefetch(begun.append, range(5), 0)
    for asked in range(5):
        assert len(begun) == asked
        next(results)
    assert list(results) == []


def test_nothing_begins_before_the_first_is_asked_for() -> None:
    begun: list[int] = []
    results = prefetch(begun.append, iter([1, 2]), 2)
    assert not threads()
    del results
    assert begun == []


class OddError(Exception):
    pass


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 8), st.integers(1, 8), st.integers(0, 10))
def test_an_error_comes_in_its_place_and_as_it_is(at: int, more: int, n: int) -> None:
    error = OddError("this one")

    def work(item: int) -> int:
        if item == at:
            raise error
        return item

    results = prefetch(work, range(at + more), n)
    assert list(itertools.islice(results, at)) == list(range(at))
    with pytest.raises(OddError) as e:
        next(results)
    assert e.value is error
    assert not threads()
    with pytest.raises(StopIteration):
        next(results)


def test_dropping_it_waits_for_the_one_at_work_and_does_no_more() -> None:
    at_work, go, begun = threading.Event(), threading.Event(), list[int]()

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            at_work.set()
            assert go.wait(LIMIT)
        return item

    results = prefetch(work, range(9), 4)
    next(results)
    assert at_work.wait(LIMIT)
    threading.Timer(0.05, go.set).start()
    del results
    assert go.is_set()
    assert not threads()
    assert begun == [0, 1]


def test_an_error_of_the_caller_ends_it() -> None:
    def caller() -> None:
        for x in prefetch(str, range(9), 2):
            raise OddError(x)

    with pytest.raises(OddError, match="0"):
        caller()


def test_what_was_given_out_is_not_kept() -> None:
    class Result:
        pass

    results = prefetch(lambda _: Result(), range(9), 2)
    for _ in range(5):
        given = next(results)
        alive = weakref.ref(given)
        del given
        until = time.monotonic() + LIMIT
        while alive() is not None and time.monotonic() < until:
            time.sleep(0.001)  # the thread may be on its way out of it
        assert alive() is None
    results.close()


@pytest.mark.parametrize(
    "ending", ["raise KeyboardInterrupt", "raise SystemExit(3)", "1 / 0", "pass", "keep = results"]
)
def test_a_program_that_stops_half_way_ends(ending: str) -> None:
    program = f"""
from mot_lora.checkpoints.prefetch import prefetch
results = prefetch(str, range(99), 2)
def main():
    global keep
    for x in results:
        {ending}
        break
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    want = {"raise KeyboardInterrupt": -2, "raise SystemExit(3)": 3, "1 / 0": 1}.get(ending, 0)
    assert done.returncode == want, done.stderr
    assert done.stderr.count("Traceback") == (1 if want in (-2, 1) else 0)


@pytest.mark.usefixtures("signals_as_usual")
def test_ctrl_c_while_it_waits_for_a_result() -> None:
    program = """
import signal, threading, time
from mot_lora.checkpoints.prefetch import prefetch
waiting = threading.Event()
def work(x):
    if x == 1:
        waiting.wait(20)
        time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)  # the main thread gets it
        time.sleep(0.3)
    return x
try:
    for x in prefetch(work, range(99), 1):
        print(x, flush=True)
        waiting.set()
except KeyboardInterrupt:
    print("interrupted", threading.active_count())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["0", "interrupted", "1"], done.stderr
    assert done.stderr == ""
