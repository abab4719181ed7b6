"""UserError, the exception for mistakes that the user can correct, and the contexts that raise it."""

import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class UserError(ValueError):
    """A mistake in a file, a setting or a call; its one-line message says what to do.

    The commands print it as `error: ...` and end with exit status 2.

    >>> raise UserError("recipe.yaml: `rouds` is not a setting; did you mean `rounds`?")
    Traceback (most recent call last):
    mot_lora.errors.UserError: recipe.yaml: `rouds` is not a setting; did you mean `rounds`?
    """

    def __init__(self, message: str) -> None:
        line = message.replace("\r", " ").replace("\n", " ")  # a file's content may be quoted in it
        super().__init__(line.encode("utf-8", "backslashreplace").decode())  # a lone surrogate cannot be printed


class Remark(UserWarning):
    """A note on an input that was read differently than it may seem; the commands print it as `note: ...`."""


def remark(*lines: str) -> None:
    """Warn of each line, as a Remark."""
    for line in lines:
        warnings.warn(Remark(line), stacklevel=3)


class RowError(UserError):
    """A row that cannot be used: where it is, what is wrong, and the reason under which such rows are counted.

    >>> error = RowError("a.jsonl:3", "nothing in `response`", "without an answer")
    >>> str(error), error.reason
    ('a.jsonl:3: nothing in `response`', 'without an answer')
    """

    def __init__(self, where: str, message: str, reason: str) -> None:
        super().__init__(f"{where}: {message}")
        self.reason = reason


class DivergedError(UserError):
    """Training that diverged: a loss or weights that are not finite, or a loss worse than guessing."""


@contextmanager
def writing(path: str | Path) -> Generator[None]:
    """Turn errors of the disk or its permissions into a UserError that names the path.

    For a full disk torch and safetensors raise exceptions of their own.

    >>> with writing("/x"):
    ...     raise PermissionError(13, "Permission denied")
    Traceback (most recent call last):
    mot_lora.errors.UserError: /x: cannot be written (Permission denied): is there space, and a permission?
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError) as e:
        # what torch.save says of a full disk: "failed writing", "iostream error", "inline_container.cc: unexpected pos"
        if isinstance(e, RuntimeError) and not any(s in str(e) for s in ("writ", "iostream", "inline_container")):
            raise
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())[:200]
        raise UserError(f"{path}: cannot be written ({reason}): is there space, and a permission?") from e


# torch, its CPU allocator, CUDA and the system; cuBLAS, cuDNN and their like
NO_MEMORY = re.compile(r"out of memory|(can't|cannot) allocate memory|STATUS_\w*ALLOC\w*_FAILED", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that memory ran out, on a GPU or in the machine.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    """
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(f"{type(error).__name__} {error}"))


@contextmanager
def enough_memory(doing: str, do: str) -> Generator[None]:
    """Turn errors of memory that ran out into a UserError that says during what, and what to do.

    >>> with enough_memory("", "lower eval.batch_size"):
    ...     raise MemoryError("no space for an array")
    Traceback (most recent call last):
    mot_lora.errors.UserError: out of memory (no space for an array); lower eval.batch_size
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as e:
        if not is_out_of_memory(e):
            raise
        reason = " ".join(str(e).split())[:160]
        raise UserError(f"out of memory{' ' * bool(doing)}{doing} ({reason or type(e).__name__}); {do}") from e
