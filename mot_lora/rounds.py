"""The Merge-of-Thought loop: train each branch, merge, fold, evaluate, stop (arXiv 2509.08814)."""

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
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
from mot_lora.branch import add_adapter, reset_adapter
from mot_lora.checkpoint import Checkpoint
from mot_lora.config import BranchConfig, Config, EvalConfig
from mot_lora.data import Example, Question, encode_all, hold_out, load_tokenizer, read_questions, read_traces
from mot_lora.errors import UserError
from mot_lora.ledger import read_ledger, read_run
from mot_lora.merge import seed_for
from mot_lora.merged import Merged, combine
from mot_lora.progress import Progress, silent
from mot_lora.records import (
    Answer,
    BranchRecord,
    EvaluationRecord,
    FoldRecord,
    RoundRecord,
    RunRecord,
    Tally,
    TrainRecord,
    add_tallies,
)
from mot_lora.report import report
from mot_lora.rundir import RunDir, staged, write_lines, write_record, write_text


class Train(Protocol):
    """The seam `train=`: trains the model's one adapter on the examples, in place. `branch.train` is the default."""

    def __call__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        settings: BranchConfig,
        *,
        seed: int,
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
) -> RunRecord:
    """Distill the teachers into the student: W_t = W_0 + sum over rounds of merge(branches of the round).

    Works in config.output and goes on with what it finds finished there; nothing finished is done again.

    Errors: UserError for anything wrong that can be known before the work begins, and for a branch whose loss is not
    finite.

    >>> run(load_config("recipes/quickstart.yaml")).best  # doctest: +SKIP
    4
    """
    device = _device(config)
    checkpoint = Checkpoint.open(config.student)
    tokenizer = load_tokenizer(checkpoint.path)
    data = _load_data(config, tokenizer)
    rundir = RunDir(Path(config.output))
    with rundir.lock():
        rundir.begin(config, _environment(config, checkpoint))
        record = read_run(rundir)
        if record is None or not record.stopped:
            progress("load the student", 0, 1)
            model = add_adapter(load_model(checkpoint, config.quantization, device), config.lora)
            for _ in fold(model, checkpoint, read_ledger(rundir, len(record.rounds) if record else 0, device)):
                pass
            progress("load the student", 1, 1)
            loop = Loop(config, rundir, checkpoint, tokenizer, data, model, train, evaluate, progress)
            if record is None:
                loop.before()
            while not (record := cast("RunRecord", read_run(rundir))).stopped:
                loop.round(len(record.rounds) + 1)
            write_text(rundir.path / "report.html", report(record, rundir.path.name))
        return record


@dataclass(frozen=True)
class Data:
    """Everything that the loop reads from data files."""

    train: dict[str, list[Example]]
    held_out: dict[str, list[Example]]
    questions: list[Question]


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
        write_lines(self.rundir.path / "before.answers.jsonl", answers)
        write_record(self.rundir.path / "before.json", record)

    def round(self, number: int) -> None:
        """Train the branches that are not there yet, merge, fold, evaluate; the round's record is written last."""
        names = [t.name for t in self.config.teachers]
        for name in names:
            if self.rundir.branch_record(number, name) is None:
                self.branch(number, name)
        folders = [self.rundir.branch(number, name) for name in names]
        adapters = [load_adapter(f, name, self.model.device) for f, name in zip(folders, names, strict=True)]
        m = self.config.merge
        seed = seed_for(self.config.seed, number)
        merged = combine(adapters, m.method, m.weights, m.density, m.scale, seed, m.space)
        start = time.monotonic()
        tallies = self.fold(number, merged)
        seconds = time.monotonic() - start
        record, answers = self.measure(f"round {number}", adapter=False)
        write_lines(self.rundir.round(number) / "answers.jsonl", answers)
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
            fold_seconds=seconds,
            evaluation=record,
        )
        write_record(self.rundir.round(number) / "round.json", done)

    def branch(self, number: int, name: str) -> None:
        """Train one teacher's adapter from the round's start, measure it, and save it whole."""
        stage = f"round {number}, {name}"
        reset_adapter(self.model, seed_for(self.config.seed, number))
        took = self.train(
            self.model,
            self.tokenizer,
            self.data.train[name],
            self.config.branch,
            seed=seed_for(self.config.seed, number, "order"),  # one for all, so that only the teacher differs
            progress=self.stage(stage),
        )
        measured, answers = self.measure(stage, adapter=True) if self.config.eval.branches else (None, [])
        with staged(self.rundir.branch(number, name)) as folder:
            # embeddings are never trained, and looking for them would ask the Hub
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
            write_lines(folder / "answers.jsonl", answers)
            write_record(
                folder / "branch.json", BranchRecord(round=number, teacher=name, train=took, evaluation=measured)
            )

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

        def watch(stage: str, done: int, total: int, note: str = "") -> None:
            self.progress(f"{name}, {stage}", done, total, note)

        return watch


def _load_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    train: dict[str, list[Example]] = {}
    held_out: dict[str, list[Example]] = {}
    for teacher in config.teachers:
        kept, held = hold_out(read_traces(teacher.files), config.eval.holdout, config.seed)
        train[teacher.name], long = encode_all(tokenizer, kept, config.branch.max_length)
        held_out[teacher.name], _ = encode_all(tokenizer, held, config.branch.max_length)
        if not train[teacher.name]:
            why = f"all {long} are longer than branch.max_length {config.branch.max_length}" if long else "none is left"
            raise UserError(f"teacher `{teacher.name}`: no traces to train on: {why}")
        if config.metric == "loss" and not held_out[teacher.name]:
            raise UserError(f"teacher `{teacher.name}`: no traces held out to measure; raise eval.holdout")
    questions = read_questions(config.eval.data, config.eval.limit) if config.eval.data else []
    return Data(train, held_out, questions)


def _environment(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a run is done with: versions, machine, and the fingerprints of everything it reads."""
    files = [f for t in config.teachers for f in t.files] + ([config.eval.data] if config.eval.data else [])
    packages = ("mot-lora", "torch", "transformers", "peft", "bitsandbytes", "accelerate")
    device = _device(config)
    return {
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "inputs": {
            "student": checkpoint.fingerprint(),
            **{f: sha256(Path(f).read_bytes()).hexdigest()[:16] for f in files},
        },
    }


def _device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device `cuda` was asked for, but torch finds no CUDA GPU; use device=cpu or device=auto")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)
