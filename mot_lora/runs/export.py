"""Export of a round's student: a full checkpoint or one adapter of the base, with a model card."""

import json
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mot_lora.adapters.save import pack, write_packed
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.fold import fold_placement
from mot_lora.checkpoints.placement import Placement
from mot_lora.checkpoints.records import KeptRecord
from mot_lora.config import Config
from mot_lora.data.records import TurnRecord
from mot_lora.durable import check_new, staged
from mot_lora.errors import UserError
from mot_lora.merging.lowrank import Adapter, Dense
from mot_lora.merging.merged import method_name, total
from mot_lora.patterns import PerModule
from mot_lora.progress import Progress, silent
from mot_lora.records import RunRecord
from mot_lora.runs.ledger import open_student, read_ledger, read_run, settings
from mot_lora.runs.records import ExportRecord
from mot_lora.runs.rundir import RunDir


def export(
    path: str | Path,
    out: str | Path,
    *,
    round: int | None = None,
    student: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = silent,
) -> ExportRecord:
    """Write the student after `round` (default: the best one) as a full checkpoint; report how much of it survived.

    The weights are W_0 + the ledger, rounded once to `dtype`; tokenizer and model card are included. In 16 bits, part
    of an update with |D|/|W| below .003 is lost to rounding, half of it at .001; fp32 and `export_adapter` keep it.
    `student` is the path of the run's base, needed only if the base was moved and not along with the run.

    Errors: UserError if the round is not finished, no round beats the original student, or the base has changed.

    >>> export("runs/quickstart", "student").survived  # doctest: +SKIP
    0.9981
    """
    chosen = choose(path, round, student)
    name = str(dtype).removeprefix("torch.")
    kept = fold_placement(
        Placement.of(chosen.checkpoint, read_ledger(chosen.rundir, chosen.round), dtype),
        Path(out),
        lambda kept: {"README.md": model_card(chosen, f"In {name} {kept.text}."), **_ends(chosen)},
        progress=progress,
    )
    return ExportRecord(round=chosen.round, form="checkpoint", dtype=name, **kept.model_dump())


def export_adapter(
    path: str | Path,
    out: str | Path,
    *,
    round: int | None = None,
    student: str | None = None,
    rank: int | None = None,
    progress: Progress = silent,
) -> ExportRecord:
    """Write the update of all rounds up to `round` (default: the best one) as one PEFT adapter of the base.

    The adapter is in fp32 with scaling 1. Without `rank` a linear merge is exported exactly: each module has the sum of
    all branches' ranks. With `rank` it is the best approximation of that rank, which keeps |D_r|^2 / |D|^2 of the
    update. The base itself is not needed.

    Errors: UserError as in `export`, and for a merge that is not low-rank (TIES, DARE, ...) without `rank`.

    >>> export_adapter("runs/quickstart", "adapter", rank=64).survived  # doctest: +SKIP
    0.9996
    """
    chosen, out = choose(path, round, student), Path(out)
    check_new(out)
    base = chosen.checkpoint.name if Path(chosen.config.student).is_dir() else chosen.config.student
    ledger = read_ledger(chosen.rundir, chosen.round)
    updates = {module: total(ledger, module) for module in dict.fromkeys(m for merged in ledger for m in merged.shapes)}
    if rank is None and any(isinstance(u, Dense) for u in updates.values()):
        method, all_ranks = method_name(ledger[0].method), chosen.config.lora.r * sum(len(m.adapters) for m in ledger)
        raise UserError(
            f"{path}: a {method} merge is not low-rank; give a rank, e.g. --rank {all_ranks}, "
            "the sum of the branches' ranks"
        )
    packed = pack(Adapter(out.name, updates, base), rank, progress)
    saved = packed.record
    worst = max(saved.modules, key=lambda module: saved.modules[module])
    kept = KeptRecord(survived=1 - saved.lost**2, worst=(worst, 1 - saved.modules[worst] ** 2))
    with staged(out) as folder:
        write_packed(packed, folder)
        card = model_card(chosen, f"As this adapter of the base, of rank {saved.rank}, {kept.text}.", "peft")
        (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
    return ExportRecord(round=chosen.round, form="lora", dtype="float32", rank=saved.rank, **kept.model_dump())


@dataclass(frozen=True)
class Chosen:
    """A finished round of a run whose files all match their checksums."""

    rundir: RunDir
    config: Config
    record: RunRecord
    round: int

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The run's base. Errors: UserError, as in `open_student`."""
        return open_student(self.rundir, self.config)


def choose(path: str | Path, round: int | None = None, student: str | None = None) -> Chosen:
    """A round of a run (default: the best one), its inputs at their current paths. Errors: as in `export`."""
    rundir = RunDir(Path(path))
    config, record = settings(rundir, student), read_run(rundir)
    if record is None:
        raise UserError(f"{path}: no part of this run is finished yet; run `mot-lora run` first")
    number = record.best if round is None else round
    if number == 0:
        raise UserError(f"{path}: no round is better than the original student; choose one with --round")
    if number not in {r.round for r in record.rounds}:
        raise UserError(f"{path}: round {number} is not finished; finished rounds: {len(record.rounds)}")
    rundir.check(config)
    return Chosen(rundir, config, record, number)


def model_card(chosen: Chosen, kept: str, library: str = "transformers") -> str:
    """The README of an exported student: base, teachers, merge, the share of the update that survived, results."""
    config, record, number = chosen.config, chosen.record, chosen.round
    merge = record.rounds[number - 1]
    teachers = "\n".join(f"- {t} (weight {_text(w)})" for t, w in zip(merge.teachers, merge.weights, strict=True))
    density = "" if merge.density is None else f", density {_text(merge.density)}"
    momentum = f", momentum {merge.momentum:g}" if merge.momentum else ""
    how = f"{merge.method}{density}, scale {_text(merge.scale)}{momentum}"
    rows = [("before", record.before), *((f"after round {r.round}", r.evaluation) for r in record.rounds[:number])]
    if record.final and record.final.round == number:
        rows.append((record.final.label, record.final.evaluation))
    turn = _unlisted(chosen)
    ends = f"An answer ends with {turn.stops[0]}, at which generation must stop.\n\n" if turn else ""
    table = "\n".join(f"| {name} | {e.accuracy_text} | {e.loss_text} |" for name, e in rows)
    return f"""---
base_model: {Path(config.student).name if Path(config.student).exists() else config.student}
library_name: {library}
tags: [merge-of-thought, mot-lora]
---
# {Path(config.student).name} after {number} rounds of Merge-of-Thought distillation

Made with mot-lora {metadata.version("mot-lora")} (arXiv 2509.08814): in each round one LoRA adapter a teacher was
trained on a base in {config.quantization}, the adapters were merged ({how})
and folded into the base. {kept}

Teachers:
{teachers}

| student | accuracy, 95 % interval | held-out loss |
|---|---|---|
{table}

{ends}Measured in {config.quantization} on {record.before.questions} held-out questions. Seed {config.seed}.
"""


def _ends(chosen: Chosen) -> dict[str, str]:
    """generation_config.json with the trained end of turn added, if the base's file does not list it."""
    turn, file = _unlisted(chosen), chosen.checkpoint.path / "generation_config.json"
    if turn is None:
        return {}
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {file.name: json.dumps({**settings, "eos_token_id": list(turn.stop_ids)}, indent=2) + "\n"}


def _unlisted(chosen: Chosen) -> TurnRecord | None:
    """The format of the student's turn, if the base lists its end nowhere."""
    data = chosen.rundir.data_record()
    return data.turn if data and data.turn and not data.turn.listed else None


def _text(setting: PerModule) -> str:
    """`0.5`, or `0.5 for mlp.*, 1 for .*`."""
    if isinstance(setting, dict):
        return ", ".join(f"{value:g} for {pattern}" for pattern, value in setting.items())
    return f"{setting:g}"
