"""The machine: its versions, GPUs, memory and disk, and what would stop a run on it."""

import os
import platform
import shutil
import warnings
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from mot_lora.planning.cards import host_limit, host_memory
from mot_lora.records import Record
from mot_lora.text import size
from mot_lora.training.driver import driver_version, why_unused

PACKAGES = ("mot-lora", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
OPTIONAL = ("triton", "liger-kernel", "flash-attn", "lm-eval")
LITTLE_MEMORY = 8 * 2**30  # bytes of host memory that loading, folding and offloading need
LITTLE_CACHE = 20 * 2**30  # bytes of disk; an 8B checkpoint takes 16 GiB
LITTLE_DISK = 2**28  # bytes; a branch of an 8B student takes some 180 MB


class GpuRecord(Record):
    """A GPU as torch sees it: bytes of memory, and whether it has native bf16."""

    name: str
    free: int
    total: int
    capability: str
    bf16: bool


class MachineRecord(Record):
    """The machine. Memory and disk are in bytes; `cuda` is torch's version of CUDA, None for a build without.

    `host_limit` is the memory of the machine or of its container; `broken` is CUDA's error if it does not start.
    """

    system: str
    versions: dict[str, str | None]
    driver: str | None
    cuda: str | None
    gpus: tuple[GpuRecord, ...] = ()
    broken: str | None = None
    hidden: bool = False
    bitsandbytes_cuda: bool = False
    host_free: int
    host_limit: int
    disk: dict[str, int]

    @property
    def stops(self) -> list[str]:
        """What would stop a run or keep it from using the GPU, each with what to do."""
        out = [f"{p} is not installed: pip install {p}" for p in PACKAGES[1:] if self.versions.get(p) is None]
        if self.broken:
            out.append(f"CUDA does not start ({self.broken}): check nvidia-smi")
        elif not self.gpus and self.driver and self.cuda is None:
            how = "install torch for CUDA, see https://pytorch.org/get-started"
            out.append(f"torch is built without CUDA, but there is a GPU (driver {self.driver}): {how}")
        elif not self.gpus and not self.hidden and (why := why_unused(self.driver, self.cuda)):
            out.append(why)
        if self.gpus and not self.bitsandbytes_cuda:
            update = "pip install -U bitsandbytes, or run with quantization=none"
            out.append(f"bitsandbytes has no library for CUDA {self.cuda}, which nf4 and int8 need: {update}")
        here, free = next(iter(self.disk.items()))
        if free < LITTLE_DISK:
            out.append(f"{here} has {size(free)} free on its disk: free more, or set `output` to another disk")
        return out

    @property
    def remarks(self) -> list[str]:
        """What to know when planning a run."""
        out = [f"{g.name} has no bf16: it computes in fp16" for g in self.gpus if not g.bf16]
        out += [
            f"other programs use {size(g.total - g.free)} of {size(g.total)} of {g.name}: stop them for longer traces"
            for g in self.gpus
            if g.free < 0.8 * g.total
        ]
        if self.hidden and not self.gpus:
            out.append("CUDA_VISIBLE_DEVICES hides the GPUs: a run computes on the CPU")
        elif not self.gpus and not self.stops:
            out.append("there is no GPU: a run computes on the CPU, in fp32")
        if self.host_free < LITTLE_MEMORY:
            out.append(
                f"{size(self.host_free)} of {size(self.host_limit)} of host memory are free: an 8B student needs "
                f"{size(LITTLE_MEMORY)}, and offloading more"
            )
        cache, free = list(self.disk.items())[-1]
        if free < LITTLE_CACHE:
            out.append(
                f"{cache} has {size(free)} free on its disk, and an 8B checkpoint takes 16 GiB: "
                "set HF_HOME to another disk"
            )
        return out


def doctor(root: Path = Path("/")) -> MachineRecord:
    """Examine this machine. `root` is the root of the file system.

    >>> doctor().stops  # doctest: +SKIP
    ['the NVIDIA driver 535.104.05 cannot run torch's CUDA 13.0: update it to 580 or newer']
    """
    gpus, broken = _gpus()
    return MachineRecord(
        system=platform.platform(),
        versions={"python": platform.python_version(), **{p: _version(p) for p in (*PACKAGES, *OPTIONAL)}},
        driver=driver_version(root),
        cuda=torch.version.cuda,
        gpus=gpus,
        broken=broken,
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"),
        bitsandbytes_cuda=_bitsandbytes_cuda(),
        host_free=host_memory(root),
        host_limit=host_limit(root),
        disk={str(p): shutil.disk_usage(_there(p)).free for p in (Path.cwd(), Path(HF_HUB_CACHE).expanduser())},
    )


def _gpus() -> tuple[tuple[GpuRecord, ...], str | None]:
    """The GPUs that torch can use; or why CUDA does not start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about a driver that is too old, which `stops` reports
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        return tuple(map(_gpu, range(count))), None
    except RuntimeError as e:
        return (), " ".join(str(e).split())[:160]


def _gpu(index: int) -> GpuRecord:
    with torch.cuda.device(index):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        return GpuRecord(
            name=torch.cuda.get_device_name(index),
            free=free,
            total=total,
            capability=f"{major}.{minor}",
            bf16=torch.cuda.is_bf16_supported(including_emulation=False),
        )


def _bitsandbytes_cuda() -> bool:
    try:
        from bitsandbytes.cextension import lib
    except Exception:  # whatever a broken installation raises
        return False
    return bool(getattr(type(lib), "compiled_with_cuda", False))  # of the class: an instance has every attribute


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _there(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())
