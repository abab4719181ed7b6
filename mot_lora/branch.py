"""One branch: one teacher's adapter, trained on the frozen, quantized student."""

import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from mot_lora.config import BranchConfig, LoraConfig
from mot_lora.data import Example, collate
from mot_lora.errors import UserError
from mot_lora.loss import batch_loss
from mot_lora.merge import seed_for
from mot_lora.progress import Progress, silent
from mot_lora.records import TrainRecord

ADAPTER = "default"


def add_adapter(model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """Put the one LoRA adapter on the student, in fp32 whatever the base is in.

    Errors: UserError when the targets match no linear layer.
    """
    targets = lora.target_modules
    config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=cast("int", lora.alpha),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)  # on tied weights, which are refused below
        try:
            peft_model = get_peft_model(model, config, adapter_name=ADAPTER)
        except ValueError as e:
            raise UserError(f"lora.target_modules {targets!r}: {str(e).splitlines()[0]}") from e
    base: Any = peft_model.get_base_model()
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            inner = cast("Any", layer.get_base_layer())
            if not isinstance(inner, nn.Linear) or inner.weight is base.get_input_embeddings().weight:
                raise UserError(f"lora.target_modules {targets!r}: {name} is an embedding or tied to it; leave it out")
    return cast("PeftModel", peft_model)


def reset_adapter(model: PeftModel, seed: int) -> None:
    """Make the adapter new: A as LoRA starts it, uniform in +-1/sqrt(in), B = 0.

    A depends on (seed, module) alone, so that every branch of a round starts from the same A, on any device.
    """
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            a = cast("Tensor", cast("Any", layer.lora_A)[ADAPTER].weight)
            b = cast("Tensor", cast("Any", layer.lora_B)[ADAPTER].weight)
            generator = torch.Generator().manual_seed(seed_for(seed, name))
            bound = 1 / math.sqrt(a.shape[1])
            with torch.no_grad():
                a.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) * bound)
                b.zero_()


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: BranchConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> TrainRecord:
    """Train the model's adapter on the examples, in place, with a fresh optimizer and schedule.

    The loss of a step is the mean over all its trained tokens, - 1/n sum log p(token), in fp32 from chunked logits.
    AdamW; `settings` has the rest. This is the seam `train=` of `run`: any function with these arguments can take its
    place.

    >>> run(config, train=my_train)  # doctest: +SKIP
    """
    start = time.monotonic()
    device = model.device
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps or -1,
            num_train_epochs=settings.epochs or 1,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
            warmup_steps=settings.warmup,
            max_grad_norm=settings.max_grad_norm,
            weight_decay=settings.weight_decay,
            seed=seed % 2**32,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            logging_steps=1,
            logging_nan_inf_filter=False,  # it hides a loss that is not finite
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
        )
        if settings.activation_checkpointing:
            base: Any = model.get_base_model()
            # transformers 5.17 has only the older name
            getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
        trainer = BranchTrainer(
            chunk=settings.loss_chunk,
            model=model,
            args=arguments,
            train_dataset=cast("Any", list(examples)),
            data_collator=lambda batch: collate(batch, cast("int", tokenizer.pad_token_id)),
            callbacks=[_Watch(progress)],
        )
        trainer.remove_callback(PrinterCallback)  # progress has its seam
        result = trainer.train()
        model.eval()
    if not math.isfinite(result.training_loss):
        raise UserError(f"the loss became {result.training_loss}: lower branch.learning_rate, or raise branch.warmup")
    return TrainRecord(
        steps=result.global_step,
        tokens=trainer.trained_tokens,
        loss=result.training_loss,
        seconds=time.monotonic() - start,
    )


class BranchTrainer(Trainer):
    """transformers' Trainer with the chunked loss; it counts the tokens that it trained on."""

    def __init__(self, *, chunk: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chunk = chunk
        self.trained_tokens = 0
        # the Trainer then hands over the tokens of the whole step and leaves dividing by them to the loss
        self.model_accepts_loss_kwargs = True

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


class _Watch(TrainerCallback):
    """Hands each step on to the progress seam."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.progress("train", 0, state.max_steps)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        if logs and "loss" in logs:
            self.progress("train", state.global_step, state.max_steps, f"loss {logs['loss']:.3f}")
