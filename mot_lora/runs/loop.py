"""The rounds of a run: train a round's branches, weigh, merge and fold them, and evaluate the student."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from mot_lora.adapters.load import load_adapter
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import BranchConfig, Config, EvalConfig, TeacherConfig
from mot_lora.data.dataset import Data
from mot_lora.data.traces import Example, Question
from mot_lora.durable import DamagedError, hashes, read_record, staged, write_lines, write_record
from mot_lora.errors import DivergedError, UserError
from mot_lora.merging.agreement import Agreement, agreement_of, by_layer, fold_record, summed
from mot_lora.merging.averages import nesterov
from mot_lora.merging.lowrank import Adapter
from mot_lora.merging.merged import Merged, combine
from mot_lora.merging.seeds import seed_for
from mot_lora.merging.weighting import Weighting, by_accuracy, greedily
from mot_lora.patterns import PerModule
from mot_lora.progress import Progress
from mot_lora.records import Answer, BranchRecord, EvaluationRecord, FinalRecord, RoundRecord, TrainRecord
from mot_lora.runs.ledger import FINAL, read_ledger, read_merges
from mot_lora.runs.rundir import RunDir
from mot_lora.training.adapter import load_weights, reset_adapter
from mot_lora.training.evaluation import evaluate, loss_tokens
from mot_lora.training.job import Job
from mot_lora.training.savepoint import discard
from mot_lora.training.student import FoldedModule, describe, fold


class Train(Protocol):
    """The seam `train=`: trains the model's one adapter on the examples, in place; `job` has the branch's paths.
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
    """The seam `evaluate=`: measures the model, its adapter on or off as set. `evaluation.evaluate` is the default."""

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


@dataclass(frozen=True)
class Loop:
    """A run in progress: the student in memory, always W_0 + the ledger so far, with its data, settings and seams."""

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
        """Train the branches that are not finished, merge, fold, evaluate; the round's record is written last."""
        names = [t.name for t in self.config.teachers]
        diverged: list[str] = []
        for i, teacher in enumerate(self.config.teachers):
            if self.rundir.branch_record(number, teacher.name):
                clear(self.rundir.job(number, teacher.name))  # a killed process can have left it
            else:
                branch = f"round {number}, teacher `{teacher.name}`"
                try:
                    self.branch(number, teacher)
                except DivergedError as e:
                    clear(self.rundir.job(number, teacher.name))  # resumed from its states it would diverge again
                    diverged.append(f"{branch} (teachers.{i}.learning_rate=...): {e}")
                except DamagedError:
                    raise
                except UserError as e:
                    raise UserError(f"{branch}: {e}") from e
        if diverged:
            if damaged := self.checkpoint.not_finite():
                diverged.append(f"{damaged} of {self.checkpoint.name} itself holds inf or NaN: use an intact student")
            raise UserError(f"{'; '.join(diverged)}; the other branches are kept, and the same command resumes")
        adapters = [load_adapter(self.rundir.branch(number, name), name, self.model.device) for name in names]
        weighting, m = self.weigh(number, adapters), self.config.merge
        merged = self.merge(number, adapters, weighting.weights)
        start = time.monotonic()
        modules = self.fold(number, merged)
        seconds = time.monotonic() - start
        record, answers = self.measure(f"round {number}", adapter=False)
        folder = self.rundir.round(number)
        files = {"answers.jsonl": write_lines(folder / "answers.jsonl", answers)}
        done = RoundRecord(
            round=number,
            teachers=tuple(names),
            method=m.method,
            weights=merged.weights,
            reasons=weighting.reasons,
            density=m.density,
            scale=m.scale,
            momentum=m.momentum,
            space=m.space,
            seed=merged.seed,
            fold=fold_record(summed(modules.values())),
            layers={layer: fold_record(agreement) for layer, agreement in by_layer(modules).items()},
            modules={module: fold_record(agreement) for module, agreement in modules.items()},
            fold_seconds=seconds,
            device=describe(self.model.device),
            evaluation=record,
            files=files,
        )
        write_record(folder / "round.json", done)

    def branch(self, number: int, teacher: TeacherConfig) -> None:
        """Train one teacher's adapter from the round's initial weights, measure it, and save it atomically."""
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
            seed=seed_for(self.config.seed, number, "order"),  # the same for all branches: only the teacher differs
            job=job,
            progress=self.stage(stage),
        )
        measured, answers = self.measure(stage, adapter=True) if self.config.eval.each_branch else (None, [])
        with staged(self.rundir.branch(number, name)) as folder:
            # embeddings are never trained, and PEFT would query the Hub for them
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
            write_lines(folder / "answers.jsonl", answers)
            record = BranchRecord(
                round=number,
                teacher=name,
                learning_rate=settings.learning_rate,
                train=took,
                device=describe(self.model.device),
                evaluation=measured,
                files=hashes(folder),
            )
            write_record(folder / "branch.json", record)
        clear(job)

    def merge(self, number: int, adapters: Sequence[Adapter], weights: Sequence[PerModule]) -> Merged:
        """The merge of a round's branches with these weights."""
        m = self.config.merge
        return combine(adapters, m.method, weights, m.density, m.scale, seed_for(self.config.seed, number), m.space)

    def weigh(self, number: int, adapters: Sequence[Adapter]) -> Weighting:
        """The weight of each branch: equal, as given in `merge.weights`, or from the accuracy on `eval.validation`."""
        everyone = range(len(adapters))
        if not self.config.merge.searched:
            return Weighting(self.config.merge.given or (1.0,) * len(adapters), ())

        def accuracy(places: tuple[int, ...]) -> float:
            file = self.rundir.validation(number, places)
            record = read_record(file, EvaluationRecord)
            if record is None:
                alone = len(places) == 1
                if alone:
                    load_weights(self.model, self.rundir.branch(number, adapters[places[0]].name))
                else:
                    merged = self.merge(number, adapters, [float(i in places) for i in everyone])
                    for _ in self.folded(number, merged):
                        pass
                names = "+".join(adapters[i].name for i in places)
                record, _ = self.ask(f"round {number}, weigh {names}", self.data.validation, {}, adapter=alone)
                write_record(file, record)
            return record.accuracy or 0.0

        accuracies = [accuracy((i,)) for i in everyone]
        if self.config.merge.weights == "validation":
            return by_accuracy(accuracies, len(self.data.validation))
        weighting = greedily(accuracies, accuracy)
        # the round's fold is measured from the weights at its start: restore every module that the search changed
        nothing = self.merge(number, adapters, (1.0,) * len(adapters)).scaled(0)
        for _ in fold(self.model, self.checkpoint, [*read_ledger(self.rundir, number - 1, self.model.device), nothing]):
            pass
        return weighting

    def folded(self, number: int, merged: Merged) -> Iterator[FoldedModule]:
        """Set the model to W_0 + the ledger with this round's merge, module by module."""
        merges = [*read_merges(self.rundir, number - 1, self.model.device), merged]
        momentum = self.config.merge.momentum
        weights, before = nesterov(number, momentum), [*nesterov(number - 1, momentum), 0.0]
        ledger = [m.scaled(w) for m, w in zip(merges, weights, strict=True)]
        return fold(self.model, self.checkpoint, ledger, [1 - b / w for w, b in zip(weights, before, strict=True)])

    def fold(self, number: int, merged: Merged) -> dict[str, Agreement]:
        """Fold this round's merge, and measure how much of each module's update survives."""
        modules: dict[str, Agreement] = {}
        for f in self.folded(number, merged):
            modules[f.module] = agreement_of(merged.adapters, f.module, f.base, f.update, f.change)
            self.progress(f"round {number}, fold", len(modules), len(merged.shapes))
            del f  # frees its tensors before the next module's are made
        return modules

    def final(self, number: int) -> None:
        """Evaluate the student of a round as `eval.final` says."""
        device, settings = self.model.device, self.config.eval.at_last
        ledger = read_ledger(self.rundir, number, device) or [read_merges(self.rundir, 1, device)[0].scaled(0)]
        for _ in fold(self.model, self.checkpoint, ledger):
            pass
        record, answers = self.ask("final", self.data.final, {}, adapter=False, settings=settings)
        done = FinalRecord(
            round=number,
            evaluation=record,
            files={self.rundir.final_answers.name: write_lines(self.rundir.final_answers, answers)},
            **{key: getattr(settings, key) for key in FINAL},
        )
        write_record(self.rundir.path / "final.json", done)

    def measure(self, stage: str, *, adapter: bool) -> tuple[EvaluationRecord, list[Answer]]:
        """Evaluate the student, with or without its adapter; without it also on the questions of `eval.forgetting`."""
        record, answers = self.ask(stage, self.data.questions, self.data.held_out, adapter=adapter)
        if adapter:
            return record, answers
        watched = {
            name: self.ask(f"{stage}, {name}", questions, {}, adapter=False)[0]
            for name, questions in self.data.forgetting.items()
        }
        update = {
            "forgetting": {name: evaluation.accuracy for name, evaluation in watched.items()},
            "seconds": record.seconds + sum(evaluation.seconds for evaluation in watched.values()),
        }
        return record.model_copy(update=update), answers

    def ask(
        self,
        stage: str,
        questions: Sequence[Question],
        held_out: Mapping[str, Sequence[Example]],
        *,
        adapter: bool,
        settings: EvalConfig | None = None,
    ) -> tuple[EvaluationRecord, list[Answer]]:
        """Evaluate the student on these questions and traces, with no more memory than training takes."""
        # sized by the held-out traces: the training traces differ between the arms of a comparison, and results that
        # the arms share would differ with them
        held = [len(e) for examples in self.data.held_out.values() for e in examples]
        longest = max(held, default=self.config.branch.max_length)
        ours = {"tokens": loss_tokens(self.config.branch, longest)} if self.evaluate is evaluate else {}
        with nullcontext() if adapter else self.model.disable_adapter():
            return self.evaluate(
                self.model,
                self.tokenizer,
                questions,
                held_out,
                settings or self.config.eval,
                seed=seed_for(self.config.seed, "evaluate"),
                progress=self.stage(stage),
                **ours,
            )

    def stage(self, name: str) -> Progress:
        """The progress of one stage."""

        def watch(stage: str, *counts: Any, **numbers: Any) -> None:
            self.progress(f"{name}, {stage}", *counts, **numbers)

        return watch


def clear(job: Job) -> None:
    """Delete the saved states of an unfinished branch."""
    discard(job.state.glob("checkpoint-*"))
    shutil.rmtree(job.state, ignore_errors=True)
