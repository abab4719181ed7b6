"""Work that a thread does before its result is asked for.

From Python 3.14 on, `Executor.map(..., buffersize=n)` would do.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], n: int) -> Generator[Result]:
    """`map(function, items)`, computed by one thread up to n results before they are asked for.

    Results come in the order of the items, and what the function raises comes in its place. No more than n results wait
    beside the one that was given out. The thread begins with the first `next`; it has ended when the generator is
    exhausted, closed or dropped, which waits for the one result that it is at.

    >>> list(prefetch(str.upper, ["a", "b", "c"], 2))
    ['A', 'B', 'C']
    """
    waiting: deque[Future[Result]] = deque()
    worker = ThreadPoolExecutor(1, "prefetch")
    try:
        for item in items:
            waiting.append(worker.submit(function, item))
            if len(waiting) > n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        worker.shutdown(cancel_futures=True)
