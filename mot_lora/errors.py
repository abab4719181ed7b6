"""The one exception for mistakes that the user can mend, and what becomes it."""

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


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch found no memory, on a GPU or in the machine."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
