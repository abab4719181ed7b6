"""The one exception for mistakes that the user can mend, and what becomes it."""

import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class UserError(ValueError):
    """A mistake in a file, a setting or a call, whose one-line message says what to do.

    The commands print it as `error: ...` and end with exit status 2.

    >>> raise UserError("recipe.yaml: `rouds` is not a setting; did you mean `rounds`?")
    Traceback (most recent call last):
    mot_lora.errors.UserError: recipe.yaml: `rouds` is not a setting; did you mean `rounds`?
    """

    def __init__(self, message: str) -> None:
        line = message.replace("\r", " ").replace("\n", " ")  # whatever a file has put into it
        super().__init__(line.encode("utf-8", "backslashreplace").decode())  # a lone surrogate cannot be printed


class Remark(UserWarning):
    """What was taken otherwise than it may look; the commands print it as `note: ...`."""


def remark(*lines: str) -> None:
    """Warn of each line, as a Remark."""
    for line in lines:
        warnings.warn(Remark(line), stacklevel=3)


class RowError(UserError):
    """A row that cannot be used: where it stands and what is wrong, and the reason by which such rows are counted.

    >>> error = RowError("a.jsonl:3", "nothing in `response`", "without an answer")
    >>> str(error), error.reason
    ('a.jsonl:3: nothing in `response`', 'without an answer')
    """

    def __init__(self, where: str, message: str, reason: str) -> None:
        super().__init__(f"{where}: {message}")
        self.reason = reason


class DivergedError(UserError):
    """Training that went astray: a loss or weights that are not finite, or a loss worse than guessing."""


@contextmanager
def writing(path: str | Path) -> Generator[None]:
    """What a disk or its permissions refuse, as a UserError that names the path.

    torch and safetensors have errors of their own for a disk that is full.

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
    """Whether an error says that there was no memory, on a GPU or in the machine.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    """
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(f"{type(error).__name__} {error}"))


@contextmanager
def enough_memory(doing: str, do: str) -> Generator[None]:
    """Memory that runs out, as a UserError that says at what and what to do.

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
