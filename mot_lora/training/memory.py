"""Freeing a model's memory at a defined point, without waiting for Python to collect reference cycles."""

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
    """A model for the duration of the block. Its memory is freed however the block ends, even if references remain: the
    Trainer's cycles, or a notebook's last exception, which holds the variables of every function in its traceback.
    Those are cleared.

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
            with suppress(
                RuntimeError
            ):  # after some errors CUDA fails on every call; the first error is the one raised
                torch.cuda.empty_cache()


def release(model: nn.Module) -> None:
    """Free the memory of a model's weights, gradients and buffers; the model cannot be used any more."""
    for module in model.modules():
        release_weight(module)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.grad = None
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def clear_frames(error: BaseException) -> None:
    """Clear the local variables in the tracebacks of an exception, its causes and its contexts."""
    errors = [error]
    for e in errors:
        traceback.clear_frames(e.__traceback__)
        errors += [x for x in (e.__cause__, e.__context__) if x is not None and x not in errors]
