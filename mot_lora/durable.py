"""Files that are whole or not there, and known to be as they were written.

The standard library renames files one by one; atomicwrites, which is not maintained, has no folders and no checksums.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mot_lora.errors import UserError, writing
from mot_lora.records import Record

R = TypeVar("R", bound=Record)


class DamagedError(UserError):
    """A file of a run that is not as it was written."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"{path}: damaged ({why}); `mot-lora run CONFIG --repair` sets it aside, with what was built on it, and "
            "does that again"
        )
        self.path = path


def beside(path: Path) -> Path:
    """A folder that is not there yet: the path itself, or with -2, -3, ... after it."""
    return next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}-{n}") if n > 1 else path).exists())


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a folder that a later step reads, by name."""
    return {f.name: sha256(f) for f in sorted(folder.iterdir()) if f.suffix in (".json", ".jsonl", ".safetensors")}


def check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Errors: DamagedError for the first file that is not there or not what its checksum says."""
    for name, checksum in files.items():
        try:
            if sha256(folder / name) != checksum:
                raise DamagedError(folder / name, "its checksum differs from when it was written")
        except OSError as e:
            raise DamagedError(folder / name, e.strerror or str(e)) from e


def check_new(out: Path) -> None:
    """Errors: UserError for a folder to write that is there already, unless it is empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists; choose another --out, nothing is overwritten")


@contextmanager
def staged(path: Path) -> Generator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and goes away when it does not."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            if path.exists():  # without its record it was not finished
                shutil.rmtree(path)
            move(partial, path)
            sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, whole."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system
            sync(partial)
            move(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON with a checksum of itself, whole or not at all."""
    tree: dict[str, Any] = json.loads(record.model_dump_json())
    write_text(path, json.dumps({**tree, "sha256": _checksum(tree)}, indent=2) + "\n")


def write_lines(path: Path, records: Sequence[Record]) -> str:
    """Write records as JSONL, whole or not at all; returns the file's sha256."""
    write_text(path, "".join(r.model_dump_json() + "\n" for r in records))
    return sha256(path)


def read_lines(path: Path, kind: type[R]) -> list[R]:
    """Records from JSONL; none where there is no file. Errors: DamagedError."""
    if not path.exists():
        return []
    try:
        return [kind.model_validate_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as e:
        raise DamagedError(path, str(e).splitlines()[0]) from e


def read_record(path: Path, kind: type[R]) -> R | None:
    """A record from JSON; None where there is no file. Errors: DamagedError."""
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("sha256", None) != _checksum(tree):
            raise DamagedError(path, "its checksum differs from when it was written")
        return kind.model_validate_json(json.dumps(tree))
    except DamagedError:
        raise
    except (ValueError, AttributeError, TypeError, RecursionError) as e:
        raise DamagedError(path, str(e).splitlines()[0]) from e


def _checksum(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move(path: Path, to: Path) -> None:
    """Give a file or folder another name; a file takes the place of one that is there.

    Windows refuses it while another program, such as a virus scanner, reads what was just written: it is asked again.
    """
    for pause in (0.05, 0.1, 0.2, 0.4, 0.8):
        try:
            path.replace(to)
            return
        except PermissionError:
            time.sleep(pause)
    path.replace(to)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk; a folder only where it can be opened, which Windows does not allow."""
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR  # Windows flushes only what is open for writing
    try:
        fd = os.open(path, flags)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
