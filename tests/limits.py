"""Limits of this process that a test sets and takes back."""

import resource
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def small_files(size: int) -> Generator[None]:
    """No file grows beyond so many bytes, as on a disk that is full."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
