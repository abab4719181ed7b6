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
from mot_lora.training.savepoint import SCHEDULE, discard, newest
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
    traces stand by length. AdamW; `settings` has the rest. With a `job`, its state is kept there every `save_steps`, at
    the end and when a signal comes, and training goes on from it: to the same adapter, byte for byte, as without a
    stop. This is the seam `train=` of `run`: any function with these arguments can take its place.

    Errors: DivergedError for a loss that is not finite or worse than guessing; UserError when memory runs out, and for
    what `uses_liger` finds.

    >>> run(config, train=my_train)  # doctest: +SKIP
    """
    start = time.monotonic()
    with ExitStack() as stack:
        folder = job.state if job else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        found = newest(folder)
        # its optimizer would go on with the old one, or it has learned by another schedule
        if found and (found[1].learning_rate, found[1].schedule) != (settings.learning_rate, SCHEDULE):
            discard(folder.glob("checkpoint-*"))
            found = None
        set_checkpoints(model.get_base_model(), settings)
        stack.enter_context(fast_layers(model, settings))
        shield = stack.enter_context(Shield())
        offload = _offload(model, settings, examples)
        stays = model.device.type == "cuda" and offload is None  # what host memory could take
        trainer = BranchTrainer(
            settings=settings,
            pad_id=cast("int", tokenizer.pad_token_id),
            offload=offload,
            model=model,
            args=_arguments(settings, folder, seed, model.device),
            train_dataset=cast("Any", list(examples)),
        )
        stack.callback(_let_go, trainer, model)
        del offload
        trainer.remove_callback(PrinterCallback)  # progress has its seam
        watch = Watch(trainer, shield, progress, start, bound=math.log(model.config.vocab_size))
        for name in settings.report_to if job else ():
            track = Track(name, cast("Job", job))
            trainer.add_callback(track)  # before the watch, which ends the training: no step goes unlogged
            stack.callback(track.end)
        trainer.add_callback(watch)
        if found:
            trainer.trained_tokens, watch.seconds = found[1].tokens, found[1].seconds
        stack.enter_context(enough_memory("", _advice(settings, max(map(len, examples)), stays)))
        try:
            trainer.go_on(found[0] if found else None)
            _check_trained(model, settings)
            if job:
                trainer.keep()
        except INTERRUPTS:
            if job and watch.restore:
                watch.restore()
                trainer.keep()
            raise
        model.eval()
        losses = trainer.losses
        return TrainRecord(
            steps=trainer.state.global_step,
            tokens=trainer.trained_tokens,
            loss=sum(losses) / len(losses),
            seconds=watch.spent,
            losses=tuple(losses),
        )


def set_checkpoints(base: Any, settings: BranchConfig) -> None:
    """Have a student keep only its layers' inputs for the backward pass, or all, as `activation_checkpointing` says.

    Without dropout a layer that is computed again needs no random state, which takes a copy from the GPU to keep.
    """
    # transformers 5.17 has only the older names
    if not settings.activation_checkpointing:
        getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()
        return
    dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in base.modules())
    dropout |= any(value for name, value in vars(base.config.get_text_config()).items() if name.endswith("dropout"))
    how = {"use_reentrant": False, "preserve_rng_state": dropout}
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)(how)
    base.disable_input_require_grads()  # for reentrant checkpoints alone; it would hold on to the first input


@contextmanager
def fast_layers(model: PeftModel, settings: BranchConfig) -> Generator[None]:
    """Around training: each LoRA layer as one product, no fp32 copies of what layers are given, Liger's kernels."""
    with inputs_as_they_are(model), one_product(model), ExitStack() as stack:
        if uses_liger(settings.liger, model.device.type == "cuda"):
            stack.enter_context(fused(model))
        yield


def _let_go(trainer: BranchTrainer, model: PeftModel) -> None:
    """Free what training held: the optimizer's state, gradients, pinned memory. The Trainer refers to itself."""
    model.zero_grad()
    if isinstance(trainer.optimizer, torch.optim.Optimizer):
        trainer.optimizer.state.clear()  # with a gradient scaler, accelerate has the optimizer refer to itself
    trainer.accelerator.free_memory()
    vars(trainer).clear()
    if model.device.type == "cuda":
        torch.accelerator.empty_host_cache()


def _offload(model: PeftModel, settings: BranchConfig, examples: Sequence[Example]) -> Offload | None:
    """What keeps layers' inputs in host memory, where the longest batch calls for it."""
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
        per_device_train_batch_size=settings.traces,  # which the trainer cuts into what is computed at once
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        seed=seed % 2**32,
        use_cpu=device.type == "cpu",
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it hides a loss that is not finite
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # it hands on lists
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # where there are more, the Trainer would spread each batch over them
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
    """What to do where memory runs out: settings that leave the branch as it is but for rounding, as the command takes
    them, so that the run can go on with them; `longest` trace in tokens; stays: layers' inputs could go to host memory.
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
    go_on = f"go on with {' '.join(less)}" if less else "free memory that others use, and go on"
    return f"{go_on}, or begin another run with branch.max_length below {longest}, the longest trace"
