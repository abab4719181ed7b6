"""A run of Merge-of-Thought distillation, from a config to its record (arXiv 2509.08814)."""

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import Config
from mot_lora.data.dataset import Data, load_data
from mot_lora.data.records import DataRecord
from mot_lora.data.tokenizer import fingerprint, load_tokenizer
from mot_lora.durable import write_record
from mot_lora.errors import UserError, enough_memory, remark
from mot_lora.merging.merged import resolve
from mot_lora.planning.cards import USUAL, Card, find_card, host_memory, this_card
from mot_lora.planning.fit import PlanRecord, plan, refusal
from mot_lora.planning.need import UnplannableError, Work
from mot_lora.progress import Progress, silent
from mot_lora.records import RunRecord
from mot_lora.runs.ledger import final_due, read_ledger, read_run
from mot_lora.runs.loop import Evaluate, Loop, Train
from mot_lora.runs.rundir import RunDir
from mot_lora.training import branch, evaluation
from mot_lora.training.adapter import add_adapter, check_targets
from mot_lora.training.liger import uses_liger
from mot_lora.training.memory import loaded
from mot_lora.training.student import describe, device_of, fold, load_model
from mot_lora.training.tracking import check_trackers


def run(
    config: Config,
    *,
    train: Train = branch.train,
    evaluate: Evaluate = evaluation.evaluate,
    progress: Progress = silent,
    repair: bool = False,
    started: Callable[[DataRecord], object] | None = None,
    planned: Callable[[PlanRecord], object] | None = None,
    force: bool = False,
    finished: Callable[[RunDir], object] | None = None,
) -> RunRecord:
    """Distill the teachers into the student: W_t = W_0 + sum over rounds of merge(branches of the round).

    The run is in config.output. A run found there is resumed: its checksums are verified, and nothing finished is
    repeated. `repair` sets damaged parts aside, with all that was built on them, and repeats them. `started` is called
    with the record of the data, `planned` with the plan; a run that does not fit on its card ends before weights are
    downloaded or loaded, unless `force` is given. `finished` is called with the folder of the finished run:
    `mot_lora.run` writes the run's page there.

    Errors: UserError for anything that can be detected before training starts; and for a branch that diverged, after
    the other branches of its round are done.

    >>> run(load_config("recipes/quickstart.yaml")).best  # doctest: +SKIP
    4
    """
    device, rundir = device_of(config), RunDir(Path(config.output))
    config = _checked(config, rundir, device)
    checkpoint = Checkpoint.open(config.student, weights=False)
    check_targets(checkpoint.path, config.lora, config.trust_remote_code)
    tokenizer = load_tokenizer(checkpoint.path, config.trust_remote_code)
    data = load_data(config, tokenizer, progress)
    _check_context(checkpoint, data)
    needs = _check_fit(config, checkpoint, data, this_card(device), force)
    checkpoint = Checkpoint.open(config.student)
    remark(*checkpoint.remarks)
    with rundir.lock():
        if repair:
            rundir.repair(config)
        rundir.begin(config, _environment(checkpoint, tokenizer, data, device))
        rundir.check(config)
        write_record(rundir.path / "data.json", data.record)
        if started:
            started(data.record)
        if planned and needs:
            planned(needs)
        record = read_run(rundir)
        if record is None or not record.stopped or final_due(config, record) is not None:
            done = len(record.rounds) if record else 0
            with (
                enough_memory("", f"stop other programs that use {device}; the same command resumes"),
                loaded(lambda: _student(config, rundir, checkpoint, device, done, progress)) as model,
            ):
                loop = Loop(config, rundir, checkpoint, tokenizer, data, model, train, evaluate, progress)
                record = _rounds(loop, record, device)
        if finished:
            finished(rundir)
        return record


def _checked(config: Config, rundir: RunDir, device: torch.device) -> Config:
    """The config with everything where it is now. Errors: UserError for what is missing here."""
    rundir.check_device(config.device, device.type)
    config = rundir.here(config)
    rundir.check_inputs(config)
    check_trackers(config.branch.report_to)
    uses_liger(config.branch.liger, device.type == "cuda")
    resolve(config.merge.method)
    return config


def _rounds(loop: Loop, record: RunRecord | None, device: torch.device) -> RunRecord:
    """Measure the student before, do the rounds that are left, and ask it once more at the end."""
    rundir = loop.rundir
    if record is None:
        loop.before()
        record = cast("RunRecord", read_run(rundir))  # with rounds, where before.json alone was damaged
        for _ in fold(loop.model, loop.checkpoint, read_ledger(rundir, len(record.rounds), device)):
            pass
    while not record.stopped:
        loop.round(len(record.rounds) + 1)
        record = cast("RunRecord", read_run(rundir))
    if (number := final_due(loop.config, record)) is not None:
        loop.final(number)
        record = cast("RunRecord", read_run(rundir))
    return record


def _student(
    config: Config, rundir: RunDir, checkpoint: Checkpoint, device: torch.device, rounds: int, progress: Progress
) -> PeftModel:
    """The student after a run's first `rounds` rounds, with its one adapter."""
    progress("load the student", 0, 1)
    model = load_model(checkpoint, config.quantization, device, config.trust_remote_code)
    peft_model = add_adapter(model, config.lora)
    for _ in fold(peft_model, checkpoint, read_ledger(rundir, rounds, device)):
        pass
    progress("load the student", 1, 1)
    return peft_model


def preview(
    config: Config, card: str | None = None, gib: float | None = None, progress: Progress = silent
) -> tuple[PlanRecord, str]:
    """The plan of a run, from its traces and the student's small files; and, if the traces cannot be read, the reason:
    then each is assumed to have branch.max_length tokens.

    card: a card's name (default: this machine's GPU, else a common card, or the CPU with device: cpu); gib: its memory.

    Errors: UserError for an unknown card or student, and a model that cannot be planned for.

    >>> preview(load_config("recipes/qwen3_8b_24gb.yaml"), "RTX 4090")[0].fits  # doctest: +SKIP
    True
    """
    if card is not None:
        on = find_card(card)
    else:
        on = this_card(device_of(config))
        on = on if on.is_gpu or config.device == "cpu" else find_card(USUAL)
    on = replace(on, gib=gib) if gib else on
    config = RunDir(Path(config.output)).here(config)
    checkpoint = Checkpoint.open(config.student, weights=False)
    check_targets(checkpoint.path, config.lora, config.trust_remote_code)
    data, unread = None, ""
    try:
        data = load_data(config, load_tokenizer(checkpoint.path, config.trust_remote_code), progress)
    except UserError as e:
        unread = str(e)
    record = plan(config, json.dumps(checkpoint.config), on, Work.of(data) if data else None)
    return record.model_copy(update={"remarks": tuple(data.record.remarks) if data else ()}), unread


def stages(config: Config) -> list[str]:
    """The stages of a run in order, as its progress names them.

    >>> stages(Config(student="s", teachers=({"name": "a", "data": "a.jsonl"},), rounds=1))
    ['before, loss', 'round 1, a, train', 'round 1, a, loss', 'round 1, fold', 'round 1, loss']
    """
    measured = ["loss"] * (config.eval.holdout > 0) + ["answer"] * (config.eval.data is not None)
    watched = [f"{name}, answer" for name in config.eval.forgetting]
    plan = [f"before, {what}" for what in (*measured, *watched)]
    for number in range(1, config.rounds + 1):
        for teacher in config.teachers:
            parts = ["train", *(measured if config.eval.each_branch else [])]
            plan += [f"round {number}, {teacher.name}, {what}" for what in parts]
        weighed = [f"weigh {t.name}, answer" for t in config.teachers] if config.merge.searched else []
        plan += [f"round {number}, {what}" for what in (*weighed, "fold", *measured, *watched)]
    return [*plan, "final, answer"] if config.eval.final else plan


def _check_context(checkpoint: Checkpoint, data: Data) -> None:
    limit = checkpoint.config.get("max_position_embeddings")
    for t in data.record.teachers:
        if isinstance(limit, int) and t.longest_tokens > limit:
            raise UserError(
                f"teacher `{t.teacher}`: a trace has {t.longest_tokens} tokens, but {checkpoint.name} reads at most "
                f"{limit}; set branch.max_length to {limit} or less"
            )


def _check_fit(config: Config, checkpoint: Checkpoint, data: Data, card: Card, force: bool) -> PlanRecord | None:
    """The run's plan; None if it cannot be planned. Errors: UserError, with the longest trace, if it does not fit."""
    architecture, work = json.dumps(checkpoint.config), Work.of(data)
    try:
        record = plan(config, architecture, card, work, search=False)
        if not record.fits:
            record = plan(config, architecture, card, work)
    except UnplannableError:
        return None  # whether it fits is known only when the model runs
    if not force and (why := refusal(record, data.record, host_memory())):
        raise UserError(why)
    return record


def _environment(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, data: Data, device: torch.device
) -> dict[str, Any]:
    """The environment of a run: versions, machine, and the fingerprints of all inputs."""
    packages = ("mot-lora", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    on = describe(device)
    return {
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "device": on.name,
        "kind": on.kind,
        "dtype": on.dtype,
        "inputs": {
            **checkpoint.fingerprints(),
            "tokenizer": fingerprint(tokenizer),
            **data.fingerprints,
        },
    }
