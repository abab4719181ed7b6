"""The one LoRA adapter on the student: adding it, resetting it for each branch, and loading its weights."""

import math
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from mot_lora.config import LoraConfig
from mot_lora.errors import UserError
from mot_lora.merging.seeds import seed_for

ADAPTER = "default"


def add_adapter(model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """Add the one LoRA adapter to the student, in fp32 whatever the dtype of the base.

    Errors: UserError if the targets match no linear layer.
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
    head = model.get_output_embeddings()
    linear = sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)  # on tied weights, which are refused below
        try:
            peft_model = get_peft_model(model, config, adapter_name=ADAPTER)
        except ValueError as e:
            why = "match no layer" if "not found" in str(e) else f"cannot be used ({' '.join(str(e).split())[:120]})"
            raise UserError(f"lora.target_modules {targets!r} {why}; the student has {', '.join(linear)}") from e
    written: Any = peft_model.peft_config[ADAPTER]
    if not isinstance(written.target_modules, str):  # PEFT has a set, whose order in the file would vary by process
        written.target_modules = sorted(written.target_modules or ())
    base: Any = peft_model.get_base_model()
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            inner = cast("Any", layer.get_base_layer())
            if not isinstance(inner, nn.Linear):
                what = f"{name} is not a linear layer but {type(inner).__name__}"
                raise UserError(f"lora.target_modules {targets!r}: {what}; choose from [{','.join(linear)}]")
            if inner.weight is base.get_input_embeddings().weight:
                raise UserError(f"lora.target_modules {targets!r}: {name} is tied to the embedding; leave it out")
    return cast("PeftModel", peft_model)


def check_targets(path: Path, lora: LoraConfig, trust_remote_code: bool = False) -> None:
    """Add the adapter to a student without weights, to find invalid targets before any weights are read.

    Errors: UserError as in `add_adapter`, and for a model that transformers does not know.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            add_adapter(model, lora)
    except UserError:
        raise
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as e:
        hint = "" if trust_remote_code else "; a model's own code runs only with trust_remote_code: true"
        raise UserError(f"{path}: cannot be loaded as a causal language model ({_line(e)}){hint}") from e


def reset_adapter(model: PeftModel, seed: int) -> None:
    """Reset the adapter to LoRA's initial weights: A uniform in +-1/sqrt(in), B = 0.

    A depends only on (seed, module), so that every branch of a round starts from the same A, on any device.
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


def load_weights(model: PeftModel, folder: Path) -> None:
    """Load a saved branch's weights into the adapter."""
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), ADAPTER)


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
