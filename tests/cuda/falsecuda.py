"""Gives a CPU build of torch one CUDA GPU: what torch asks CUDA for, answered by falsecuda.cpp.

Import nothing of torch before `load`; import bitsandbytes, which looks for a real CUDA library, before `install`.
"""

import ctypes
import fcntl
import hashlib
import importlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("falsecuda.cpp")


@dataclass(frozen=True)
class Card:
    """What the false GPU says that it is; `count` of them are seen, and the first one has memory."""

    name: str = "NVIDIA GeForce RTX 4090"
    gib: float = 24
    capability: str = "8.9"
    count: int = 1

    @property
    def bytes(self) -> int:
        return int(self.gib * 2**30)

    @property
    def version(self) -> tuple[int, int]:
        major, _, minor = self.capability.partition(".")
        return int(major), int(minor)

    def options(self) -> list[str]:
        """What run.py is told."""
        said = {"name": self.name, "gib": self.gib, "capability": self.capability, "count": self.count}
        return [word for key, value in said.items() for word in (f"--{key}", str(value))]


# --- building ------------------------------------------------------------------------------------


def _torch() -> tuple[Path, dict[str, Any]]:
    """torch's folder and what it says of its build, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    folder = Path(str(spec.origin)).parent
    return folder, runpy.run_path(str(folder / "version.py"))


def why_not() -> str | None:
    """What is missing here for a false GPU, if anything."""
    if _torch()[1]["cuda"]:
        return "torch is a CUDA build"
    if not shutil.which("g++"):
        return "there is no g++"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "there are no Python headers"
    return None


def build() -> Path:
    """The library, compiled where that was not done yet for these sources and this torch; safe to be called at once."""
    torch, version = _torch()
    key = hashlib.sha256(SOURCE.read_bytes() + version["__version__"].encode() + str(torch).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mot-lora"
    library = cache / f"falsecuda-{key}.so"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "falsecuda.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            made = cache / f"falsecuda-{os.getpid()}.tmp"
            headers = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
            command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", SOURCE, "-o", made, *(f"-I{h}" for h in headers)]
            command += [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{SOURCE.name} does not compile:\n{done.stderr[-4000:]}")
            made.rename(library)
    return library


# --- the device ----------------------------------------------------------------------------------

_COUNTS = ("total", "held", "held_peak", "requested", "requested_peak", "pinned", "pinned_peak")
MOST = 8  # cards that are seen at once
_lib: Any = None
_card: Card | None = None


def load(library: Path) -> None:
    """Load the library: before torch, which looks for CUDA's part while it is imported."""
    global _lib
    lib = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    for name in _COUNTS:
        getattr(lib, f"false_{name}").restype = ctypes.c_size_t
    for name in ("violations", "late_copies", "ooms", "stream"):
        getattr(lib, f"false_{name}").restype = ctypes.c_int64
    lib.false_reports.restype = ctypes.c_char_p
    lib.false_fraction.restype = ctypes.c_double
    lib.false_set_fraction.argtypes = [ctypes.c_double]
    lib.false_set_stream.argtypes = [ctypes.c_int64]
    lib.false_set_total.argtypes = [ctypes.c_size_t]
    lib.false_fail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
    lib.false_start.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    _lib = lib


def installed() -> Card | None:
    """The false GPU of this process."""
    return _card


def install(card: Card) -> None:
    """Let torch find it: what a CUDA build has in torch._C, with torch's own Python above."""
    import torch
    import torch.cuda.streams as streams

    c: Any = torch._C
    lib = _lib

    def now() -> Card:
        assert _card
        return _card

    def properties_of(_: int) -> Any:
        major, minor = now().version
        said = {"multi_processor_count": 128, "warp_size": 32, "gcnArchName": "", "uuid": "false"}
        return SimpleNamespace(name=now().name, major=major, minor=minor, total_memory=lib.false_total(), **said)

    def exchange(index: int) -> int:
        before = int(lib.false_device())
        lib.false_set_device(index)
        return before

    def stats(_: int) -> Mapping[str, Any]:
        def both(current: int, peak: int) -> Mapping[str, Mapping[str, int]]:
            return {"all": {"current": current, "peak": peak, "allocated": 0, "freed": 0}}

        held = both(lib.false_held(), lib.false_held_peak())
        return {
            "allocated_bytes": held,
            "reserved_bytes": held,
            "active_bytes": held,
            "requested_bytes": both(lib.false_requested(), lib.false_requested_peak()),
            "num_alloc_retries": lib.false_ooms(),
            "num_ooms": lib.false_ooms(),
        }

    class StreamBase(torch.Stream):
        def __new__(cls, priority: int = 0, **which: int) -> "StreamBase":
            if which:
                return super().__new__(cls, **which)
            return super().__new__(cls, device=torch.device("cuda", lib.false_device()), priority=priority)

        @property
        def cuda_stream(self) -> int:
            return self.stream_id

    class EventBase(torch.Event):
        def __new__(cls, **settings: bool) -> "EventBase":
            settings.pop("external", None)
            return super().__new__(cls, device="cuda", **settings)

        @property
        def cuda_event(self) -> int:
            return self.event_id

    def stream_of(index: int) -> tuple[int, int, int]:
        return lib.false_stream(), index, 1

    answers: Mapping[str, Any] = {
        "_cuda_getDeviceCount": lambda: now().count,
        "_cuda_init": lambda: None,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_getDevice": lib.false_device,
        "_cuda_setDevice": lib.false_set_device,
        "_cuda_exchangeDevice": exchange,
        "_cuda_maybeExchangeDevice": exchange,
        "_cuda_synchronize": lib.false_synchronize,
        "_cuda_ipc_collect": lambda: None,
        "_cuda_emptyCache": lambda: None,
        "_accelerator_emptyHostCache": lambda: None,
        "_cuda_memoryStats": stats,
        "_cuda_resetPeakMemoryStats": lambda _: lib.false_reset_peak(),
        "_cuda_resetAccumulatedMemoryStats": lambda _: lib.false_reset_ooms(),
        "_cuda_getMemoryFraction": lambda _: lib.false_fraction(),
        "_cuda_setMemoryFraction": lambda fraction, _: lib.false_set_fraction(fraction),
        "_cuda_getCurrentStream": stream_of,
        "_cuda_getDefaultStream": lambda index: (0, index, 1),
        "_cuda_getCurrentRawStream": lambda _: lib.false_stream(),
        "_cuda_setStream": lambda stream_id, **_: lib.false_set_stream(stream_id),
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_cuda_getArchFlags": lambda: "sm_" + now().capability.replace(".", ""),
        "_cuda_canDeviceAccessPeer": lambda *_: False,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_CudaStreamBase": StreamBase,
        "_CudaEventBase": EventBase,
        "_CudaDeviceProperties": SimpleNamespace,
    }
    for name, answer in answers.items():
        setattr(c, name, answer)

    cuda: Any = torch.cuda
    importlib.reload(streams)  # its classes have their bases from torch._C
    cuda.Stream, cuda.Event, cuda.ExternalStream = streams.Stream, streams.Event, streams.ExternalStream
    cuda._exchange_device = cuda._maybe_exchange_device = exchange
    cuda._get_device_properties = properties_of
    cuda._CudaDeviceProperties = SimpleNamespace
    cuda._cudart = SimpleNamespace(
        cudaMemGetInfo=lambda _: (max(0, lib.false_total() - lib.false_held()), lib.false_total()),
        cudaError=SimpleNamespace(success=0),
    )
    cuda._device_count_nvml = lambda: -1
    cuda.is_current_stream_capturing = lambda: False
    cuda._queued_calls.clear()  # they check the build against the card
    torch.backends.cuda.is_built = lambda: True
    become(card)
    _generators[:] = [torch.Generator(f"cuda:{i}") for i in range(MOST)]  # those that all operations draw from
    become(card)
    cuda.init()


_generators: list[Any] = []


def become(card: Card) -> None:
    """Be another card from here on."""
    global _card
    import torch

    _card = card
    _lib.false_start(card.bytes, *card.version, card.count)
    cuda: Any = torch.cuda
    cuda._cached_device_count = None
    cuda.default_generators = tuple(_generators[: card.count])


# --- what a test asks ------------------------------------------------------------------------------


def held() -> int:
    """The bytes that tensors have on the device."""
    return int(_lib.false_requested())


def peak() -> int:
    """The most of them since `torch.cuda.reset_peak_memory_stats`."""
    return int(_lib.false_requested_peak())


def pinned() -> int:
    """The bytes of pinned host memory."""
    return int(_lib.false_pinned())


def pinned_peak() -> int:
    """The most of them."""
    return int(_lib.false_pinned_peak())


def late_copies() -> int:
    """How many copies on side streams were held back until somebody waited."""
    return int(_lib.false_late_copies())


def violations() -> int:
    """How often a GPU would have read or written what another stream was not done with, or what was given back."""
    return int(_lib.false_violations())


def reports() -> str:
    """The first violations, in words."""
    return str(_lib.false_reports().decode())


def set_memory(count: int) -> None:
    """Make it a card with so many bytes of memory."""
    _lib.false_set_total(count)


def fail(message: str, accelerator: bool = False, after: int = 0) -> None:
    """Let the next allocation end in a RuntimeError or a torch.AcceleratorError, or one after some that succeed."""
    _lib.false_fail(message.encode(), int(accelerator), after)
