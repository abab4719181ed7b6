"""Graphics cards: their memory, and how fast they compute and read it; and the host's memory."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import psutil
import torch

from mot_lora.errors import UserError
from mot_lora.training.offload import capacity


@dataclass(frozen=True)
class Card:
    """A card or a CPU: GiB of memory as CUDA reports it, which is less than advertised, and the maker's TFLOP/s and
    GB/s, if known.

    TFLOP/s are of dense 16-bit products accumulated in fp32: bf16, or fp16 if the card has no bf16. `also` lists other
    names that CUDA reports for it.
    """

    name: str
    gib: float
    tflops: float | None = None
    gbps: float | None = None
    bf16: bool = True
    is_gpu: bool = True
    also: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return int(self.gib * 2**30)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which a student computes there."""
        if not self.is_gpu:
            return torch.float32
        return torch.bfloat16 if self.bf16 else torch.float16


CARDS = (
    Card("T4", 14.6, 65, 320, bf16=False),
    Card("RTX 2080 Ti", 10.7, 53.8, 616, bf16=False),
    Card("RTX 3060", 11.8, 25.5, 360),
    Card("RTX 3060 Ti", 7.7, 32.4, 448),
    Card("RTX 3070", 7.7, 40.6, 448),
    Card("RTX 3070 Ti", 7.7, 43.5, 608),
    Card("RTX 3080", 9.7, 59.5, 760),
    Card("RTX 3080 Ti", 11.7, 68.2, 912),
    Card("RTX 3090", 23.7, 71, 936),
    Card("RTX 3090 Ti", 23.6, 80, 1008),
    Card("RTX 4060", 7.6, 30.2, 272),
    Card("RTX 4060 Laptop", 7.6, 29.1, 256),
    Card("RTX 4060 Ti", 15.6, 44, 288),
    Card("RTX 4070", 11.6, 58.3, 504),
    Card("RTX 4070 Laptop", 7.6, 40.1, 256),
    Card("RTX 4070 SUPER", 11.6, 71, 504),
    Card("RTX 4070 Ti", 11.6, 80.2, 504),
    Card("RTX 4070 Ti SUPER", 15.6, 88.2, 672),
    Card("RTX 4080", 15.7, 97.5, 717),
    Card("RTX 4080 Laptop", 11.6, 67.8, 432),
    Card("RTX 4080 SUPER", 15.6, 104.5, 736),
    Card("RTX 4090", 23.6, 165, 1008),
    Card("RTX 4090 Laptop", 15.6, 85.8, 576),
    Card("RTX 5070", 11.5, 61.7, 672),
    Card("RTX 5070 Ti", 15.5, 87.9, 896),
    Card("RTX 5080", 15.5, 112.6, 960),
    Card("RTX 5090", 31.4, 209, 1792),
    Card("L4", 22.0, 121, 300),
    Card("L40S", 44.4, 362, 864),
    Card("A10", 22.0, 125, 600),
    Card("A10G", 22.0, 70, 600),
    Card("RTX A6000", 47.5, 155, 768),
    Card("A100 40GB", 39.4, 312, 1555, also=("A100-SXM4-40GB", "A100-PCIE-40GB")),
    Card("A100", 79.2, 312, 2039, also=("A100-SXM4-80GB",)),
    Card("A100 80GB PCIe", 79.2, 312, 1935),
    Card("H100", 79.1, 989, 3350, also=("H100 80GB HBM3",)),
    Card("H100 PCIe", 79.1, 756, 2000),
    Card("H100 NVL", 93.1, 835, 3938),
    Card("H200", 139.8, 989, 4800),
)
CONTEXT = 600 * 2**20  # bytes of the CUDA context and the libraries' kernels in a process
USUAL = "RTX 3090"  # planned for if there is no GPU and none is named


def find_card(name: str) -> Card:
    """A card by its name, in any case and with or without its maker.

    Errors: UserError for a card that is not in the list.

    >>> find_card("rtx4090").gib
    23.6
    """
    if found := like(name):
        return found
    known = {_plain(card.name): card for card in CARDS}
    near = difflib.get_close_matches(_plain(name), known, 1, 0.5)
    hint = f"did you mean {known[near[0]].name}?" if near else f"known cards: {', '.join(c.name for c in CARDS)}"
    raise UserError(f"`{name}` is not a known card; plan for a listed one, with its memory from --gpu-gib; {hint}")


def this_card(device: torch.device) -> Card:
    """The card or CPU that this process computes on; a GPU's memory is without what other processes use.

    A card's speed is known only if its full name matches: a variant may have half the cores.
    """
    if device.type != "cuda":
        return Card("CPU", host_limit() / 2**30, bf16=False, is_gpu=False)
    name = torch.cuda.get_device_name(device)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    free, total = torch.cuda.mem_get_info(device)
    others = max(total - free - torch.cuda.memory_reserved(device) - CONTEXT, 0)
    found = like(name) or Card(name, 0)
    return replace(found, name=name, gib=min(capacity(device), total - others) / 2**30, bf16=native)


def like(name: str) -> Card | None:
    """The card of this name, as users or CUDA write it.

    >>> like("NVIDIA A100-SXM4-40GB").name, like("NVIDIA GeForce RTX 4090 D")
    ('A100 40GB', None)
    """
    return next((card for card in CARDS if _plain(name) in map(_plain, (card.name, *card.also))), None)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|gpu|[^a-z0-9]", "", name.lower())


# --- the host's memory ---------------------------------------------------------------------------


def host_memory(root: Path = Path("/")) -> int:
    """The bytes of host memory that this process can allocate: available in the system, and below the limit of its
    container, at which the system would kill it. `root` is the root of the file system.
    """
    left = [limit - used for limit, used in _groups(root)]
    return max(min([psutil.virtual_memory().available, *left]), 0)


def host_limit(root: Path = Path("/")) -> int:
    """The bytes of host memory of the machine, or the limit of this process's container, if lower."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _groups(root))])


# by version of control groups: mount points, files of limit and usage, and the key of the file cache in memory.stat
VERSIONS = {
    1: (("sys/fs/cgroup/memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: (("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file"),
}


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of each control group of this process and its usage without reclaimable cache, in bytes."""
    if not (groups := root / "proc/self/cgroup").exists():
        return
    for line in _text(groups).splitlines():  # number:controllers:/path; version 2 lists no controllers
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounts, most, current, cache = VERSIONS[1 if controllers else 2]
        place = PurePosixPath(path.lstrip("/"))
        # a container sees only its own group, at the top, whatever its name outside
        for folder in (root / mount / group for mount in mounts for group in (place, *place.parents)):
            if (folder / most).exists() and (limit := _text(folder / most)) != "max":
                rows = (row.split() for row in _text(folder / "memory.stat").splitlines())
                cached = next((int(count) for key, count in rows if key == cache), 0)
                yield int(limit), int(_text(folder / current)) - cached


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip()
