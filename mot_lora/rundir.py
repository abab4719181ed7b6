"""A run on disk: where things are, what is finished, and writing that is whole or not at all."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mot_lora.config import Config
from mot_lora.errors import UserError
from mot_lora.reader import parse_config
from mot_lora.records import BranchRecord, EvaluationRecord, Record, RoundRecord

R = TypeVar("R", bound=Record)

# What a run that was killed while it began can have left.
BEGUN = {"run.lock", "environment.json"}
# Settings that leave finished branches and rounds as they are, so that a run may go on with others.
MAY_CHANGE = ("output", "rounds", "stop")


@dataclass(frozen=True)
class RunDir:
    """The folder of a run.

    A branch or round is finished when its record is there: a branch's folder is renamed into place whole, and a round's
    record is written last.

    >>> RunDir(Path("runs/demo")).branch(1, "steps")
    PosixPath('runs/demo/round-001/steps')
    """

    path: Path

    def round(self, number: int) -> Path:
        return self.path / f"round-{number:03d}"

    def branch(self, number: int, teacher: str) -> Path:
        return self.round(number) / teacher

    def before(self) -> EvaluationRecord | None:
        """How the student did before the first round, if that was measured."""
        return _read(self.path / "before.json", EvaluationRecord)

    def branch_record(self, number: int, teacher: str) -> BranchRecord | None:
        return _read(self.branch(number, teacher) / "branch.json", BranchRecord)

    def round_record(self, number: int) -> RoundRecord | None:
        return _read(self.round(number) / "round.json", RoundRecord)

    def config(self) -> Config:
        """The settings that the run was begun with."""
        file = self.path / "config.yaml"
        if not file.exists():
            raise UserError(f"{self.path}: not a run: it has no config.yaml")
        return parse_config(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))

    def environment(self) -> dict[str, Any]:
        """Versions, device and the fingerprints of the inputs that the run was begun with."""
        return json.loads((self.path / "environment.json").read_text(encoding="utf-8"))

    def begin(self, config: Config, environment: dict[str, Any]) -> None:
        """Write what was asked and with what, or check that a run found here was asked the same; under the lock.

        Errors: UserError, which names the settings or inputs that differ.
        """
        asked = config.model_dump(mode="json")
        if (self.path / "before.json").exists():  # the first thing finished
            found = self.config().model_dump(mode="json")
            changed = [k for k in _differences(found, asked) if k.split(".")[0] not in MAY_CHANGE]
            if changed:
                raise UserError(
                    f"{self.path}: was begun with other settings ({', '.join(changed)}); "
                    "choose another `output` for the new ones"
                )
            if changed := _differences(self.environment()["inputs"], environment["inputs"]):
                raise UserError(
                    f"{self.path}: was begun with other files ({', '.join(changed)} changed since); "
                    "bring them back, or choose another `output`"
                )
        else:
            write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        write_text(self.path / "config.yaml", yaml.safe_dump(asked, sort_keys=False, allow_unicode=True))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder for this process; the system lets go of it when the process ends, however it ends.

        Errors: UserError, which names the process that has it, or says that the folder is not a run's or cannot be
        written.
        """
        found = {p.name.removeprefix(".").removesuffix(".partial") for p in self.path.glob("*")}
        if "config.yaml" not in found and found - BEGUN:
            raise UserError(f"{self.path}: holds something that is not a run; choose another `output`")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "run.lock").open("a+", encoding="utf-8")
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror}); choose another `output`") from e
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                file.seek(0)
                raise UserError(f"{self.path}: another run is at work here ({file.read().strip()})") from e
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and goes away when it does not."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            _sync(file)
        if path.exists():  # without its record it was not finished
            shutil.rmtree(path)
        partial.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, whole or not at all."""
    write_text(path, record.model_dump_json(indent=2) + "\n")


def write_lines(path: Path, records: Sequence[Record]) -> None:
    """Write records as JSONL, whole or not at all."""
    write_text(path, "".join(r.model_dump_json() + "\n" for r in records))


def _read(path: Path, kind: type[R]) -> R | None:
    if not path.exists():
        return None
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: damaged ({str(e).splitlines()[0]}); remove it to have this part done again") from e


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        if set(old) == set(new) and list(old) != list(new):  # of module patterns the first counts
            return [key]
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{key}.{k}" if key else str(k))]
    return [] if old == new else [key]


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
