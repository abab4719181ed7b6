"""A run on disk: the paths of its files, what is finished, checks and repair, and the lock."""

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout
from psutil import pid_exists

from mot_lora.config import Config
from mot_lora.data.records import DataRecord
from mot_lora.durable import DamagedError, beside, check_files, move, read_record, write_text
from mot_lora.errors import UserError, writing
from mot_lora.reader import NOT_YAML, parse_config
from mot_lora.records import BranchRecord, EvaluationRecord, FinalRecord, Record, RoundRecord
from mot_lora.runs.inputs import by_content, missing, places, relocated, resolved
from mot_lora.training.job import Job
from mot_lora.training.savepoint import SEAL, SealRecord

R = TypeVar("R", bound=Record)

FORMAT = 1  # version of the run folder; newer ones are refused
# Files that a run killed while starting can have left.
BEGUN = {"run.lock", "run.process", "environment.json", "data.json"}
MOMENT = 0.2  # seconds that a check of the lock may hold it
CPUS = re.compile(r"cpu|x86_64|i\d86|aarch64|arm.*|(amd|intel)64.*", re.IGNORECASE)  # names from Python's platform
# Settings that may change when a run is resumed: they leave finished branches and rounds valid, and change the rest by
# rounding at most.
MAY_CHANGE = re.compile(
    r"output|device|rounds|stop\b.*|compare\b.*|teachers\.\d+\.learning_rate|eval\.(branches|batch_size|final\b.*)"
    r"|branch\.(save_steps|offload|report_to(\.\d+)?|batch_tokens|loss_chunk|activation_checkpointing|liger)"
)
STEP = re.compile(r"branch\.(batch_size|gradient_accumulation)")  # may change if their product does not


@dataclass(frozen=True)
class RunDir:
    """The folder of a run.

    A branch or round is finished if its record exists: a branch's folder is renamed into place when complete, and a
    round's record is written last.

    >>> RunDir(Path("runs/demo")).branch(1, "steps").as_posix()
    'runs/demo/round-001/steps'
    """

    path: Path

    def round(self, number: int) -> Path:
        return self.path / f"round-{number:03d}"

    def branch(self, number: int, teacher: str) -> Path:
        return self.round(number) / teacher

    def job(self, number: int, teacher: str) -> Job:
        """
        >>> RunDir(Path("runs/demo")).job(1, "steps").state.as_posix()
        'runs/demo/round-001/.steps.training'
        """
        state = self.round(number) / f".{teacher}.training"
        return Job(self.path, number, teacher, state, self.path / "logs" / teacher)

    def validation(self, number: int, branches: Sequence[int]) -> Path:
        """The file with the validation result of the merge of these branches, given by index."""
        return self.round(number) / f"validation-{'-'.join(map(str, branches))}.json"

    @property
    def before_answers(self) -> Path:
        return self.path / "before.answers.jsonl"

    def before(self) -> EvaluationRecord | None:
        """The evaluation before the first round, if it is done."""
        return read_record(self.path / "before.json", EvaluationRecord)

    @property
    def final_answers(self) -> Path:
        return self.path / "final.answers.jsonl"

    def final(self) -> FinalRecord | None:
        """The final evaluation, if `eval.final` is set and it is done."""
        return read_record(self.path / "final.json", FinalRecord)

    def branch_record(self, number: int, teacher: str) -> BranchRecord | None:
        return read_record(self.branch(number, teacher) / "branch.json", BranchRecord)

    def round_record(self, number: int) -> RoundRecord | None:
        return read_record(self.round(number) / "round.json", RoundRecord)

    def data_record(self) -> DataRecord | None:
        return read_record(self.path / "data.json", DataRecord)

    def config(self) -> Config:
        """The settings of the run. Errors: UserError for a run of a newer version, or a folder that is not a run."""
        file = self.path / "config.yaml"
        if not file.exists():
            raise UserError(f"{self.path}: not a run folder: it has no config.yaml")
        self.environment()
        try:
            tree: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, *NOT_YAML) as e:
            raise UserError(f"{file}: damaged ({' '.join(str(e).split())})") from e
        return parse_config(tree, str(file))

    def here(self, config: Config) -> Config:
        """The config with its inputs at their current paths: absolute, and relocated if they moved with the run."""
        config = resolved(config)
        try:
            started_in = Path(self.environment().get("folder") or self.config().output)
        except UserError:  # no run yet, or a damaged one, which `begin` reports
            return config
        return relocated(config, started_in if started_in.is_absolute() else None, self.path.resolve())

    def check_inputs(self, config: Config) -> None:
        """Errors: UserError if an input of a run that has started does not exist any more."""
        for key, place in missing(config).items() if (self.path / "config.yaml").exists() else ():
            raise UserError(
                f"{place}: does not exist, and was not moved along with {self.path}; give its path: {key}=PATH"
            )

    def environment(self) -> dict[str, Any]:
        """Versions, device and fingerprints of the inputs that the run started with; empty if it has not started."""
        file = self.path / "environment.json"
        if not file.exists():
            return {}
        try:
            environment: Any = json.loads(file.read_text(encoding="utf-8"))
            number, version = environment["format"], environment["versions"]["mot-lora"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as e:
            raise DamagedError(file, repr(e)) from e
        if not isinstance(number, int) or number > FORMAT:
            raise UserError(f"{self.path}: written by mot-lora {version}, which is newer than this; update mot-lora")
        return environment

    @property
    def kind(self) -> str | None:
        """The kind of device that the run started on, `cpu` or `cuda`; None if it has not started."""
        environment = self.environment()
        if "kind" in environment or "device" not in environment:
            return environment.get("kind")
        return "cpu" if CPUS.fullmatch(str(environment["device"])) else "cuda"  # older runs recorded only the name

    def check_device(self, setting: str, kind: str) -> None:
        """Errors: UserError if device `auto` chose another kind of device than the run started on."""
        try:
            before = self.kind
        except DamagedError:  # `check` reports it
            return
        if setting == "auto" and before and before != kind:
            name = self.environment()["device"]
            raise UserError(
                f"{self.path}: started on {before} ({name}), but here device `auto` is {kind}; use that device again, "
                f"or continue with device={kind}"
            )

    def check(self, config: Config) -> None:
        """Read every finished part. Errors: DamagedError for the first file that does not match its checksum."""
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
                    raise DamagedError(self.branch(number, name) / "branch.json", "it is missing")
            if record:
                check_files(self.round(number), record.files)
            for file in sorted(self.round(number).glob("validation-*.json")):
                read_record(file, EvaluationRecord)
        for file in sorted(self.path.glob(f"round-*/.*.training/checkpoint-*/{SEAL}")):
            if sealed := read_record(file, SealRecord):
                check_files(file.parent, sealed.files)

    def repair(self, config: Config) -> Path | None:
        """Move every damaged part, and all that was built on it, to a new folder, which is returned; delete nothing."""
        aside = next(p for n in range(1, 1000) if not (p := self.path / f"damaged-{n:03d}").exists())
        while True:
            try:
                self.check(config)
                return aside if aside.exists() else None
            except DamagedError as e:
                for path in self._built_on(e.path):
                    target = beside(aside / path.relative_to(self.path))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    move(path, target)

    def _built_on(self, path: Path) -> list[Path]:
        """The files that become invalid with `path`: whole branches, and all later rounds."""
        first, *rest = path.relative_to(self.path).parts
        final = [p for p in (self.path / "final.json", self.final_answers) if p.exists()]
        if path in (self.path / "before.json", self.before_answers):
            return [p for p in (self.path / "before.json", self.before_answers) if p.exists()]
        if path in final:
            return final
        if not first.startswith("round-"):
            return [path]
        folder = self.round(int(first.removeprefix("round-")))
        later = [p for p in sorted(self.path.glob("round-*")) if p.name > first]
        branch = [folder / rest[0]] if len(rest) > 1 else []
        parts = [
            *branch,
            *sorted(folder.glob("validation-*.json")),
            folder / "round.json",
            folder / "answers.jsonl",
            *later,
            *final,
        ]
        return [p for p in parts if p.exists()]

    def begin(self, config: Config, environment: dict[str, Any]) -> None:
        """Write the settings and the environment, after checking that a run found here has the same. Needs the lock.

        Errors: UserError, which names the settings or inputs that differ.
        """
        started = (self.path / "before.json").exists() or any(self.path.glob("round-*"))
        if started:
            self.check_same(config, environment["inputs"])
        where = {"folder": str(self.path.resolve()), "inputs": environment["inputs"]}
        environment = {"format": FORMAT, **environment, **(self.environment() if started else {}), **where}
        write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_text(self.path / "config.yaml", text)

    def check_same(self, config: Config, inputs: Mapping[str, str]) -> None:
        """Errors: UserError, which names the settings or inputs that differ from those the run started with.

        An input's path and name may change, but not its content.
        """
        old, recorded = self.config(), self.environment().get("inputs", {})
        inputs = inputs if recorded else {}
        changed = [
            key
            for key in _differences(by_content(old, recorded), by_content(config, inputs))
            if not MAY_CHANGE.fullmatch(key) and not (old.branch.traces == config.branch.traces and STEP.fullmatch(key))
        ]
        before, now = places(old), places(config)
        if settings := [key for key in changed if key not in before.keys() & now.keys()]:
            raise UserError(
                f"{self.path}: started with other settings ({', '.join(settings)}); restore them, start a new run "
                "beside it with --from-scratch, or choose another `output`"
            )
        differing = {
            key: f"`{key}`: {now[key]} does not hold what {before[key]} did"
            if now[key] != before[key]
            else f"{key if key == 'student' else now[key]} has changed"
            for key in changed
        }
        for what, other in (("weights", "other weights"), ("tokenizer", "another tokenizer")):
            if what in recorded and recorded[what] != inputs.get(what, recorded[what]):
                differing.setdefault("student", f"{config.student} has {other} now")
        if differing:
            raise UserError(
                f"{self.path}: started with other inputs ({', '.join(differing.values())}); restore them, give their "
                f"path ({next(iter(differing))}=PATH), or start a new run beside it with --from-scratch"
            )

    def at_work(self) -> str | None:
        """The process that is running in the folder, and its host; None if there is none."""
        if not (file := self.path / "run.lock").exists():
            return None
        try:
            with FileLock(file, timeout=MOMENT):
                return None
        except Timeout:
            return self._holder()
        except OSError:  # a folder that may only be read, whose lock cannot be tried
            found = re.match(r"process (\d+) on (.*)", self._holder())
            return found[0] if found and found[2] == socket.gethostname() and pid_exists(int(found[1])) else None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run folder for this process; the system releases the lock however the process ends.

        Errors: UserError if another process has the lock, which is named, or the folder is not a run or cannot be
        written.
        """
        found = {p.name.removeprefix(".").removesuffix(".partial") for p in self.path.glob("*")}
        if "config.yaml" not in found and found - BEGUN:
            raise UserError(f"{self.path}: holds something that is not a run; choose another `output`")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                held = FileLock(self.path / "run.lock", timeout=MOMENT).acquire()
            except Timeout as e:
                raise UserError(f"{self.path}: another run is using this folder ({self._holder()})") from e
        with held:
            # in a file of its own: on Windows nobody else can read the lock
            write_text(self.path / "run.process", f"process {os.getpid()} on {socket.gethostname()}\n")
            yield

    def _holder(self) -> str:
        """The process that took the lock last, from its own note; older versions wrote it into the lock itself."""
        note = self.path / "run.process"
        with suppress(OSError):  # not there yet, or Windows holds the lock from being read
            return (note if note.exists() else self.path / "run.lock").read_text(encoding="utf-8").strip()
        return "a process that just began"


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        if set(old) == set(new) and list(old) != list(new):  # order matters: the first matching pattern applies
            return [key]
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{key}.{k}" if key else str(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (x, y) in enumerate(zip(old, new, strict=True)) for d in _differences(x, y, f"{key}.{i}")]
    return [] if old == new else [key]
