"""A safetensors file, read and written one tensor at a time.

The library maps a whole file, whose touched pages stay resident, and writes only what is all in memory; here both
are bounded by one tensor.
"""

import json
import math
import os
import struct
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from mot_lora.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 8
PIECE = 1 << 12  # bytes of a sample
RUN = 1 << 24  # bytes that are checked or copied at once


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file, and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open safetensors file: reads tensors by name and gives their pages back.

    What was opened stays readable, even when the file is replaced or removed; Windows lets neither happen before it is
    closed, with the last reference to it.

    Errors: UserError, which names the file, when it is missing, damaged or not safetensors.

    >>> TensorFile("model.safetensors").read("model.norm.weight").shape  # doctest: +SKIP
    torch.Size([1024])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, "pt"):  # the library's own checks of the header
                pass
            self._file = self.path.open("rb", buffering=0)
        except Exception as e:  # safetensors raises its own and OSError alike
            raise UserError(f"{self.path}: missing, damaged or not safetensors ({e}); copy or download it again") from e
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()  # to seek and read is one: not every system can read at a place
        (length,) = struct.unpack("<Q", self._file.read(8))
        header: dict[str, Any] = json.loads(self._file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries: dict[str, Entry] = {}
        for name, e in header.items():
            if e["dtype"] not in DTYPES:
                what = "numbers in blocks with a scale" if e["dtype"].startswith("F") else "no plain number format"
                raise UserError(f"{self.path}: {name} is stored as {e['dtype']}, {what}; give the 16-bit original")
            start, end = (8 + length + offset for offset in e["data_offsets"])
            self.entries[name] = Entry(DTYPES[e["dtype"]], tuple(e["shape"]), start, end)

    def read(self, name: str, device: str | torch.device = "cpu", pinned: bool = False) -> Tensor:
        """A copy of one tensor, as it is stored; `pinned`: read into page-locked memory, which a GPU copies by itself.

        Errors: UserError, which names the file and the tensor, for one that the disk does not give.
        """
        entry = self.entries[name]
        return self._read(entry, name, pinned).view(entry.shape).to(device, non_blocking=pinned)

    def sample(self, name: str) -> bytes:
        """The first, middle and last bytes of a tensor as it is stored."""
        entry = self.entries[name]
        last = max(entry.end - PIECE, entry.start)
        places = (entry.start, (entry.start + last) // 2, last)
        pieces = [bytearray(min(PIECE, entry.end - at)) for at in places]
        for piece, at in zip(pieces, places, strict=True):
            self._fill(memoryview(piece), at, name)
        return b"".join(pieces)

    def _read(self, entry: Entry, name: str, pinned: bool = False) -> Tensor:
        size = (entry.end - entry.start) // entry.dtype.itemsize
        tensor = torch.empty(size, dtype=entry.dtype, pin_memory=pinned)
        self._fill(_bytes(tensor), entry.start, name)
        return tensor

    def _fill(self, left: memoryview, at: int, name: str) -> None:
        """Fill memory with what begins at a place of the file."""
        while len(left):  # one read takes at most 2 GiB
            try:
                with self._lock:
                    self._file.seek(at)
                    count = self._file.readinto(left)
            except OSError as e:
                raise UserError(f"{self.path}: {name} cannot be read ({e.strerror}); check its disk") from e
            if not count:
                raise UserError(f"{self.path}: {name} is cut off; the file was shortened while it was read")
            left, at = left[count:], at + count

    def not_finite(self) -> str | None:
        """The first tensor that holds an infinity or a NaN; None when none does."""
        run: list[tuple[str, Entry]] = []  # small neighbours of one format are read together
        for name, entry in [*sorted(self.entries.items(), key=lambda item: item[1].start), ("", None)]:
            if run and (entry is None or entry.dtype != run[0][1].dtype or entry.end - run[0][1].start > RUN):
                whole = Entry(run[0][1].dtype, (-1,), run[0][1].start, run[-1][1].end)
                if not is_finite(self._read(whole, "")):
                    return next(n for n, e in run if not is_finite(self._read(e, n)))
                run = []
            if entry is not None and entry.start < entry.end:
                run.append((name, entry))
        return None

    def copy(self, name: str, to: IO[bytes]) -> bool:
        """Write one tensor's bytes at the position of an open file; returns whether its numbers are all finite."""
        entry, finite = self.entries[name], True
        for start in range(entry.start, entry.end, RUN):
            part = self._read(Entry(entry.dtype, (-1,), start, min(start + RUN, entry.end)), name)
            finite = finite and is_finite(part)
            _write(to, part)
        return finite


def write_tensors(
    path: str | Path,
    entries: Mapping[str, tuple[torch.dtype, Iterable[int]]],
    tensors: Iterable[tuple[str, Tensor | TensorFile]],
) -> list[str]:
    """Write a safetensors file from what is to be in it and then the tensors themselves, one at a time in any order.

    A TensorFile in place of a tensor stands for its tensor of that name, copied as it is.

    Returns those that were copied and hold an infinity or a NaN.

    Errors: ValueError when a tensor is not what its entry says, or is missing.
    """
    not_finite = list[str]()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape := list(shape)) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    left = set(entries)
    with Path(path).open("wb", buffering=0) as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is too small says so here, and writing is faster
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + offset)
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            start, _ = header[name]["data_offsets"]
            file.seek(8 + len(text) + start)
            if isinstance(tensor, TensorFile):
                not_finite += [] if tensor.copy(name, file) else [name]
            else:
                data = tensor.detach().to("cpu").contiguous()
                if (CODES[data.dtype], list(data.shape)) != (header[name]["dtype"], header[name]["shape"]):
                    raise ValueError(f"{name} is {data.dtype} {list(data.shape)}, not what was announced")
                _write(file, data)
            left.discard(name)
    if left:
        raise ValueError(f"no tensor was given for {sorted(left)}")
    return not_finite


def is_finite(values: Tensor) -> bool:
    """Whether all of a tensor's numbers are finite: its minimum and maximum are, which is several times faster."""
    if not values.is_floating_point() or not values.numel():
        return True
    wide = values.float() if values.dtype.itemsize == 1 else values
    return all(bool(end.isfinite()) for end in torch.aminmax(wide))  # a NaN is both


def _write(file: IO[bytes], tensor: Tensor) -> None:
    rest = _bytes(tensor)
    while len(rest):  # one write takes at most 2 GiB
        rest = rest[file.write(rest) :]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(cast("Any", tensor.view(-1).view(torch.uint8).numpy()))
