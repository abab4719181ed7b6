"""Training logs in tensorboard, wandb or trackio: one curve a teacher, continued over the rounds."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mot_lora.errors import UserError
from mot_lora.training.job import Job

Log = Callable[[Mapping[str, float], int], None]
"""Logs the values of a step; the step is counted over all rounds."""


def check_trackers(names: Sequence[str]) -> None:
    """Errors: UserError for a tracker whose package is not installed or cannot be imported."""
    for name in names:
        try:
            import_module(name)
        except ImportError as e:
            why = "is not installed" if find_spec(name) is None else f"cannot be imported ({e})"
            raise UserError(f"branch.report_to: {name} {why}; pip install {name}, or leave it out") from e


def open_tracker(name: str, job: Job, step: int) -> tuple[Log, Callable[[], None]]:
    """Functions to log a branch that resumes after `step` and to close the log; a step logged before is replaced.

    tensorboard's files are in the run folder under logs/TEACHER; in wandb and trackio each teacher is one run.
    """
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(job.logs), purge_step=step + 1)

        def scalars(values: Mapping[str, float], at: int) -> None:
            for key, value in values.items():
                writer.add_scalar(f"train/{key}", value, at)
            writer.flush()

        return scalars, writer.close
    run = job.run.resolve()
    if name == "wandb":
        import wandb  # pyright: ignore[reportMissingImports]

        job.logs.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(f"{run}/{job.teacher}".encode()).hexdigest()[:16]
        w: Any = wandb.init(
            project="mot-lora", group=run.name, name=f"{run.name}/{job.teacher}", id=key, resume="allow", dir=job.logs
        )
        return (lambda values, at: w.log({f"train/{k}": v for k, v in values.items()}, step=at)), w.finish
    import trackio  # pyright: ignore[reportMissingImports]

    t: Any = trackio
    t.init(project=run.name, name=job.teacher, resume="allow")
    return (lambda values, at: t.log({f"train/{k}": v for k, v in values.items()}, step=at)), t.finish
