"""Graphics cards: their memory, and how fast they compute and read it."""

import difflib
import re
from dataclasses import dataclass, replace

import psutil
import torch

from mot_lora.errors import UserError
from mot_lora.offload import capacity


@dataclass(frozen=True)
class Card:
    """A card, or a CPU: GiB of memory as CUDA counts it, which is less than is written on the box, and TFLOP/s and GB/s
    as its maker says, where they are known.

    TFLOP/s are dense products of bf16 numbers summed in fp32; of fp32 ones where the card has no bf16.
    """

    name: str
    gib: float
    tflops: float | None = None
    gbps: float | None = None
    bf16: bool = True
    is_gpu: bool = True

    @property
    def bytes(self) -> int:
        return int(self.gib * 2**30)


CARDS = (
    Card("T4", 14.6, 8.1, 320, bf16=False),
    Card("RTX 3060", 11.8, 25.5, 360),
    Card("RTX 4060 Ti", 15.6, 44, 288),
    Card("RTX 4080", 15.7, 97.5, 717),
    Card("RTX 5080", 15.5, 112.6, 960),
    Card("L4", 22.0, 121, 300),
    Card("A10", 22.0, 125, 600),
    Card("RTX 3090", 23.7, 71, 936),
    Card("RTX 4090", 23.6, 165, 1008),
    Card("RTX 5090", 31.4, 209, 1792),
    Card("RTX A6000", 47.5, 155, 768),
    Card("A100", 79.2, 312, 2039),
    Card("H100", 79.1, 989, 3350),
    Card("H200", 139.8, 989, 4800),
)
CONTEXT = 600 * 2**20  # bytes that CUDA takes for itself in a process, and libraries for their kernels
USUAL = "RTX 3090"  # what is planned for where there is no GPU and none is named


def find_card(name: str) -> Card:
    """A card by its name, in any case and with or without its maker.

    Errors: UserError for one that is not in the list.

    >>> find_card("rtx4090").gib
    23.6
    """
    known = {_plain(card.name): card for card in CARDS}
    if (key := _plain(name)) in known:
        return known[key]
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean {known[near[0]].name}?" if near else f"known are {', '.join(c.name for c in CARDS)}"
    raise UserError(f"no card is known as `{name}`, give the memory of another with --gpu-gib; {hint}")


def this_card(device: torch.device) -> Card:
    """The card, or the CPU, that this process computes on, and its memory; of a GPU's what others have is taken off."""
    if device.type != "cuda":
        return Card("CPU", psutil.virtual_memory().total / 2**30, bf16=False, is_gpu=False)
    name = torch.cuda.get_device_name(device)
    like = max((c for c in CARDS if _plain(c.name) in _plain(name)), key=lambda c: len(c.name), default=Card("", 0))
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    free, total = torch.cuda.mem_get_info(device)
    others = max(total - free - torch.cuda.memory_reserved(device) - CONTEXT, 0)
    return replace(like, name=name, gib=min(capacity(device), total - others) / 2**30, bf16=native)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def host_memory() -> int:
    """The bytes of host memory that are free, or can be made so."""
    return psutil.virtual_memory().available
