"""The command line as Windows has it: `python as_on_windows.py '[["run", "my.yaml"], ["show", "runs/mine"]]'`.

Modules, functions and signals that only Unix has are taken away; no links, no folder that can be opened; nothing is
renamed onto what is there but a file, and nothing is renamed or deleted that the process has open or mapped.
"""

import fcntl
import json
import os
import shutil
import signal
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# libraries do on Windows as Windows has it: what is taken away is taken from this package alone
import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import psutil  # noqa: F401
import transformers.trainer  # noqa: F401

rename, replace, unlink, rmdir, real_open, fsync = os.rename, os.replace, os.unlink, os.rmdir, os.open, os.fsync
get_flags, READ_ONLY = fcntl.fcntl, fcntl.F_GETFL


def in_use() -> Iterator[str]:
    for fd in Path("/proc/self/fd").iterdir():
        if fd.exists():  # the one that lists them is gone by now
            yield str(fd.readlink())
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        yield line.partition("/")[1] + line.partition("/")[2]


def check_closed(path: Any) -> None:
    whole = os.path.realpath(path)
    for other in in_use():
        if other == whole or other.startswith(f"{whole}/"):
            raise PermissionError(13, "The process cannot access the file: it is being used", other)


def renaming(onto_files: bool) -> Callable[..., None]:
    def move(source: Any, target: Any, **kwargs: Any) -> None:
        check_closed(source)
        if Path(target).is_dir() or (Path(target).exists() and not onto_files):
            raise FileExistsError(17, "Cannot create a file when that file already exists", str(target))
        check_closed(target)
        replace(source, target, **kwargs)

    return move


def deleting(delete: Callable[..., None]) -> Callable[..., None]:
    def closed(path: Any, **kwargs: Any) -> None:
        check_closed(path)
        delete(path, **kwargs)

    return closed


def open_file(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
    if os.path.isdir(path):  # noqa: PTH112
        raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, flags, *args, **kwargs)


def flush(fd: int) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) and get_flags(fd, READ_ONLY) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    fsync(fd)


def no_links(*_: Any, **__: Any) -> None:
    raise OSError(1314, "A required privilege is not held by the client")


def become_windows() -> None:
    for module in ("fcntl", "resource", "termios", "pty"):
        sys.modules[module] = None  # type: ignore[assignment]
    for name in ("pread", "preadv", "posix_fallocate", "sched_getaffinity"):
        delattr(os, name)
    for name in ("SIGHUP", "SIGKILL", "SIGALRM", "alarm", "setitimer"):
        delattr(signal, name)
    os.rename, os.replace = renaming(onto_files=False), renaming(onto_files=True)
    os.unlink, os.remove, os.rmdir = deleting(unlink), deleting(unlink), deleting(rmdir)
    os.open, os.fsync, os.symlink = open_file, flush, no_links
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # a folder cannot be opened
    # what Windows would read and write in its own encoding
    warnings.filterwarnings("ignore", category=EncodingWarning)
    warnings.filterwarnings("error", category=EncodingWarning, module="mot_lora")


if __name__ == "__main__":
    become_windows()
    from mot_lora.cli.app import main

    for words in json.loads(sys.argv[1]):
        sys.argv = ["mot-lora", *words]
        try:
            main()
        except SystemExit as e:
            if e.code:
                raise
