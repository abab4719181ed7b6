"""How a checkpoint's tensors hold a model's parameters: transposed, tied, or stacked experts in pieces."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from mot_lora.checkpoint import Checkpoint
from mot_lora.errors import UserError


@dataclass(frozen=True)
class Layout:
    """A checkpoint as transformers understands it: where an update, which is [out, in], goes.

    The model itself, without weights, is built only where names and shapes leave a doubt: it takes seconds.
    """

    checkpoint: Checkpoint

    @cached_property
    def model(self) -> nn.Module:
        """The model that the checkpoint's config describes, on no device."""
        import transformers
        from transformers.utils import logging

        names: list[str] = self.checkpoint.config.get("architectures") or ["?"]
        kind: Any = getattr(transformers, names[0], None)
        if kind is None:
            raise UserError(f"{self.checkpoint.name}: transformers has no `{names[0]}`, so its layers cannot be told")
        said = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            config = transformers.AutoConfig.from_pretrained(self.checkpoint.path)
            with torch.device("meta"):
                return kind(config)
        finally:
            logging.set_verbosity(said)

    def module(self, name: str) -> nn.Module:
        """A module of the model. UserError when there is none of that name."""
        try:
            return self.model.get_submodule(name)
        except AttributeError as e:
            raise UserError(
                f"{self.checkpoint.name}: has no {name}, which an adapter updates; is it their base?"
            ) from e

    @property
    def tied(self) -> Mapping[str, str]:
        """Parameters that share another's values: `lm_head.weight` -> `model.embed_tokens.weight`."""
        if not self.checkpoint.config.get("tie_word_embeddings", True):
            return {}
        return cast("dict[str, str]", getattr(self.model, "all_tied_weights_keys", None) or {})

    def is_plain(self, shapes: Mapping[str, torch.Size]) -> bool:
        """Whether these updates are surely of linear layers stored as they are, [out, in], and tied to nothing."""
        shown = False
        for module, shape in shapes.items():
            stored = self.stored_shape(f"{module}.weight")
            inside = any(part.isdigit() for part in module.split("."))  # of a layer: neither embedding nor head
            if stored is None or stored != tuple(shape) or not inside:
                return False
            shown = shown or (len(shape) == 2 and shape[0] != shape[1])  # a square would not show a transpose
        return shown

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a stored tensor, None when there is none of that name."""
        file = self.checkpoint.files.get(name)
        return file.entries[name].shape if file else None

    def parameter(self, module: str) -> str:
        """The full name of what a module's update belongs to: its weight, unless it is named in full."""
        known = self.parameters
        for name in (f"{module}.weight", module):
            if name in known:
                return name
        what = f"{module}: its layer has no bias to take the adapter's up" if module.endswith(".bias") else module
        raise UserError(f"{self.checkpoint.name}: has no {what}, which an adapter updates; is it their base?")

    def place(self, module: str, delta: Tensor) -> dict[str, Tensor]:
        """A module's update in pieces, by the stored tensor that each belongs to and in its shape."""
        name = self.parameter(module)
        owner = self.module(name.rpartition(".")[0])
        if delta.ndim == 3 and getattr(owner, "is_transposed", False):
            delta = delta.mT
        elif delta.ndim == 2 and type(owner).__name__ == "Conv1D":
            delta = delta.T
        if name in self.checkpoint.files or name in self.tied:
            return {name: delta}
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(cast("Any", self.model), {name: delta})

    def weight(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A module's weight as it is multiplied with, [out, in]."""
        name = self.parameter(module)
        name = self.tied.get(name, name)
        if name not in self.checkpoint.files:
            raise UserError(f"{self.checkpoint.name}: {name} is stored in pieces; an adapter that needs it is refused")
        weight = self.checkpoint.tensor(name).to(dtype)
        turned = weight.ndim == 2 and type(self.module(name.rpartition(".")[0])).__name__ == "Conv1D"
        return weight.T if turned else weight

    @cached_property
    def parameters(self) -> set[str]:
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
