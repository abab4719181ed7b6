"""Cross entropy over the trained tokens only, a chunk of logits at a time."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

IGNORE = -100
Head = Callable[[Tensor], Tensor]


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


def chunked_cross_entropy(hidden: Tensor, head: Head, targets: Tensor, chunk: int) -> Tensor:
    """The summed loss of n tokens, - sum_i log softmax(head(h_i))[t_i], in nats; fp32 scalar.

    hidden: [n, width]; head maps [m, width] to logits [m, vocabulary]; targets: [n] int64. The softmax is in fp32.
    Logits are computed once, and held for `chunk` tokens: with them their gradient is taken, [n, width], and kept.

    >>> chunked_cross_entropy(torch.zeros(4, 8), torch.nn.Linear(8, 2), torch.zeros(4, dtype=torch.int64), 2).shape
    torch.Size([])
    """
    if torch.is_grad_enabled():
        own = [p for p in head.parameters() if p.requires_grad] if isinstance(head, nn.Module) else []
        return cast("Any", _Summed).apply(head, targets, chunk, hidden, *own)
    total = hidden.new_zeros((), dtype=torch.float32)
    for i in range(0, len(targets), chunk):
        total += _loss(head, hidden[i : i + chunk], targets[i : i + chunk])
    return total


def _loss(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


class _Summed(torch.autograd.Function):
    """The loss, and with it the gradients by hidden and by what the head trains."""

    @staticmethod
    def forward(ctx: Any, head: Head, targets: Tensor, chunk: int, hidden: Tensor, *own: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        ctx.grads = [torch.zeros_like(x) for x in (hidden, *own)]
        for i in range(0, len(targets), chunk):
            here = slice(i, i + chunk)
            h = hidden[here].detach().requires_grad_()
            with torch.enable_grad(), saved_tensors_hooks(_same, _same):  # used at once: nobody need move it
                loss = _loss(head, h, targets[here])
            by_hidden, *by_own = torch.autograd.grad(loss, [h, *own], materialize_grads=True)  # 0 for what is not used
            ctx.grads[0][here] = by_hidden
            for total_grad, grad in zip(ctx.grads[1:], by_own, strict=True):
                total_grad += grad
            total += loss.detach()
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, ()  # or they would be held until the whole backward pass is done
        return None, None, None, *(grad.mul_(upstream[0]) for grad in grads)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def batch_loss(model: Any, batch: Mapping[str, Tensor], chunk: int) -> tuple[Tensor, int]:
    """The summed loss of a batch over its trained tokens, fp32, and how many they are.

    model: a causal language model of transformers, with or without adapters inside; batch: input_ids and labels, each
    [batch, length], padded on the right. The head is applied to the trained positions alone. Where the base is in bf16,
    so is the forward.

    >>> loss, n = batch_loss(model, collate(examples, pad_id), chunk=1024)  # doctest: +SKIP
    """
    with computing(model):
        hidden, targets = _states(model, batch)
        return chunked_cross_entropy(hidden, model.get_output_embeddings(), targets, chunk), len(targets)


def token_log_probs(model: Any, batch: Mapping[str, Tensor], chunk: int) -> Tensor:
    """The log p of each of a batch's n trained tokens, in their order: [n] fp32, in nats, without gradients.

    model, batch, chunk: as for `batch_loss`, which is minus their sum.

    >>> token_log_probs(model, collate(examples, pad_id), chunk=1024).exp().mean()  # doctest: +SKIP
    """
    with torch.no_grad(), computing(model):
        hidden, targets = _states(model, batch)
        head = cast("Head", model.get_output_embeddings())
        parts = [slice(i, i + chunk) for i in range(0, len(targets), chunk)]
        return torch.cat([-F.cross_entropy(head(hidden[p]).float(), targets[p], reduction="none") for p in parts])


def inputs_as_they_are(model: Any) -> AbstractContextManager[None]:
    """Where the base is in bf16, keep PEFT from making an fp32 copy of what each adapted layer is given.

    The adapter is in fp32, but autocast computes it in bf16 anyway. Needed around what computes layers again, too.
    """
    from peft.helpers import disable_input_dtype_casting  # here: who only wants IGNORE should not wait for PEFT

    return disable_input_dtype_casting(model, model.dtype == torch.bfloat16)


@contextmanager
def computing(model: Any) -> Generator[None]:
    """What a model computes in: training, losses and answers alike. Its base may be in bf16, its adapter is in fp32."""
    device = cast("torch.device", model.device)
    in_bf16 = model.dtype == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16), inputs_as_they_are(model):
        yield


def _states(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    # no mask: it would keep attention from its fast kernels, and what is on the right is not seen anyway
    output = model.base_model(input_ids=batch["input_ids"], use_cache=False)
    return trained_tokens(output.last_hidden_state, batch["labels"])
