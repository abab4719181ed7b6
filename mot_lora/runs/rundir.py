"""A run on disk: where things are, what is finished, and writing that is whole or not at all."""

import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mot_lora.config import Config
from mot_lora.durable import DamagedError, beside, check_files, read_record, write_text
from mot_lora.errors import UserError, writing
from mot_lora.reader import NOT_YAML, parse_config
from mot_lora.records import BranchRecord, DataRecord, EvaluationRecord, FinalRecord, Record, RoundRecord, SealRecord
from mot_lora.runs.inputs import by_content, found, gone, places, resolved
from mot_lora.training.job import Job
from mot_lora.training.savepoint import SEAL

R = TypeVar("R", bound=Record)

FORMAT = 1  # of run folders; a newer one is refused
# What a run that was killed while it began can have left.
BEGUN = {"run.lock", "environment.json", "data.json"}
CPUS = re.compile(r"cpu|x86_64|i\d86|aarch64|arm.*|(amd|intel)64.*", re.IGNORECASE)  # as Python names processors
# Settings that leave finished branches and rounds as they are, and what is still to do as it would be but for rounding,
# so that a run may go on with others.
MAY_CHANGE = re.compile(
    r"output|device|rounds|stop\b.*|compare\b.*|teachers\.\d+\.learning_rate|eval\.(branches|batch_size|final\b.*)"
    r"|branch\.(save_steps|offload|report_to(\.\d+)?|batch_tokens|loss_chunk|activation_checkpointing|liger)"
)
STEP = re.compile(r"branch\.(batch_size|gradient_accumulation)")  # may change where their product stays


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

    def job(self, number: int, teacher: str) -> Job:
        """
        >>> RunDir(Path("runs/demo")).job(1, "steps").state
        PosixPath('runs/demo/round-001/.steps.training')
        """
        state = self.round(number) / f".{teacher}.training"
        return Job(self.path, number, teacher, state, self.path / "logs" / teacher)

    def validation(self, number: int, branches: Sequence[int]) -> Path:
        """How the merge of these branches did, by their places, while a round's weights were found."""
        return self.round(number) / f"validation-{'-'.join(map(str, branches))}.json"

    @property
    def before_answers(self) -> Path:
        return self.path / "before.answers.jsonl"

    def before(self) -> EvaluationRecord | None:
        """How the student did before the first round, if that was measured."""
        return read_record(self.path / "before.json", EvaluationRecord)

    @property
    def final_answers(self) -> Path:
        return self.path / "final.answers.jsonl"

    def final(self) -> FinalRecord | None:
        """How the student did in the end, if eval.final was asked."""
        return read_record(self.path / "final.json", FinalRecord)

    def branch_record(self, number: int, teacher: str) -> BranchRecord | None:
        return read_record(self.branch(number, teacher) / "branch.json", BranchRecord)

    def round_record(self, number: int) -> RoundRecord | None:
        return read_record(self.round(number) / "round.json", RoundRecord)

    def data_record(self) -> DataRecord | None:
        return read_record(self.path / "data.json", DataRecord)

    def config(self) -> Config:
        """The settings that the run was begun with. Errors: UserError for a run of a newer version, or no run."""
        file = self.path / "config.yaml"
        if not file.exists():
            raise UserError(f"{self.path}: not a run: it has no config.yaml")
        self.environment()
        try:
            tree: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, *NOT_YAML) as e:
            raise UserError(f"{file}: damaged ({' '.join(str(e).split())})") from e
        return parse_config(tree, str(file))

    def here(self, asked: Config) -> Config:
        """What is asked, with everything where it is now: in absolute paths, and what is gone from its place where it
        was moved to along with the run.
        """
        asked = resolved(asked)
        try:
            begun = Path(self.environment().get("folder") or self.config().output)
        except UserError:  # no run yet, or one whose damage is told when it is begun again
            return asked
        return found(asked, begun if begun.is_absolute() else None, self.path.resolve())

    def check_there(self, config: Config) -> None:
        """Errors: UserError for a run that was begun, and what it reads is not there any more."""
        for key, place in gone(config).items() if (self.path / "config.yaml").exists() else ():
            raise UserError(
                f"{place}: is not there, nor in the same place beside {self.path}; name its place: {key}=PATH"
            )

    def environment(self) -> dict[str, Any]:
        """Versions, device and the fingerprints of the inputs that the run was begun with; empty for none yet."""
        file = self.path / "environment.json"
        if not file.exists():
            return {}
        try:
            found: Any = json.loads(file.read_text(encoding="utf-8"))
            made = found["format"], found["versions"]["mot-lora"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as e:
            raise DamagedError(file, repr(e)) from e
        if not isinstance(made[0], int) or made[0] > FORMAT:
            raise UserError(f"{self.path}: made by mot-lora {made[1]}, which is newer than this; update mot-lora")
        return found

    @property
    def kind(self) -> str | None:
        """The kind of device that the run was begun on, `cpu` or `cuda`; None for none yet."""
        said = self.environment()
        if "kind" in said or "device" not in said:
            return said.get("kind")
        return "cpu" if CPUS.fullmatch(str(said["device"])) else "cuda"  # older runs have the name alone

    def check_device(self, asked: str, kind: str) -> None:
        """Errors: UserError where the run was begun on another kind of device than this, which `auto` has chosen."""
        try:
            begun = self.kind
        except DamagedError:  # `check` tells
            return
        if asked == "auto" and begun and begun != kind:
            name = self.environment()["device"]
            raise UserError(
                f"{self.path}: was begun on {begun} ({name}), and here device `auto` is {kind}; bring that device "
                f"back, or go on with device={kind}"
            )

    def check(self, config: Config) -> None:
        """Read every finished part. Errors: DamagedError for the first file that is not as it was written."""
        self.environment()
        if before := self.before():
            check_files(self.path, before.files)
        if final := self.final():
            check_files(self.path, final.files)
        for number in range(1, config.rounds + 1):
            record = self.round_record(number)
            for name in (t.name for t in config.teachers):
                if branch := self.branch_record(number, name):
                    check_files(self.branch(number, name), branch.files)
                elif record:
                    raise DamagedError(self.branch(number, name) / "branch.json", "it is not there")
            if record:
                check_files(self.round(number), record.files)
            for file in sorted(self.round(number).glob("validation-*.json")):
                read_record(file, EvaluationRecord)
        for file in sorted(self.path.glob(f"round-*/.*.training/checkpoint-*/{SEAL}")):
            if sealed := read_record(file, SealRecord):
                check_files(file.parent, sealed.files)

    def repair(self, config: Config) -> Path | None:
        """Set every damaged part aside, and what was built on it; nothing is deleted. Returns where to."""
        aside = next(p for n in range(1, 1000) if not (p := self.path / f"damaged-{n:03d}").exists())
        while True:
            try:
                self.check(config)
                return aside if aside.exists() else None
            except DamagedError as e:
                for path in self._built_on(e.path):
                    target = beside(aside / path.relative_to(self.path))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.rename(target)

    def _built_on(self, path: Path) -> list[Path]:
        """A part of the run, as it has to be set aside: whole branches, and all rounds after."""
        first, *rest = path.relative_to(self.path).parts
        final = [p for p in (self.path / "final.json", self.final_answers) if p.exists()]
        if path in (self.path / "before.json", self.before_answers):
            return [p for p in (self.path / "before.json", self.before_answers) if p.exists()]
        if path in final:
            return final
        if not first.startswith("round-"):
            return [path]
        begun = self.round(int(first.removeprefix("round-")))
        later = [p for p in sorted(self.path.glob("round-*")) if p.name > first]
        branch = [begun / rest[0]] if len(rest) > 1 else []
        parts = [
            *branch,
            *sorted(begun.glob("validation-*.json")),
            begun / "round.json",
            begun / "answers.jsonl",
            *later,
            *final,
        ]
        return [p for p in parts if p.exists()]

    def begin(self, config: Config, environment: dict[str, Any]) -> None:
        """Write what was asked and with what, or check that a run found here was asked the same; under the lock.

        Errors: UserError, which names the settings or inputs that differ.
        """
        begun = [p for p in (self.path / "before.json", *self.path.glob("round-*")) if p.exists()]
        if begun:
            self.check_same(config, environment["inputs"])
        where = {"folder": str(self.path.resolve()), "inputs": environment["inputs"]}
        environment = {"format": FORMAT, **environment, **(self.environment() if begun else {}), **where}
        write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_text(self.path / "config.yaml", text)

    def check_same(self, config: Config, inputs: Mapping[str, str]) -> None:
        """Errors: UserError, which names the settings or inputs that are not those that the run was begun with.

        Where something lies may change, and what it is called, but not what it holds.
        """
        old, said = self.config(), self.environment().get("inputs", {})
        inputs = inputs if said else {}
        changed = [
            key
            for key in _differences(by_content(old, said), by_content(config, inputs))
            if not MAY_CHANGE.fullmatch(key) and not (old.branch.traces == config.branch.traces and STEP.fullmatch(key))
        ]
        before, now = places(old), places(config)
        if settings := [key for key in changed if key not in before.keys() & now.keys()]:
            raise UserError(
                f"{self.path}: was begun with other settings ({', '.join(settings)}); "
                "begin anew beside it with --from-scratch, or choose another `output`"
            )
        told = {
            key: f"`{key}`: {now[key]} does not hold what {before[key]} did"
            if now[key] != before[key]
            else f"{key if key == 'student' else now[key]} changed since"
            for key in changed
        }
        for what, other in (("weights", "other weights"), ("tokenizer", "another tokenizer")):
            if what in said and said[what] != inputs.get(what, said[what]):
                told.setdefault("student", f"{config.student} has {other} now")
        if told:
            raise UserError(
                f"{self.path}: was begun with other inputs ({', '.join(told.values())}); bring them back, name their "
                f"place now ({next(iter(told))}=PATH), or begin anew beside it with --from-scratch"
            )

    def at_work(self) -> str | None:
        """The process that works in the folder now, and its host."""
        try:
            with (self.path / "run.lock").open(encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    return file.read().strip()
        except OSError:  # no lock was ever taken
            pass
        return None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder for this process; the system lets go of it when the process ends, however it ends.

        Errors: UserError, which names the process that has it, or says that the folder is not a run's or cannot be
        written.
        """
        found = {p.name.removeprefix(".").removesuffix(".partial") for p in self.path.glob("*")}
        if "config.yaml" not in found and found - BEGUN:
            raise UserError(f"{self.path}: holds something that is not a run; choose another `output`")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "run.lock").open("a+", encoding="utf-8")
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


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        if set(old) == set(new) and list(old) != list(new):  # of module patterns the first counts
            return [key]
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{key}.{k}" if key else str(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (x, y) in enumerate(zip(old, new, strict=True)) for d in _differences(x, y, f"{key}.{i}")]
    return [] if old == new else [key]
