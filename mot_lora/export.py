"""A round's student as a full checkpoint with its model card."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from mot_lora.checkpoint import Checkpoint
from mot_lora.config import Config, PerModule
from mot_lora.errors import UserError
from mot_lora.fold import fold_checkpoint
from mot_lora.ledger import read_ledger, read_run
from mot_lora.progress import Progress, silent
from mot_lora.records import RunRecord
from mot_lora.rundir import RunDir


def export(
    path: str | Path,
    out: str | Path,
    *,
    round: int | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    progress: Progress = silent,
) -> int:
    """Write the student after a round (the best one unless given) as a full checkpoint, and return the round's number.

    W_0 + the ledger, in fp64, rounded once to `dtype`; with tokenizer and model card.

    Errors: UserError when the round is not finished, no round beats the student before, or the base has changed since.
    """
    chosen = choose(path, round)
    fold_checkpoint(
        chosen.checkpoint,
        read_ledger(chosen.rundir, chosen.round),
        out,
        dtype,
        card=model_card(chosen.config, chosen.record, chosen.round),
        progress=progress,
    )
    return chosen.round


@dataclass(frozen=True)
class Chosen:
    """A finished round of a run, every file of it checked, and the run's base."""

    rundir: RunDir
    config: Config
    record: RunRecord
    round: int
    checkpoint: Checkpoint


def choose(path: str | Path, round: int | None = None) -> Chosen:
    """A run's round, the best one unless given. Errors: as in `export`."""
    rundir = RunDir(Path(path))
    config, record = rundir.config(), read_run(rundir)
    if record is None:
        raise UserError(f"{path}: nothing is finished here yet; `mot-lora run` it first")
    number = record.best if round is None else round
    if number == 0:
        raise UserError(f"{path}: no round is better than the student before; choose one with --round")
    if number not in {r.round for r in record.rounds}:
        raise UserError(f"{path}: round {number} is not finished; it has {len(record.rounds)} rounds")
    rundir.check(config)
    checkpoint = Checkpoint.open(config.student, config.trust_remote_code)
    said = rundir.environment().get("inputs", {}).get("student")
    if checkpoint.fingerprint() != said:
        raise UserError(f"{config.student}: is not the model that {path} was begun with; bring that one back")
    return Chosen(rundir, config, record, number, checkpoint)


def model_card(config: Config, record: RunRecord, number: int) -> str:
    """The README of an exported student: base, teachers, merge, results."""
    merge = record.rounds[number - 1]
    teachers = "\n".join(f"- {t} (weight {_text(w)})" for t, w in zip(merge.teachers, merge.weights, strict=True))
    density = "" if merge.density is None else f", density {_text(merge.density)}"
    momentum = f", momentum {merge.momentum:g}" if merge.momentum else ""
    how = f"{merge.method}{density}, scale {_text(merge.scale)}{momentum}"
    rows = [("before", record.before), *((f"after round {r.round}", r.evaluation) for r in record.rounds[:number])]
    table = "\n".join(f"| {name} | {e.accuracy_text} | {e.loss_text} |" for name, e in rows)
    return f"""---
base_model: {Path(config.student).name if Path(config.student).exists() else config.student}
library_name: transformers
tags: [merge-of-thought, mot-lora]
---
# {Path(config.student).name} after {number} rounds of Merge-of-Thought distillation

Made with mot-lora {metadata.version("mot-lora")} (arXiv 2509.08814): in each round one LoRA adapter a teacher was
trained on a base in {config.quantization}, the adapters were merged ({how})
and folded into the base.

Teachers:
{teachers}

| student | accuracy, 95 % interval | held-out loss |
|---|---|---|
{table}

Measured in {config.quantization} on {record.before.questions} held-out questions. Seed {config.seed}.
"""


def _text(setting: PerModule) -> str:
    """`0.5`, or `0.5 for mlp.*, 1 for .*`."""
    if isinstance(setting, dict):
        return ", ".join(f"{value:g} for {pattern}" for pattern, value in setting.items())
    return f"{setting:g}"
