"""A model as transformers loads it, from the names, formats and shapes of its tensors alone."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.errors import UserError


@dataclass(frozen=True)
class Loaded:
    """What transformers makes of a checkpoint: the model, on no device, and what does not fit between them."""

    model: nn.Module
    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[str]


def load(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Loaded | None:
    """Load a checkpoint by from_pretrained, without the numbers; None where transformers has no such class.

    dtype: what to load it in; what it is stored in unless given.

    Errors: UserError for what cannot be loaded.

    >>> load(Checkpoint.open("Qwen/Qwen3-0.6B")).missing  # doctest: +SKIP
    frozenset()
    """
    import transformers

    kind: Any = getattr(transformers, (checkpoint.config.get("architectures") or ["?"])[0], None)
    if kind is None:
        return None
    tensors = {
        name: torch.empty(file.entries[name].shape, dtype=file.entries[name].dtype, device="meta")
        for name, file in checkpoint.files.items()
    }
    with without_warnings(), without_bars(), checkpoint.alone() as folder:
        try:
            model, said = kind.from_pretrained(
                None,
                config=cast("Any", transformers.AutoConfig).from_pretrained(folder),
                state_dict=tensors,
                dtype=dtype or "auto",
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as e:  # whatever a model's class, a package that it wants, or a conversion raises
            raise UserError(
                f"{checkpoint.name}: transformers cannot load it: {[*str(e).splitlines(), repr(e)][0]}"
            ) from e
    mismatched = {key for key, *_ in said["mismatched_keys"]}
    return Loaded(model, frozenset(said["missing_keys"]), frozenset(said["unexpected_keys"]), frozenset(mismatched))


@contextmanager
def without_bars() -> Generator[None]:
    """Hide the bar that transformers shows for loaded tensors; this package shows its own progress."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def without_warnings() -> Generator[None]:
    """Hide what transformers logs but errors."""
    from transformers.utils import logging

    said = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(said)
