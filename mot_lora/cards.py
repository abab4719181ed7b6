"""Graphics cards: their memory, and how fast they compute and read it."""

import difflib
import re
from dataclasses import dataclass, replace

import torch

from mot_lora.errors import UserError
from mot_lora.offload import capacity


@dataclass(frozen=True)
class Card:
    """A card as its maker describes it, or a CPU: GiB of memory, and TFLOP/s and GB/s where they are known.

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
    Card("T4", 14.7, 8.1, 320, bf16=False),
    Card("RTX 3060", 12, 25.5, 360),
    Card("RTX 4060 Ti", 16, 44, 288),
    Card("RTX 4080", 16, 97.5, 717),
    Card("RTX 5080", 16, 112.6, 960),
    Card("L4", 22.5, 121, 300),
    Card("A10", 22.5, 125, 600),
    Card("RTX 3090", 24, 71, 936),
    Card("RTX 4090", 24, 165, 1008),
    Card("RTX 5090", 32, 209, 1792),
    Card("RTX A6000", 48, 155, 768),
    Card("A100", 80, 312, 2039),
    Card("H100", 80, 989, 3350),
    Card("H200", 141, 989, 4800),
)
USUAL = "RTX 3090"  # what is planned for where there is no GPU and none is named


def find_card(name: str) -> Card:
    """A card by its name, in any case and with or without its maker.

    Errors: UserError for one that is not in the list.

    >>> find_card("rtx4090").gib
    24
    """
    known = {_plain(card.name): card for card in CARDS}
    if (key := _plain(name)) in known:
        return known[key]
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean {known[near[0]].name}?" if near else f"known are {', '.join(c.name for c in CARDS)}"
    raise UserError(f"no card is known as `{name}`, give the memory of another with --gpu-gib; {hint}")


def this_card(device: torch.device) -> Card:
    """The card, or the CPU, that this process computes on, with the memory that it may use."""
    if device.type != "cuda":
        return Card("CPU", _host_gib(), bf16=False, is_gpu=False)
    name = torch.cuda.get_device_name(device)
    like = max((c for c in CARDS if _plain(c.name) in _plain(name)), key=lambda c: len(c.name), default=Card("", 0))
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(like, name=name, gib=capacity(device) / 2**30, bf16=native)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def _host_gib() -> float:
    import psutil

    return psutil.virtual_memory().total / 2**30
