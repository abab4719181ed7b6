"""A model's memory, given back at a certain point: when Python collects its reference cycles is anyone's guess."""

import gc
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import nn

from mot_lora.checkpoints.weights import release_weight

M = TypeVar("M", bound=nn.Module)


@contextmanager
def loaded(load: Callable[[], M]) -> Generator[M]:
    """A model for as long as the block lasts. Then its memory is free, however the block ended, whoever still refers to
    the model: the Trainer's cycles, or a notebook, which keeps the last exception and with it the variables of every
    function that it came through. These are cleared.

    >>> with loaded(lambda: load_model(checkpoint, "nf4", device)) as model:  # doctest: +SKIP
    ...     generate(model)
    """
    model = None
    try:
        model = load()
        yield model
    except BaseException as e:
        clear_frames(e)
        raise
    finally:
        if model is not None:
            release(model)
        gc.collect()
        if torch.cuda.is_initialized():
            with suppress(RuntimeError):  # after some errors CUDA does nothing more; the one that is raised is told
                torch.cuda.empty_cache()


def release(model: nn.Module) -> None:
    """Give back the memory of a model's weights, gradients and buffers; nothing can be computed with it any more."""
    for module in model.modules():
        release_weight(module)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.grad = None
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def clear_frames(error: BaseException) -> None:
    """Let go of the variables of the functions that an exception, and those before it, came through."""
    found = [error]
    for e in found:
        traceback.clear_frames(e.__traceback__)
        found += [x for x in (e.__cause__, e.__context__) if x is not None and x not in found]
