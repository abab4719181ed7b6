"""The inputs of checkpointed layers in host memory, between a step's forward pass and its backward one."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mot_lora.config import BranchConfig
from mot_lora.errors import UserError

WORTH = 2**20  # bytes of the smallest tensor that is moved
SLAB = 2**26  # bytes; torch rounds what it pins up to a power of two, so that a block a tensor could take twice as much
NEAR = 2  # tensors that are on their way out at once, and stay on the device until they are there
SHARE = 0.1  # of a GPU's memory; with `auto`, what takes less stays there


def kept_bytes(layers: int, tokens: int, width: int, itemsize: int = 2) -> int:
    """The inputs of all checkpointed layers in a batch of so many tokens, in bytes.

    >>> kept_bytes(36, 32768, 4096) / 2**30
    9.0
    """
    return layers * tokens * width * itemsize


def capacity(device: torch.device) -> int:
    """The bytes of a GPU's memory that this process may use; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.mem_get_info(device)[1] * torch.cuda.get_per_process_memory_fraction(device))


def offloads(settings: BranchConfig, kept: int, capacity: int) -> bool:
    """Whether layers' inputs of `kept` bytes go to host memory, beside a GPU of `capacity` bytes (0: on a CPU).

    >>> offloads(BranchConfig(), kept_bytes(36, 32768, 4096), 24 * 2**30)
    True
    """
    if settings.offload == "auto":
        return settings.activation_checkpointing and 0 < SHARE * capacity < kept
    return settings.offload == "on"


def is_worth_moving(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor that the forward pass keeps goes to host memory.

    dtype: the model's, in which layers hand on; what the last norm keeps in fp32 beside it is needed again at once.
    Parameters stay, and so do parts of a larger tensor, which alone would free nothing.
    """
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return False
    whole = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
    return whole and tensor.dtype == dtype and tensor.is_floating_point() and tensor.nbytes >= WORTH


@dataclass(frozen=True)
class Moved:
    """A tensor that was moved: its number in the step, its shape, and its bytes, over one or more slabs."""

    number: int
    shape: torch.Size
    places: list[Tensor]


class Offload:
    """Moves the inputs of checkpointed layers to host memory and back, on a stream of its own, while others compute.

    The host memory is pinned, in slabs of one size, and reused from step to step; a step's tensors lie in it one after
    the other. On a CPU all is the same, without streams. dtype: the model's; kept: what the longest batch will need,
    in bytes, for what is said where there is no more.

    transformers can offload too, but copies on the stream that computes, and pins a new block for each tensor.

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
        # what is on the device, on its way out or back, and the event after which it is there
        self.near: dict[int, tuple[Tensor, Any]] = {}

    @contextmanager
    def step(self) -> Generator[None]:
        """Around the forward and the backward pass of one batch.

        Errors: UserError where there is no more host memory.
        """
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._out, self._back):
                yield
        finally:
            if self.side:  # what was fetched and not used is still being written
                torch.cuda.current_stream(self.device).wait_stream(self.side)
            self.near.clear()
            self.moved.clear()
            self.used = 0

    def _out(self, tensor: Tensor) -> Tensor | Moved:
        if not is_worth_moving(tensor, self.dtype):
            return tensor
        moved = Moved(len(self.moved), tensor.shape, self._room(tensor.nbytes))
        self.moved.append(moved)
        with self._aside():
            for place, part in zip(moved.places, _parts(tensor, moved), strict=True):
                place.copy_(part, non_blocking=True)
        self._let_near(moved, tensor.detach())
        if len(self.near) > NEAR:
            self._take(next(iter(self.near)))
        return moved

    def _back(self, kept: Tensor | Moved) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        for moved in self.moved[kept.number :: -1][:2]:  # and the one that is needed next
            if moved.number not in self.near:
                tensor = torch.empty(moved.shape, dtype=self.dtype, device=self.device)
                with self._aside():
                    for place, part in zip(moved.places, _parts(tensor, moved), strict=True):
                        part.copy_(place, non_blocking=True)
                self._let_near(moved, tensor)
        return self._take(kept.number)

    def _aside(self) -> AbstractContextManager[object]:
        """The side stream, after all that the computing one was told so far: to write what a copy reads, and to be done
        with the memory that a copy writes.
        """
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.side)

    def _let_near(self, moved: Moved, tensor: Tensor) -> None:
        self.near[moved.number] = tensor, self.side.record_event() if self.side else None

    def _take(self, number: int) -> Tensor:
        """A tensor that is near. The computing stream, whose memory it is in, waits until its copy is done: then it may
        be used, or let go of.
        """
        tensor, copied = self.near.pop(number)
        if copied:
            torch.cuda.current_stream(self.device).wait_event(copied)
        return tensor

    def _room(self, count: int) -> list[Tensor]:
        """The next so many bytes of the slabs."""
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
                f"branch.offload needs {needs:.1f} GiB of {kind}, and there was no more after {had:.1f} "
                f"({' '.join(str(e).split())[:100]}); go on with branch.offload=off, or begin another run "
                "with a smaller branch.max_length"
            ) from e


def _parts(tensor: Tensor, moved: Moved) -> tuple[Tensor, ...]:
    """A tensor's bytes as they lie over its places."""
    return tensor.detach().view(-1).view(torch.uint8).split([len(place) for place in moved.places])
