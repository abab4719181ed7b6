"""A safetensors file, read and written one tensor at a time.

The library maps a whole file, whose touched pages stay resident, and writes only what is all in memory; here both are
bounded by one tensor.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 8
CHUNK = 1 << 24  # bytes that a copy holds at once


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file, and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open safetensors file: reads tensors by name and gives their pages back.

    What was opened stays readable, even when the file is replaced or removed.

    Errors: UserError, which names the file, when it is missing, damaged or not safetensors.

    >>> TensorFile("model.safetensors").read("model.norm.weight").shape  # doctest: +SKIP
    torch.Size([1024])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, "pt"):  # the library's own checks of the header
                pass
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except Exception as e:  # safetensors raises its own and OSError alike
            raise UserError(f"{self.path}: missing, damaged or not safetensors ({e}); copy or download it again") from e
        (length,) = struct.unpack("<Q", self._map[:8])
        header: dict[str, Any] = json.loads(self._map[8 : 8 + length])
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries: dict[str, Entry] = {}
        for name, e in header.items():
            if e["dtype"] not in DTYPES:
                raise UserError(f"{self.path}: {name} is stored as {e['dtype']}, which is not a plain number format")
            start, end = (8 + length + offset for offset in e["data_offsets"])
            self.entries[name] = Entry(DTYPES[e["dtype"]], tuple(e["shape"]), start, end)

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """A copy of one tensor, as it is stored."""
        entry = self.entries[name]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype, device=device)
        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        raw.numpy()[:] = memoryview(self._map)[entry.start : entry.end]
        self._forget(entry.start, entry.end)
        return raw.view(entry.dtype).view(entry.shape).to(device)

    def copy(self, name: str, to: IO[bytes]) -> None:
        """Append one tensor's bytes to an open file."""
        entry = self.entries[name]
        for start in range(entry.start, entry.end, CHUNK):
            end = min(start + CHUNK, entry.end)
            _write(to, memoryview(self._map)[start:end])
            self._forget(start, end)

    def _forget(self, start: int, end: int) -> None:
        start -= start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def write_tensors(
    path: str | Path,
    entries: Mapping[str, tuple[torch.dtype, Iterable[int]]],
    tensors: Iterable[tuple[str, Tensor | TensorFile]],
) -> None:
    """Write a safetensors file from what is to be in it and then the tensors themselves, one at a time in any order.

    A TensorFile in place of a tensor stands for its tensor of that name, copied as it is.

    Errors: ValueError when a tensor is not what its entry says, or is missing.
    """
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
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)  # a disk that is too small may say so only while writing
        for name, tensor in tensors:
            start, _ = header[name]["data_offsets"]
            file.seek(8 + len(text) + start)
            if isinstance(tensor, TensorFile):
                tensor.copy(name, file)
            else:
                data = tensor.detach().to("cpu").contiguous()
                if (CODES[data.dtype], list(data.shape)) != (header[name]["dtype"], header[name]["shape"]):
                    raise ValueError(f"{name} is {data.dtype} {list(data.shape)}, not what was announced")
                _write(file, data.flatten().view(torch.uint8).numpy())
            left.discard(name)
    if left:
        raise ValueError(f"no tensor was given for {sorted(left)}")


def _write(file: IO[bytes], data: Any) -> None:
    view = memoryview(data)
    while len(view):  # one write takes at most 2 GiB
        view = view[file.write(view) :]
