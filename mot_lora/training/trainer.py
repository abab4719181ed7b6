"""transformers' Trainer with the chunked loss, and the callbacks that watch it."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from mot_lora.config import BranchConfig
from mot_lora.data.encoding import collate
from mot_lora.data.traces import IGNORE, Example, batches
from mot_lora.errors import DivergedError, writing
from mot_lora.interruption import Shield
from mot_lora.progress import Progress
from mot_lora.training.job import Job
from mot_lora.training.loss import batch_loss
from mot_lora.training.offload import Offload
from mot_lora.training.savepoint import discard, is_sealed, remember_randomness, seal
from mot_lora.training.tracking import open_tracker


def rate_share(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The factor of the learning rate in a step, counted from 0: k / warmup in the k-th step of warm-up, then 1 or
    falling, so that it would be 0 after the last step.

    With warm-up, transformers' schedules start with a step at rate 0, which trains nothing.

    >>> [round(rate_share(i, 5, 2, "linear"), 2) for i in range(5)]
    [0.5, 1.0, 0.75, 0.5, 0.25]
    """
    peak = max(warmup - 1, 0)
    if step < peak:
        return (step + 1) / warmup
    done = (step - peak) / (steps - peak)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


class BranchTrainer(Trainer):
    """transformers' Trainer with the chunked loss and offloading; counts the trained tokens.

    The Trainer's batch is a whole step, a list of examples, which is split here into batches by length: the traces of a
    step do not depend on the split, and traces of similar length are computed together. In fp16 gradients are scaled.
    """

    def __init__(
        self, *, settings: BranchConfig, pad_id: int, offload: Offload | None = None, model: PeftModel, **kwargs: Any
    ) -> None:
        super().__init__(model=model, data_collator=cast("Any", list), **kwargs)
        self.settings = settings
        self.pad_id = pad_id
        self.offload = offload
        self.trained_tokens = 0
        if model.dtype == torch.float16:  # with `fp16` the Trainer would wrap the model's forward again in each branch
            self.accelerator.scaler = torch.amp.GradScaler(model.device.type)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """The learning rate's schedule (`rate_share`)."""
        steps, schedule = num_training_steps, self.settings.schedule
        warmup = self.args.get_warmup_steps(steps)
        self.lr_scheduler = LambdaLR(
            optimizer or cast("Optimizer", self.optimizer), lambda step: rate_share(step, steps, warmup, schedule)
        )
        return self.lr_scheduler

    @property
    def losses(self) -> list[float]:
        """The loss of every step so far."""
        return [row["loss"] for row in self.state.log_history if "loss" in row]

    def resume(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or from the start; a checkpoint of the last step is only loaded."""
        if checkpoint:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if state.global_step == state.max_steps:  # the Trainer would train one more step
                self.state = state
                self._load_from_checkpoint(str(checkpoint))
                return
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # no warning that save_steps differs from the checkpoint's: it may
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            logging.set_verbosity(verbosity)

    def keep(self) -> None:
        """Save the state after the last complete step, unless it is saved."""
        checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if not is_sealed(checkpoint):
            self._save_checkpoint(self.model, None)
            self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        with writing(folder):
            discard([folder / f"checkpoint-{self.state.global_step}"])  # one that an interruption left half-written
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # embeddings are never trained, and PEFT would query the Hub for them
        cast("PeftModel", self.model).save_pretrained(str(output_dir), save_embedding_layers=False)

    def training_step(
        self,
        model: Any,
        inputs: Any,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """Forward and backward pass of a whole step, in batches; the loss is the mean over all its trained tokens."""
        model.train()
        base: Any = cast("PeftModel", self.model).get_base_model()
        examples = cast("list[Example]", inputs)
        cut = list(batches([len(e) for e in examples], self.settings.most, self.settings.batch_tokens))
        count = sum(label != IGNORE for e in examples for label in e.labels[1:])
        total = torch.zeros((), device=base.device)
        for indices in reversed(cut):  # longest first: if memory runs out, it does so at once
            rows = collate([examples[i] for i in indices], self.pad_id)
            batch = {k: t.to(base.device) for k, t in rows.items()}
            with self.offload.step() if self.offload else nullcontext():
                summed, _ = batch_loss(base, batch, self.settings.loss_chunk)
                loss = summed / count
                self.accelerator.backward(loss)
            total += loss.detach()
            del summed, loss
        self.trained_tokens += count
        return total

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.accelerator.scaler:
            self.accelerator.scaler.unscale_(cast("Any", self.optimizer).optimizer)
        return super()._clip_grad_norm(model)


class Watch(TrainerCallback):
    """Reports progress, stops a branch that diverges, and remembers the state after the last complete step.

    Signals are deferred while the optimizer takes its step.
    """

    def __init__(self, trainer: BranchTrainer, shield: Shield, progress: Progress, start: float, bound: float) -> None:
        self.trainer = trainer
        self.shield = shield
        self.progress = progress
        self.start = start
        self.bound = bound  # nats of a uniform guess
        self.seconds = 0.0  # of training in earlier processes
        self.restore: Callable[[], None] | None = None

    @property
    def spent(self) -> float:
        """Seconds of training, over all processes."""
        return self.seconds + time.monotonic() - self.start

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.progress("train", state.global_step, state.max_steps, tokens=self.trainer.trained_tokens)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.shield.hold()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        if not logs or "loss" not in logs:
            return
        loss, tokens = logs["loss"], self.trainer.trained_tokens
        first = self.trainer.losses[0]
        if not math.isfinite(loss) or loss > first + self.bound:
            raise DivergedError(
                f"the loss went from {first:.3f} to {loss:.3f} at step {state.global_step}: lower its "
                f"learning_rate, now {args.learning_rate:g}"
            )
        randomness = remember_randomness()

        def restore() -> None:
            randomness()
            self.trainer.trained_tokens = tokens

        self.restore = restore
        self.progress("train", state.global_step, state.max_steps, loss=loss, tokens=tokens)
        self.shield.release()

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        seal(checkpoint, args.learning_rate, self.trainer.trained_tokens, self.spent)


class Track(TrainerCallback):
    """Sends the Trainer's log to a tracker, with steps counted over all rounds."""

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        self.job = job
        self.close: Callable[[], None] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.before = (self.job.round - 1) * state.max_steps
        self.log, self.close = open_tracker(self.name, self.job, self.before + state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        if logs and "loss" in logs:
            values = {k: float(v) for k, v in logs.items() if k in ("loss", "grad_norm", "learning_rate")}
            self.log(values, self.before + state.global_step)

    def end(self) -> None:
        """Close the log, even if the branch diverged: each branch has its own."""
        if self.close:
            self.close()
