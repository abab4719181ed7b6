"""Cross entropy over the trained tokens only, a chunk of logits at a time."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mot_lora.data.traces import IGNORE

Head = Callable[[Tensor], Tensor]


def trained_tokens(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict a trained token, and those tokens.

    hidden: [batch, length, width]; labels: [batch, length] int64, IGNORE at tokens that are not trained. Returns
    [n, width] and [n].

    >>> trained_tokens(torch.zeros(1, 3, 8), torch.tensor([[IGNORE, IGNORE, 5]]))[1]
    tensor([5])
    """
    targets = labels[:, 1:]
    trained = targets != IGNORE
    return hidden[:, :-1][trained], targets[trained]


def chunked_cross_entropy(hidden: Tensor, head: Head, targets: Tensor, chunk: int) -> Tensor:
    """The summed loss of n tokens, - sum_i log softmax(head(h_i))[t_i], in nats; fp32 scalar.

    hidden: [n, width]; head maps [m, width] to logits [m, vocabulary]; targets: [n] int64. The softmax is in fp32.
    Logits are computed once, for `chunk` tokens at a time, and their gradient by `hidden`, [n, width], in the same
    pass; for a frozen linear head it is computed in the logits' own memory.

    >>> chunked_cross_entropy(torch.zeros(4, 8), torch.nn.Linear(8, 2), torch.zeros(4, dtype=torch.int64), 2).shape
    torch.Size([])
    """
    if torch.is_grad_enabled():
        own = [p for p in head.parameters() if p.requires_grad] if isinstance(head, nn.Module) else []
        return cast("Any", _Summed).apply(head, targets, chunk, hidden, *own)
    return -_log_probs(hidden, head, targets, chunk).sum()


def logits(head: Head, hidden: Tensor) -> Tensor:
    """The head's logits of [n, width], in fp32: [n, vocabulary].

    On a GPU the fp32 sums of 16-bit products are used as they are: rounded to 16 bits first, log p would be off by some
    0.03 nats.
    """
    if _is_linear(head) and hidden.device.type in ("cuda", "meta") and head.weight.dtype.itemsize == 2:
        out = torch.mm(hidden.to(head.weight.dtype), head.weight.t(), out_dtype=torch.float32)
        bias = cast("Tensor | None", head.bias)
        return out if bias is None else out.add_(bias)
    return head(hidden).float()


def _is_linear(head: Head) -> TypeGuard[nn.Linear]:
    return type(head) is nn.Linear  # not a subclass, which may compute differently


def _log_probs(hidden: Tensor, head: Head, targets: Tensor, chunk: int) -> Tensor:
    parts = [slice(i, i + chunk) for i in range(0, len(targets), chunk)]
    rows = [_exponentiate(logits(head, hidden[p]), targets[p, None])[0] for p in parts]
    return torch.cat([hidden.new_zeros(0, dtype=torch.float32), *rows])


def _exponentiate(z: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits z, [m, vocabulary], by exp(z - max z); return log p of the tokens `at`, [m], and sums, [m, 1]."""
    z -= z.amax(1, keepdim=True)
    right = z.gather(1, at)
    total = z.exp_().sum(1, keepdim=True)
    return (right - total.log()).squeeze(1), total


class _Summed(torch.autograd.Function):
    """The loss, with the gradients by hidden and by the head's trained parameters computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, head: Head, targets: Tensor, chunk: int, hidden: Tensor, *own: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        ctx.grads = [torch.zeros_like(x) for x in (hidden, *own)]
        for i in range(0, len(targets), chunk):
            here = slice(i, i + chunk)
            if not own and _is_linear(head):
                loss, by_hidden = _with_gradient(head, hidden[here], targets[here])
                by_own = []
            else:
                h = hidden[here].detach().requires_grad_()
                with torch.enable_grad(), saved_tensors_hooks(_same, _same):  # used at once, so not offloaded
                    loss = F.cross_entropy(logits(head, h), targets[here], reduction="sum")
                # materialize_grads: parameters that the loss does not use get 0
                by_hidden, *by_own = torch.autograd.grad(loss, [h, *own], materialize_grads=True)
            ctx.grads[0][here] = by_hidden
            for total_grad, grad in zip(ctx.grads[1:], by_own, strict=True):
                total_grad += grad
            total += loss.detach()
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, ()  # otherwise they would stay until the end of the backward pass
        return None, None, None, *(grad.mul_(upstream[0]) for grad in grads)


def _with_gradient(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk's loss under a frozen head, and its gradient by hidden, (softmax - onehot) W, computed in place."""
    z, at = logits(head, hidden), targets[:, None]
    log_probs, total = _exponentiate(z, at)
    z /= total
    z.scatter_add_(1, at, -torch.ones_like(total))
    return -log_probs.sum(), z.to(head.weight.dtype) @ head.weight


def _same(tensor: Tensor) -> Tensor:
    return tensor


def batch_loss(model: Any, batch: Mapping[str, Tensor], chunk: int) -> tuple[Tensor, int]:
    """The summed loss of a batch over its trained tokens, fp32, and the number of those tokens.

    model: a causal language model of transformers, with or without adapters inside; batch: input_ids and labels, each
    [batch, length], padded on the right. The head is applied only to trained positions. With a 16-bit base the forward
    pass is in 16 bits.

    >>> loss, n = batch_loss(model, collate(examples, pad_id), chunk=1024)  # doctest: +SKIP
    """
    with _autocast(model):
        hidden, targets = _states(model, batch)
        return chunked_cross_entropy(hidden, model.get_output_embeddings(), targets, chunk), len(targets)


def token_log_probs(model: Any, batch: Mapping[str, Tensor], chunk: int) -> Tensor:
    """The log p of each of a batch's n trained tokens, in their order: [n] fp32, in nats, without gradients.

    model, batch, chunk: as in `batch_loss`, which returns minus their sum.

    >>> token_log_probs(model, collate(examples, pad_id), chunk=1024).exp().mean()  # doctest: +SKIP
    """
    with torch.no_grad(), computing(model):
        hidden, targets = _states(model, batch)
        return _log_probs(hidden, model.get_output_embeddings(), targets, chunk)


@contextmanager
def computing(model: Any) -> Generator[None]:
    """The context for computing with a student and its adapter: with a 16-bit base the adapter computes in 16 bits too.

    Enter it once around many batches: it sets a flag in each of PEFT's layers.
    """
    with _autocast(model), inputs_as_they_are(model):
        yield


def inputs_as_they_are(model: Any) -> AbstractContextManager[None]:
    """With a 16-bit base, keep PEFT from making an fp32 copy of each adapted layer's input.

    The adapter is in fp32, but autocast computes it in 16 bits anyway. Recomputation by checkpointing needs it too.
    """
    from peft.helpers import disable_input_dtype_casting  # here, because importing PEFT takes seconds

    return disable_input_dtype_casting(model, model.dtype.itemsize == 2)


def _autocast(model: Any) -> AbstractContextManager[object]:
    device = cast("torch.device", model.device)
    half = model.dtype.itemsize == 2
    return torch.autocast(device.type, model.dtype if half else None, enabled=half)


def _states(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    # no mask: it would rule out fast attention kernels, and causal attention never sees the padding on the right
    output = model.base_model(input_ids=batch["input_ids"], use_cache=False)
    return trained_tokens(output.last_hidden_state, batch["labels"])
