"""Cross entropy over the trained tokens only, a chunk of logits at a time."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

IGNORE = -100


def trained_tokens(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict a trained token, and those tokens.

    hidden: [batch, length, width]; labels: [batch, length] int64, IGNORE where nothing is trained. Returns [n, width]
    and [n].

    >>> trained_tokens(torch.zeros(1, 3, 8), torch.tensor([[IGNORE, IGNORE, 5]]))[1]
    tensor([5])
    """
    targets = labels[:, 1:]
    trained = targets != IGNORE
    return hidden[:, :-1][trained], targets[trained]


def chunked_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int) -> Tensor:
    """The summed loss of n tokens, - sum_i log softmax(head(h_i))[t_i], in nats; fp32 scalar.

    hidden: [n, width]; head maps [m, width] to logits [m, vocabulary]; targets: [n] int64. The softmax is in fp32, and
    logits are held for `chunk` tokens at once, forward and backward: each chunk is computed again for its gradient.

    >>> chunked_cross_entropy(torch.zeros(4, 8), torch.nn.Linear(8, 2), torch.zeros(4, dtype=torch.int64), 2).shape
    torch.Size([])
    """

    def part(h: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), t, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for i in range(0, len(targets), chunk):
        h, t = hidden[i : i + chunk], targets[i : i + chunk]
        total = total + cast("Tensor", checkpoint(part, h, t, use_reentrant=False, preserve_rng_state=False))
    return total


def batch_loss(model: Any, batch: Mapping[str, Tensor], chunk: int) -> tuple[Tensor, int]:
    """The summed loss of a batch over its trained tokens, fp32, and how many they are.

    model: a causal language model of transformers, with or without adapters inside; batch: input_ids and labels, each
    [batch, length], padded on the right. The head is applied to the trained positions alone. Where the base is in bf16,
    so is the forward.

    >>> loss, n = batch_loss(model, collate(examples, pad_id), chunk=1024)  # doctest: +SKIP
    """
    with _computing(model):
        hidden, targets = _states(model, batch)
        return chunked_cross_entropy(hidden, model.get_output_embeddings(), targets, chunk), len(targets)


def token_log_probs(model: Any, batch: Mapping[str, Tensor], chunk: int) -> Tensor:
    """The log p of each of a batch's n trained tokens, in their order: [n] fp32, in nats, without gradients.

    model, batch, chunk: as for `batch_loss`, which is minus their sum.

    >>> token_log_probs(model, collate(examples, pad_id), chunk=1024).exp().mean()  # doctest: +SKIP
    """
    with torch.no_grad(), _computing(model):
        hidden, targets = _states(model, batch)
        head = cast("Callable[[Tensor], Tensor]", model.get_output_embeddings())
        parts = [slice(i, i + chunk) for i in range(0, len(targets), chunk)]
        return torch.cat([-F.cross_entropy(head(hidden[p]).float(), targets[p], reduction="none") for p in parts])


def inputs_as_they_are(model: Any) -> AbstractContextManager[None]:
    """Where the base is in bf16, keep PEFT from making an fp32 copy of what each adapted layer is given.

    The adapter is in fp32, but autocast computes it in bf16 anyway. Needed around what computes layers again, too.
    """
    from peft.helpers import disable_input_dtype_casting  # here: who only wants IGNORE should not wait for PEFT

    return disable_input_dtype_casting(model, model.dtype == torch.bfloat16)


@contextmanager
def _computing(model: Any) -> Generator[None]:
    device = cast("torch.device", model.device)
    in_bf16 = model.dtype == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16), inputs_as_they_are(model):
        yield


def _states(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    # no mask: it would keep attention from its fast kernels, and what is on the right is not seen anyway
    output = model.base_model(input_ids=batch["input_ids"], use_cache=False)
    return trained_tokens(output.last_hidden_state, batch["labels"])
