"""The model that a checkpoint's config describes, built without weights."""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.checkpoints.loading import without_warnings

TEXT = re.compile(r"^(?:(?:model|thinker|language_model|text_model|llm)\.)+")
"""What a text model's names begin with, alone and within models that also see or hear."""


@dataclass(frozen=True)
class Architecture:
    """A model without weights, what its text model is called, and what it ties. It takes seconds to build."""

    checkpoint: Checkpoint

    @cached_property
    def model(self) -> nn.Module | None:
        """The model that the checkpoint's config describes, on no device; None where transformers has no such class."""
        import transformers

        names: list[str] = self.checkpoint.config.get("architectures") or []
        kind: Any = getattr(transformers, names[0], None) if names else transformers.AutoModelForCausalLM
        if kind is None:
            return None
        with without_warnings(), torch.device("meta"):
            config = cast("Any", transformers.AutoConfig).from_pretrained(self.checkpoint.path)
            return kind(config) if names else kind.from_config(config)

    @property
    def tied(self) -> dict[str, str]:
        """The parameters that the class ties to others where its config says so."""
        return cast("dict[str, str]", getattr(self.model, "all_tied_weights_keys", None) or {})

    def untie(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config.json that says of head and embedding that they are apart, on every level that has them.

        Unchanged where the model's class ties them whatever it says (T5): those it leaves apart where they differ.
        """
        if self.model is None:
            return config
        said: Any = self.model.config
        apart = _untied(config, said)
        return config if cast("Any", type(said)).from_dict(deepcopy(apart)).tie_word_embeddings else apart

    def text_names(self, name: str) -> Iterator[str]:
        """What the text model's part of this name may be called here."""
        model: Any = self.model
        rest = TEXT.sub("", name)
        if model is None:
            return
        if rest.startswith("lm_head."):
            part, rest = model.get_output_embeddings(), rest.removeprefix("lm_head.")
        else:
            part = model.get_decoder()
        for where in (name for name, module in model.named_modules() if name and module is part):
            yield from (f"{where}.{rest}", f"{where}.model.{rest}")

    def is_text(self, parameter: str) -> bool:
        """Whether a parameter is of the text model, and not of what sees or hears beside it."""
        return not self._text or parameter.startswith(self._text)

    @cached_property
    def _text(self) -> tuple[str, ...]:
        """What the names of the text model's parameters and of its head begin with, where it is not all there is."""
        model: Any = self.model
        if model is None or model.config.is_encoder_decoder:
            return ()
        parts = (model.get_decoder(), model.get_output_embeddings())
        return tuple(f"{n}." for n, m in model.named_modules() if n and any(m is part for part in parts))


def _untied(config: dict[str, Any], said: Any) -> dict[str, Any]:
    """A config.json without ties, on each level on which the config that was made of it has one."""
    inner = {
        key: _untied(cast("dict[str, Any]", config[key]), getattr(said, key))
        for key in said.sub_configs
        if isinstance(config.get(key), dict)
    }
    tied = "tie_word_embeddings" in config or getattr(said, "tie_word_embeddings", False)
    return {**config, **inner, **({"tie_word_embeddings": False} if tied else {})}
