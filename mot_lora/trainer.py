"""transformers' Trainer with the chunked loss, and the callbacks that watch it."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from accelerate.data_loader import SeedableRandomSampler
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from mot_lora.errors import DivergedError, writing
from mot_lora.interruption import Shield
from mot_lora.loss import batch_loss, inputs_as_they_are
from mot_lora.offload import Offload
from mot_lora.progress import Progress
from mot_lora.rundir import Job
from mot_lora.savepoint import discard, is_sealed, remember_randomness, seal
from mot_lora.tracking import open_tracker


class ByLength(Sampler[int]):
    """The Trainer's random order, in which the traces of one step stand by length, longest first.

    So that the batches that a step is cut into hold less padding: the step is the same.

    lengths: [n], in tokens; step: traces in a step.

    >>> sorted(ByLength([5, 9, 7], step=2))
    [0, 1, 2]
    """

    def __init__(self, lengths: Sequence[int], step: int) -> None:
        self.lengths = lengths
        self.step = step
        self.order = SeedableRandomSampler(lengths)  # as accelerate makes it where it finds a RandomSampler

    def __iter__(self) -> Iterator[int]:
        order = list(self.order)
        for i in range(0, len(order), self.step):
            yield from sorted(order[i : i + self.step], key=lambda k: self.lengths[k], reverse=True)

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """The order to come, as the Trainer calls for it."""
        self.order.set_epoch(epoch)


class BranchTrainer(Trainer):
    """transformers' Trainer with the chunked loss, offloading, and a step's traces by length; it counts the tokens
    that it trained on.
    """

    def __init__(self, *, chunk: int, offload: Offload | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chunk = chunk
        self.offload = offload
        self.trained_tokens = 0
        # the Trainer then hands over the tokens of the whole step and leaves dividing by them to the loss
        self.model_accepts_loss_kwargs = True

    @property
    def losses(self) -> list[float]:
        """Each step's loss, from the first one on."""
        return [row["loss"] for row in self.state.log_history if "loss" in row]

    def go_on(self, checkpoint: Path | None) -> None:
        """Train from the start, or from a checkpoint; one of the last step needs no training."""
        if checkpoint:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if state.global_step == state.max_steps:  # the Trainer would take one more
                self.state = state
                self._load_from_checkpoint(str(checkpoint))
                return
        said = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of another save_steps than the checkpoint's, which may change
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            logging.set_verbosity(said)

    def keep(self) -> None:
        """Save the state after the last whole step, unless that was done."""
        checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if not is_sealed(checkpoint):
            self._save_checkpoint(self.model, None)
            self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        with writing(folder):
            discard([folder / f"checkpoint-{self.state.global_step}"])  # what a stop left of it, half-written
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # embeddings are never trained, and looking for them would ask the Hub
        cast("PeftModel", self.model).save_pretrained(str(output_dir), save_embedding_layers=False)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        step = self.args.gradient_accumulation_steps
        if step == 1:
            return super()._get_train_sampler(train_dataset)
        traces = cast("Sequence[Any]", self.train_dataset if train_dataset is None else train_dataset)
        return ByLength([len(t) for t in traces], step * self.args.per_device_train_batch_size)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with inputs_as_they_are(self.model), self.offload.step() if self.offload else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: ARG002
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, count = batch_loss(self.accelerator.unwrap_model(model).get_base_model(), inputs, self.chunk)
        self.trained_tokens += count
        assert num_items_in_batch is not None
        return loss / num_items_in_batch


class Watch(TrainerCallback):
    """Watches the steps: says how far they are, stops what goes astray, and knows the state after the last whole one.

    While the optimizer takes its step, signals wait.
    """

    def __init__(self, trainer: BranchTrainer, shield: Shield, progress: Progress, start: float, bound: float) -> None:
        self.trainer = trainer
        self.shield = shield
        self.progress = progress
        self.start = start
        self.bound = bound  # nats of a uniform guess
        self.seconds = 0.0  # before this process
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
    """Hands the Trainer's log on to a tracker, with steps that go on across rounds."""

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
        """Close the log, also of a branch that went astray: the next one has its own."""
        if self.close:
            self.close()
