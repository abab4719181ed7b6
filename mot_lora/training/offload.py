"""Offloading: the inputs of checkpointed layers are in host memory between the forward and the backward pass."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mot_lora.config import BranchConfig
from mot_lora.errors import UserError

WORTH = 2**20  # bytes of the smallest tensor that is offloaded
SLAB = 2**26  # bytes; torch rounds pinned blocks up to a power of two, so one block a tensor could take twice its size
NEAR = 2  # tensors that may be in copy to the host at once, each still held on the device
SHARE = 0.1  # of a GPU's memory; with `auto`, layers' inputs that take less stay there


def kept_bytes(layers: int, tokens: int, width: int, itemsize: int = 2) -> int:
    """The bytes of the inputs of all checkpointed layers, for a batch of `tokens` tokens.

    >>> kept_bytes(36, 32768, 4096) / 2**30
    9.0
    """
    return layers * tokens * width * itemsize


def capacity(device: torch.device) -> int:
    """The bytes of GPU memory that this process may use; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.mem_get_info(device)[1] * torch.cuda.get_per_process_memory_fraction(device))


def offloads(settings: BranchConfig, kept: int, capacity: int) -> bool:
    """Whether layers' inputs of `kept` bytes are offloaded from a GPU with `capacity` bytes (0: a CPU).

    >>> offloads(BranchConfig(), kept_bytes(36, 32768, 4096), 24 * 2**30)
    True
    """
    if settings.offload == "auto":
        return settings.activation_checkpointing and 0 < SHARE * capacity < kept
    return settings.offload == "on"


def is_worth_moving(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor saved by the forward pass is offloaded.

    dtype: the model's, which layers' inputs have; the fp32 tensors of the last norm are needed again at once and stay.
    So do parameters, and views of a larger tensor, which would free nothing.
    """
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return False
    whole = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
    return whole and tensor.dtype == dtype and tensor.is_floating_point() and tensor.nbytes >= WORTH


@dataclass(frozen=True)
class Moved:
    """An offloaded tensor: its number in the step, its shape, and its bytes in one or more slabs."""

    number: int
    shape: torch.Size
    places: list[Tensor]


class Offload:
    """Moves the inputs of checkpointed layers to host memory and back, on a separate stream, during computation.

    The host memory is pinned, in slabs of equal size, and reused from step to step; a step's tensors are packed into it
    one after another. On a CPU it works the same way without streams. dtype: the model's; kept: the bytes that the
    longest batch needs, for the error message.

    transformers can offload too, but copies on the computing stream, and pins a new block for each tensor.

    >>> with Offload(model.device, model.dtype).step():  # doctest: +SKIP
    ...     batch_loss(model, batch, chunk=1024)[0].backward()
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, kept: int = 0) -> None:
        self.device = device
        self.dtype = dtype
        self.kept = kept
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.slabs: list[Tensor] = []
        self.used = 0  # bytes of the slabs, in this step
        self.moved: list[Moved] = []
        # tensors on the device whose copy to or from the host may be in progress, and the event of its completion
        self.near: dict[int, tuple[Tensor, Any]] = {}

    @contextmanager
    def step(self) -> Generator[None]:
        """The context for the forward and backward pass of one batch.

        Errors: UserError if host memory runs out.
        """
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._out, self._back):
                yield
        finally:
            if self.side:  # a tensor that was prefetched and not used may still be written to
                torch.cuda.current_stream(self.device).wait_stream(self.side)
            self.near.clear()
            self.moved.clear()
            self.used = 0

    def _out(self, tensor: Tensor) -> Tensor | Moved:
        if not is_worth_moving(tensor, self.dtype):
            return tensor
        moved = Moved(len(self.moved), tensor.shape, self._allocate(tensor.nbytes))
        self.moved.append(moved)
        with self._on_side_stream():
            for place, part in zip(moved.places, _parts(tensor, moved), strict=True):
                place.copy_(part, non_blocking=True)
        self._hold(moved, tensor.detach())
        if len(self.near) > NEAR:
            self._take(next(iter(self.near)))
        return moved

    def _back(self, kept: Tensor | Moved) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        for moved in self.moved[kept.number :: -1][:2]:  # this one, and prefetch the one needed next
            if moved.number not in self.near:
                tensor = torch.empty(moved.shape, dtype=self.dtype, device=self.device)
                with self._on_side_stream():
                    for place, part in zip(moved.places, _parts(tensor, moved), strict=True):
                        part.copy_(place, non_blocking=True)
                self._hold(moved, tensor)
        return self._take(kept.number)

    def _on_side_stream(self) -> AbstractContextManager[object]:
        """The side stream, after all work queued on the computing stream: that may still write the source of a copy or
        use the memory of its target.
        """
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.side)

    def _hold(self, moved: Moved, tensor: Tensor) -> None:
        self.near[moved.number] = tensor, self.side.record_event() if self.side else None

    def _take(self, number: int) -> Tensor:
        """A held tensor. The computing stream, which owns its memory, first waits for the copy to end."""
        tensor, copied = self.near.pop(number)
        if copied:
            torch.cuda.current_stream(self.device).wait_event(copied)
        return tensor

    def _allocate(self, count: int) -> list[Tensor]:
        """The next `count` bytes of the slabs."""
        places: list[Tensor] = []
        while count:
            slab, start = divmod(self.used, SLAB)
            if slab == len(self.slabs):
                self.slabs.append(self._slab())
            place = self.slabs[slab][start : start + count]
            places.append(place)
            self.used += len(place)
            count -= len(place)
        return places

    def _slab(self) -> Tensor:
        try:
            return torch.empty(SLAB, dtype=torch.uint8, pin_memory=self.side is not None)
        except RuntimeError as e:
            needs, had = max(self.kept, self.used) / 2**30, len(self.slabs) * SLAB / 2**30
            kind = "pinned host memory" if self.side else "host memory"
            raise UserError(
                f"branch.offload needs {needs:.1f} GiB of {kind}, but only {had:.1f} could be allocated "
                f"({' '.join(str(e).split())[:100]}); resume with branch.offload=off, or start a new run "
                "with a smaller branch.max_length"
            ) from e


def _parts(tensor: Tensor, moved: Moved) -> tuple[Tensor, ...]:
    """A tensor's bytes, split as they are over the slabs."""
    return tensor.detach().view(-1).view(torch.uint8).split([len(place) for place in moved.places])
