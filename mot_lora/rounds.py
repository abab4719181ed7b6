"""The Merge-of-Thought loop: train each branch, merge, fold, evaluate, stop (arXiv 2509.08814)."""

import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from mot_lora import branch
from mot_lora import evaluate as evaluation
from mot_lora.adapters import load_adapter
from mot_lora.agreement import layer_of, tally
from mot_lora.base import fold, load_model
from mot_lora.branch import add_adapter, check_targets, reset_adapter
from mot_lora.chat import load_tokenizer
from mot_lora.checkpoint import Checkpoint
from mot_lora.config import BranchConfig, Config, EvalConfig, TeacherConfig
from mot_lora.data import Data, load_data
from mot_lora.durable import DamagedError, hashes, staged, write_lines, write_record, write_text
from mot_lora.errors import DivergedError, UserError
from mot_lora.ledger import read_ledger, read_page, read_run
from mot_lora.merge import seed_for
from mot_lora.merged import Merged, combine, resolve
from mot_lora.progress import Progress, silent
from mot_lora.records import (
    Answer,
    BranchRecord,
    DataRecord,
    EvaluationRecord,
    FoldRecord,
    RoundRecord,
    RunRecord,
    TrainRecord,
)
from mot_lora.report import report
from mot_lora.rundir import Job, RunDir
from mot_lora.savepoint import discard
from mot_lora.tally import Tally, add_tallies
from mot_lora.traces import Example, Question
from mot_lora.tracking import check_trackers


class Train(Protocol):
    """The seam `train=`: trains the model's one adapter on the examples, in place; `job` is the branch's place on disk.
    `branch.train` is the default.
    """

    def __call__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        settings: BranchConfig,
        *,
        seed: int,
        job: Job,
        progress: Progress,
    ) -> TrainRecord: ...


class Evaluate(Protocol):
    """The seam `evaluate=`: measures the model as it is set. `evaluate.evaluate` is the default."""

    def __call__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        held_out: Mapping[str, Sequence[Example]],
        settings: EvalConfig,
        *,
        seed: int,
        progress: Progress,
    ) -> tuple[EvaluationRecord, list[Answer]]: ...


def run(
    config: Config,
    *,
    train: Train = branch.train,
    evaluate: Evaluate = evaluation.evaluate,
    progress: Progress = silent,
    repair: bool = False,
    started: Callable[[DataRecord], object] | None = None,
) -> RunRecord:
    """Distill the teachers into the student: W_t = W_0 + sum over rounds of merge(branches of the round).

    Works in config.output and goes on with what it finds finished there; nothing finished is done again, after every
    checksum of it was compared. `repair` sets aside what is damaged, with what was built on it, and does that again.
    `started` is told what became of the data before the work begins.

    Errors: UserError for anything wrong that can be known before the work begins; for a branch that went astray, after
    the others of its round are done.

    >>> run(load_config("recipes/quickstart.yaml")).best  # doctest: +SKIP
    4
    """
    device = _device(config)
    check_trackers(config.branch.report_to)
    resolve(config.merge.method)
    checkpoint = Checkpoint.open(config.student, config.trust_remote_code)
    check_targets(checkpoint.path, config.lora, config.trust_remote_code)
    tokenizer = load_tokenizer(checkpoint.path, config.trust_remote_code)
    data = load_data(config, tokenizer, progress)
    _check_context(checkpoint, data)
    rundir = RunDir(Path(config.output))
    with rundir.lock():
        if repair:
            rundir.repair(config)
        rundir.begin(config, _environment(checkpoint, data, device))
        rundir.check(config)
        write_record(rundir.path / "data.json", data.record)
        if started:
            started(data.record)
        record = read_run(rundir)
        if record is None or not record.stopped:
            progress("load the student", 0, 1)
            model = load_model(checkpoint, config.quantization, device, config.trust_remote_code)
            model = add_adapter(model, config.lora)
            for _ in fold(model, checkpoint, read_ledger(rundir, len(record.rounds) if record else 0, device)):
                pass
            progress("load the student", 1, 1)
            loop = Loop(config, rundir, checkpoint, tokenizer, data, model, train, evaluate, progress)
            if record is None:
                loop.before()
                done = len(cast("RunRecord", read_run(rundir)).rounds)  # before.json alone can have been damaged
                for _ in fold(model, checkpoint, read_ledger(rundir, done, device)):
                    pass
            while not (record := cast("RunRecord", read_run(rundir))).stopped:
                loop.round(len(record.rounds) + 1)
        write_text(rundir.path / "report.html", report(read_page(rundir)))
        return record


def stages(config: Config) -> list[str]:
    """The stages of a run in their order, as its progress names them.

    >>> stages(Config(student="s", teachers=({"name": "a", "data": "a.jsonl"},), rounds=1))
    ['before, loss', 'round 1, a, train', 'round 1, a, loss', 'round 1, fold', 'round 1, loss']
    """
    measured = ["loss"] * (config.eval.holdout > 0) + ["answer"] * (config.eval.data is not None)
    plan = [f"before, {what}" for what in measured]
    for number in range(1, config.rounds + 1):
        for teacher in config.teachers:
            parts = ["train", *(measured if config.eval.branches else [])]
            plan += [f"round {number}, {teacher.name}, {what}" for what in parts]
        plan += [f"round {number}, {what}" for what in ("fold", *measured)]
    return plan


@dataclass(frozen=True)
class Loop:
    """The loop at work: the student in memory, always W_0 + the ledger so far, and what it works with."""

    config: Config
    rundir: RunDir
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    data: Data
    model: PeftModel
    train: Train
    evaluate: Evaluate
    progress: Progress

    def before(self) -> None:
        """Measure the student before the first round."""
        record, answers = self.measure("before", adapter=False)
        files = {self.rundir.before_answers.name: write_lines(self.rundir.before_answers, answers)}
        write_record(self.rundir.path / "before.json", record.model_copy(update={"files": files}))

    def round(self, number: int) -> None:
        """Train the branches that are not there yet, merge, fold, evaluate; the round's record is written last."""
        names = [t.name for t in self.config.teachers]
        astray: list[str] = []
        for i, teacher in enumerate(self.config.teachers):
            if self.rundir.branch_record(number, teacher.name):
                clear(self.rundir.job(number, teacher.name))  # a kill can have left it
            else:
                who = f"round {number}, teacher `{teacher.name}`"
                try:
                    self.branch(number, teacher)
                except DivergedError as e:
                    clear(self.rundir.job(number, teacher.name))  # its states lead astray again
                    astray.append(f"{who} (teachers.{i}.learning_rate=...): {e}")
                except DamagedError:
                    raise
                except UserError as e:
                    raise UserError(f"{who}: {e}") from e
        if astray:
            raise UserError(f"{'; '.join(astray)}; the other branches are kept, the same command goes on")
        folders = [self.rundir.branch(number, name) for name in names]
        adapters = [load_adapter(f, name, self.model.device) for f, name in zip(folders, names, strict=True)]
        m = self.config.merge
        seed = seed_for(self.config.seed, number)
        merged = combine(adapters, m.method, m.weights, m.density, m.scale, seed, m.space)
        start = time.monotonic()
        tallies = self.fold(number, merged)
        seconds = time.monotonic() - start
        record, answers = self.measure(f"round {number}", adapter=False)
        folder = self.rundir.round(number)
        files = {"answers.jsonl": write_lines(folder / "answers.jsonl", answers)}
        layers: dict[str, list[Tally]] = {}
        for module, row in tallies.items():
            layers.setdefault(layer_of(module), []).append(row)
        done = RoundRecord(
            round=number,
            teachers=tuple(names),
            method=m.method,
            weights=merged.weights,
            density=m.density,
            scale=m.scale,
            space=m.space,
            seed=merged.seed,
            fold=FoldRecord.of(add_tallies(tallies.values())),
            layers={layer: FoldRecord.of(add_tallies(rows)) for layer, rows in layers.items()},
            modules={module: FoldRecord.of(row) for module, row in tallies.items()},
            fold_seconds=seconds,
            evaluation=record,
            files=files,
        )
        write_record(folder / "round.json", done)

    def branch(self, number: int, teacher: TeacherConfig) -> None:
        """Train one teacher's adapter from the round's start, measure it, and save it whole."""
        name, settings = teacher.name, self.config.branch
        if teacher.learning_rate is not None:
            settings = settings.model_copy(update={"learning_rate": teacher.learning_rate})
        stage, job = f"round {number}, {name}", self.rundir.job(number, name)
        reset_adapter(self.model, seed_for(self.config.seed, number))
        took = self.train(
            self.model,
            self.tokenizer,
            self.data.train[name],
            settings,
            seed=seed_for(self.config.seed, number, "order"),  # one for all, so that only the teacher differs
            job=job,
            progress=self.stage(stage),
        )
        measured, answers = self.measure(stage, adapter=True) if self.config.eval.branches else (None, [])
        with staged(self.rundir.branch(number, name)) as folder:
            # embeddings are never trained, and looking for them would ask the Hub
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
            write_lines(folder / "answers.jsonl", answers)
            record = BranchRecord(
                round=number,
                teacher=name,
                learning_rate=settings.learning_rate,
                train=took,
                evaluation=measured,
                files=hashes(folder),
            )
            write_record(folder / "branch.json", record)
        clear(job)

    def fold(self, number: int, merged: Merged) -> dict[str, Tally]:
        """Set the model to W_0 + the ledger with this round's update, and measure what became of it."""
        ledger = [*read_ledger(self.rundir, number - 1, self.model.device), merged]
        tallies: dict[str, Tally] = {}
        for f in fold(self.model, self.checkpoint, ledger):
            tallies[f.module] = tally(merged.adapters, f.module, f.base, f.update, f.change)
            self.progress(f"round {number}, fold", len(tallies), len(merged.shapes))
        return tallies

    def measure(self, stage: str, *, adapter: bool) -> tuple[EvaluationRecord, list[Answer]]:
        """Evaluate the student, with or without its adapter."""
        with nullcontext() if adapter else self.model.disable_adapter():
            return self.evaluate(
                self.model,
                self.tokenizer,
                self.data.questions,
                self.data.held_out,
                self.config.eval,
                seed=seed_for(self.config.seed, "evaluate"),
                progress=self.stage(stage),
            )

    def stage(self, name: str) -> Progress:
        """The progress of one stage."""

        def watch(stage: str, *counts: Any, **numbers: Any) -> None:
            self.progress(f"{name}, {stage}", *counts, **numbers)

        return watch


def _check_context(checkpoint: Checkpoint, data: Data) -> None:
    limit = checkpoint.config.get("max_position_embeddings")
    for t in data.record.teachers:
        if isinstance(limit, int) and t.longest_tokens > limit:
            raise UserError(
                f"teacher `{t.teacher}`: a trace has {t.longest_tokens} tokens, but {checkpoint.name} reads at most "
                f"{limit}; set branch.max_length to {limit} or less"
            )


def clear(job: Job) -> None:
    """Delete the states of a branch at work."""
    discard(job.state.glob("checkpoint-*"))
    shutil.rmtree(job.state, ignore_errors=True)


def _environment(checkpoint: Checkpoint, data: Data, device: torch.device) -> dict[str, Any]:
    """What a run is done with: versions, machine, and the fingerprints of everything it reads."""
    packages = ("mot-lora", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    return {
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "inputs": {"student": checkpoint.fingerprint(), **data.fingerprints},
    }


def _device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device `cuda` was asked for, but torch finds no CUDA GPU; use device=cpu or device=auto")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)
