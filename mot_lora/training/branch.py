"""One branch: one teacher's adapter, trained on the frozen, quantized student."""

import math
import tempfile
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
)

from mot_lora.config import BranchConfig
from mot_lora.data.traces import Example
from mot_lora.errors import DivergedError, enough_memory
from mot_lora.interruption import INTERRUPTS, Shield
from mot_lora.progress import Progress, silent
from mot_lora.records import TrainRecord
from mot_lora.training.job import Job
from mot_lora.training.liger import fused, uses_liger
from mot_lora.training.lora import one_product
from mot_lora.training.loss import inputs_as_they_are
from mot_lora.training.offload import Offload, capacity, kept_bytes, offloads
from mot_lora.training.savepoint import SCHEDULE, SealRecord, discard, newest
from mot_lora.training.trainer import BranchTrainer, Track, Watch


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: BranchConfig,
    *,
    seed: int,
    job: Job | None = None,
    progress: Progress = silent,
) -> TrainRecord:
    """Train the model's adapter on the examples, in place, with a fresh optimizer and schedule.

    The loss of a step is the mean over all its trained tokens, - 1/n sum log p(token), in fp32 from chunked logits; its
    traces are batched by length. The optimizer is AdamW. With a `job` the state is saved there every `save_steps`, at
    the end and on a signal; training resumes from it and ends with the same adapter, byte for byte, as without the
    interruption. This is the seam `train=` of `run`: any function with these arguments can replace it.

    Errors: DivergedError for a loss that is not finite or worse than guessing; UserError if memory runs out, and as in
    `uses_liger`.

    >>> run(config, train=my_train)  # doctest: +SKIP
    """
    start = time.monotonic()
    with ExitStack() as stack:
        folder = job.state if job else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        saved = _state(folder, settings)
        set_checkpoints(model.get_base_model(), settings)
        stack.enter_context(fast_layers(model, settings))
        shield = stack.enter_context(Shield())
        trainer = _trainer(model, tokenizer, examples, settings, folder, seed)
        stack.callback(_let_go, trainer, model)
        watch = Watch(trainer, shield, progress, start, bound=math.log(model.config.vocab_size))
        for name in settings.report_to if job else ():
            track = Track(name, cast("Job", job))
            trainer.add_callback(track)  # before the watch, which can end training: every step is logged
            stack.callback(track.end)
        trainer.add_callback(watch)
        if saved:
            trainer.trained_tokens, watch.seconds = saved[1].tokens, saved[1].seconds
        stays = model.device.type == "cuda" and trainer.offload is None  # layers' inputs, which could be offloaded
        stack.enter_context(enough_memory("", _advice(settings, max(map(len, examples)), stays)))
        _take_steps(trainer, watch, saved[0] if saved else None, keep=job is not None)
        model.eval()
        return TrainRecord(
            steps=trainer.state.global_step,
            tokens=trainer.trained_tokens,
            loss=sum(trainer.losses) / len(trainer.losses),
            seconds=watch.spent,
            losses=tuple(trainer.losses),
        )


def _state(folder: Path, settings: BranchConfig) -> tuple[Path, SealRecord] | None:
    """The state to resume from. One of another learning rate or schedule, which an optimizer keeps, is deleted."""
    saved = newest(folder)
    if saved and (saved[1].learning_rate, saved[1].schedule) != (settings.learning_rate, SCHEDULE):
        discard(folder.glob("checkpoint-*"))
        return None
    return saved


def _trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: BranchConfig,
    folder: Path,
    seed: int,
) -> BranchTrainer:
    trainer = BranchTrainer(
        settings=settings,
        pad_id=cast("int", tokenizer.pad_token_id),
        offload=_offload(model, settings, examples),
        model=model,
        args=_arguments(settings, folder, seed, model.device),
        train_dataset=cast("Any", list(examples)),
    )
    trainer.remove_callback(PrinterCallback)  # progress is reported by `progress`
    return trainer


def _take_steps(trainer: BranchTrainer, watch: Watch, state: Path | None, *, keep: bool) -> None:
    """Train to the end, from a saved state where there is one. `keep` saves the last state; at a signal, that of the
    last whole step.
    """
    try:
        trainer.resume(state)
        _check_trained(cast("PeftModel", trainer.model), trainer.settings)
        if keep:
            trainer.keep()
    except INTERRUPTS:
        if keep and watch.restore:
            watch.restore()
            trainer.keep()
        raise


def set_checkpoints(base: Any, settings: BranchConfig) -> None:
    """Turn activation checkpointing on or off: on, only the layers' inputs are kept for the backward pass.

    Without dropout the recomputation needs no random state; not saving it avoids a copy from the GPU.
    """
    # transformers 5.17 has only the older names
    if not settings.activation_checkpointing:
        getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()
        return
    dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in base.modules())
    dropout |= any(value for name, value in vars(base.config.get_text_config()).items() if name.endswith("dropout"))
    how = {"use_reentrant": False, "preserve_rng_state": dropout}
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)(how)
    base.disable_input_require_grads()  # only reentrant checkpoints need it, and it would keep the first input


@contextmanager
def fast_layers(model: PeftModel, settings: BranchConfig) -> Generator[None]:
    """During training: each LoRA layer as one product, no fp32 copies of layers' inputs, Liger's kernels if set."""
    with inputs_as_they_are(model), one_product(model), ExitStack() as stack:
        if uses_liger(settings.liger, model.device.type == "cuda"):
            stack.enter_context(fused(model))
        yield


def _let_go(trainer: BranchTrainer, model: PeftModel) -> None:
    """Free the memory of training: optimizer state, gradients, pinned memory. The Trainer has reference cycles."""
    model.zero_grad()
    if isinstance(trainer.optimizer, torch.optim.Optimizer):
        trainer.optimizer.state.clear()  # with a gradient scaler, accelerate's optimizer is in a reference cycle
    trainer.accelerator.free_memory()
    vars(trainer).clear()
    if model.device.type == "cuda":
        torch.accelerator.empty_host_cache()


def _offload(model: PeftModel, settings: BranchConfig, examples: Sequence[Example]) -> Offload | None:
    """The offload of layers' inputs to host memory, if the longest batch needs it."""
    shape = model.config.get_text_config()
    rows, longest = settings.largest(max(map(len, examples)))
    tokens = min(rows, len(examples)) * longest
    kept = kept_bytes(shape.num_hidden_layers, tokens, shape.hidden_size, model.dtype.itemsize)
    return Offload(model.device, model.dtype, kept) if offloads(settings, kept, capacity(model.device)) else None


def _arguments(settings: BranchConfig, folder: Path, seed: int, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1,
        per_device_train_batch_size=settings.traces,  # a whole step; the trainer splits it into batches
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        seed=seed % 2**32,
        use_cpu=device.type == "cpu",
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # the data loader yields lists
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with more, the Trainer would spread each batch over them
    return arguments


def _check_trained(model: PeftModel, settings: BranchConfig) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if not parameter.isfinite().all():
            raise DivergedError(f"{name} is not finite after the last step: lower its learning_rate")
    if not any(parameter.any() for name, parameter in trained.items() if "lora_B" in name):
        fp16 = "; in fp16 the first steps' gradients can overflow: give it more steps" * (model.dtype == torch.float16)
        raise DivergedError(
            f"no step changed the adapter: raise its learning_rate, now {settings.learning_rate:g}{fp16}"
        )


def _advice(settings: BranchConfig, longest: int, stays: bool) -> str:
    """What to do if memory runs out: overrides, as the command takes them, that change the branch by rounding at most,
    so that the run can resume with them. longest: tokens of the longest trace; stays: layers' inputs can be offloaded.
    """
    s = settings
    less: list[str] = []
    if s.batch_tokens and s.batch_tokens > longest:
        less += [f"branch.batch_tokens={max(longest, s.batch_tokens // 2)}"]
    if not s.batch_tokens and s.batch_size > 1:
        fewer = next(n for n in range(s.batch_size // 2, 0, -1) if s.traces % n == 0)
        less += [f"branch.batch_size={fewer}", f"branch.gradient_accumulation={s.traces // fewer}"]
    if not s.activation_checkpointing:
        less += ["branch.activation_checkpointing=true"]
    elif stays:
        less += ["branch.offload=on"]
    less += [f"branch.loss_chunk={max(256, s.loss_chunk // 2)}"] if s.loss_chunk > 256 else []
    resume = f"resume with {' '.join(less)}" if less else "free memory that other programs use, and resume"
    return f"{resume}, or start a new run with branch.max_length below {longest}, the longest trace"
