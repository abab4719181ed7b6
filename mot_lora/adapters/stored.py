"""An adapter as it is stored: its config, in PEFT's names, its tensors, and the base that some of them need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mot_lora.merging.lowrank import Update

CONFIG_FILE = "adapter_config.json"
UNGATHERED = "it was saved empty, as DeepSpeed ZeRO-3 does with what it has not gathered: save it again"

Read = Callable[[str], Tensor]
"""A tensor by its key."""
Maker = Callable[[Read], Update]
"""An update, made of tensors that are read when it is."""


class Base(Protocol):
    """What some adapters need of their base: a parameter's values as they are multiplied with, and its modules."""

    @property
    def tied(self) -> Mapping[str, str]: ...
    def parameter(self, module: str) -> str: ...
    def module(self, name: str) -> nn.Module: ...
    def weight(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor: ...


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's config and tensors, wherever they come from.

    `label` is what errors name; `open_base` gives the base when an update first needs it; `scaling` is that of each
    module, where it is known without the config.
    """

    label: str
    config: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]
    read: Read
    open_base: Callable[[], Base]
    scaling: Callable[[str], float] | None = None

    @cached_property
    def base(self) -> Base:
        return self.open_base()
