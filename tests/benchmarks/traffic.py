"""What a training step reads and writes beside its products, counted on tensors that hold no data.

Elementwise work is all that is neither a matrix product nor attention nor dequantizing: each operation reads its
tensors once and writes its result once, and nothing stays in a cache between two. Views and what is only allocated cost
nothing; what picks entries reads those alone. A launch is an operation that computes, of whatever kind: one kernel, or
more. Two layers are run and three, and every further layer adds their difference.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mot_lora.config import BranchConfig, LoraConfig
from mot_lora.planning import footprint, kernels

Row = dict[str, Any]
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEW = {"_unsafe_view", "_reshape_alias", "detach", "lift_fresh"}  # beside those whose schema says so
FILL = {"zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "arange"}
FILL |= {"zero_", "fill_", "nll_loss_backward"}
PRODUCT = {"mm", "addmm", "bmm", "baddbmm"}
PICK = {"embedding", "index_select", "gather", "index", "nll_loss_forward"}
PUT = {"scatter_add_", "scatter_", "index_put_"}
TILE = 32768  # entries of the vocabulary that trl computes at once


def size(tensor: Tensor) -> int:
    """The bytes of a tensor's entries; what is expanded counts once."""
    count = tensor.itemsize
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count


class Traffic(TorchDispatchMode):
    """Counts, while it is on, the bytes of elementwise work by operation, and the launches by kind of work."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if product := kernels.PRODUCTS.get(func.name()):
            with self:
                return product(*args, **kwargs)
        result = func(*args, **kwargs)
        space, _, name = func._schema.name.partition("::")
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not views and name not in VIEW | ALLOCATE:
            read = {k: v for k, v in kwargs.items() if k != "out"}
            given, made = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, read), result))
            self._count(space, name, given, made)
        return result

    def _count(self, space: str, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        if space == "bitsandbytes":
            self.launches["dequantize"] += 1
        elif space == "mot_lora" or "scaled_dot_product" in name:
            self.launches["attention"] += 1
        elif name in PRODUCT:
            self.launches["product"] += 1
            if name.startswith(("add", "badd")) and given[0].ndim > 1 and _place(given[0]) != _place(made[0]):
                self.add("copy for addmm", size(given[0]) + size(made[0]))  # what is added to is copied first
        elif made:
            self.add(name, _traffic(name, given, made))

    def add(self, name: str, count: int) -> None:
        """One elementwise kernel that reads and writes so many bytes."""
        self.bytes[name] += count
        self.launches["elementwise"] += 1


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _traffic(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    written = sum({_place(t): size(t) for t in made}.values())
    whole = [t for t in given if t.dtype == torch.int64]  # indices
    if name in FILL:
        return written
    if name in PICK:
        return 2 * written + sum(map(size, whole))
    if name in PUT:
        return sum(map(size, whole)) + 3 * whole[0].numel() * made[0].itemsize
    if name == "copy_":
        return written + size(given[1])
    return written + sum({(_place(t), t.storage_offset()): size(t) for t in given}.values())


# --- whose step ------------------------------------------------------------------------------------------------


def us(config: Any, tokens: int, liger: bool) -> Traffic:
    """Ours: a LoRA layer as one product, the loss in chunks."""
    model = footprint.student(config, "nf4", LoraConfig(), torch.bfloat16, "cuda")
    traffic = Traffic()
    with liger_kernels(traffic), traffic:
        footprint.step(model, 1, tokens, BranchConfig(), liger=liger)
    return traffic


def them(config: Any, tokens: int, loss: Callable[..., Tensor]) -> Traffic:
    """PEFT's own forward with checkpoints, under autocast, which hands it the adapter in bf16."""
    model = footprint.student(config, "nf4", LoraConfig(), torch.bfloat16, "cuda").to(torch.bfloat16)
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    base.train()
    with torch.device("meta"), Traffic() as traffic, trl_kernels(traffic):
        hidden = footprint._forward(base, 1, tokens).last_hidden_state
        loss(base, hidden, torch.empty(1, tokens, dtype=torch.int64)).backward()
    return traffic


def whole(base: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """As transformers' Trainer has it: all logits at once, and handed over in fp32 once more by accelerate."""
    logits = base.lm_head(hidden)
    loss = base.loss_function(logits=logits, labels=labels, vocab_size=base.config.vocab_size)
    logits.detach().float()
    return loss


def tiled(base: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """As trl's SFTTrainer has it: tiles of logits, each read by one Triton kernel, and made its gradient by another."""
    from trl.kernels import ChunkedLogProbFunction

    every = torch.empty(labels.numel() - 1, dtype=torch.int64)
    states, outputs = hidden[:, :-1].flatten(0, 1).index_select(0, every), ("log_probs", "entropy", "is_top1")
    head = base.lm_head.weight
    log_probs, *_ = ChunkedLogProbFunction.apply(states, head, None, every, 1.0, TILE, None, 1.0, outputs)
    return -log_probs.sum()


@contextmanager
def trl_kernels(traffic: Traffic) -> Iterator[None]:
    """What trl computes on a GPU alone, without one."""
    from trl.kernels import chunked_logprob

    def forward(tile: Tensor, *_: Any, **__: Any) -> None:
        traffic.add("trl's log p", size(tile))

    def backward(tile: Tensor, *_: Any, **__: Any) -> None:
        traffic.add("trl's log p, backward", 2 * size(tile))

    def product(total: Tensor, a: Tensor, b: Tensor) -> None:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)

    with (
        patch.multiple(chunked_logprob, _forward_tile=forward, _backward_tile=backward, _addmm_fp32=product),
        patch.object(torch, "is_autocast_enabled", lambda *_: False),  # it knows no device without data
    ):
        yield


@contextmanager
def liger_kernels(traffic: Traffic) -> Iterator[None]:
    """What Liger's kernels read and write, as the plan has them: each tensor once, some over what they are given."""

    class Norm(kernels._Norm):
        @staticmethod
        def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
            traffic.add("Liger's norm", 2 * size(x) + 4 * x[..., 0].numel())
            return super(Norm, Norm).forward(ctx, weight, x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            traffic.add("Liger's norm, backward", 3 * size(grads[0]) + 4 * grads[0][..., 0].numel())
            return super(Norm, Norm).backward(ctx, *grads)

    class Rotate(kernels._Rotate):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            ctx.angles = size(cos) + size(sin)
            traffic.add("Liger's rope", 2 * (size(q) + size(k)) + ctx.angles)
            return super(Rotate, Rotate).forward(ctx, q, k, cos, sin)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            traffic.add("Liger's rope, backward", 2 * sum(map(size, grads)) + ctx.angles)
            return super(Rotate, Rotate).backward(ctx, *grads)

    class Gate(kernels._Gate):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            traffic.add("Liger's swiglu", 3 * size(a))
            return super(Gate, Gate).forward(ctx, a, b)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            traffic.add("Liger's swiglu, backward", 5 * size(grads[0]))
            return super(Gate, Gate).backward(ctx, *grads)

    with patch.multiple(kernels, _Norm=Norm, _Rotate=Rotate, _Gate=Gate):
        yield


WHO: dict[str, Callable[[Any, int], Traffic]] = {
    "us": partial(us, liger=False),
    "us, Liger": partial(us, liger=True),
    "peft": partial(them, loss=whole),
    "trl": partial(them, loss=tiled),
}


def measure(config: Any, tokens: int) -> dict[str, Row]:
    """The traffic and launches of one step on a trace of so many tokens, by who trains: of a layer, and in all."""
    rows: dict[str, Row] = {}
    layers = config.num_hidden_layers
    for who, take in WHO.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            two, three = (take(_with_layers(config, n), tokens) for n in (2, 3))
        layer, launches = _minus(three.bytes, two.bytes), _minus(three.launches, two.launches)
        rest = layers - 2
        by_name = {name: two.bytes[name] + rest * layer.get(name, 0) for name in three.bytes}
        rows[who] = {
            "bytes": sum(by_name.values()),
            "layer_bytes": sum(layer.values()),
            "launches": {kind: two.launches[kind] + rest * launches[kind] for kind in three.launches},
            "layer_launches": launches,
            "bytes_by_operation": dict(sorted(by_name.items(), key=lambda pair: -pair[1])),
            "layer_bytes_by_operation": dict(sorted(layer.items(), key=lambda pair: -pair[1])),
        }
    return rows


def _minus(more: Counter[str], less: Counter[str]) -> dict[str, int]:
    return {name: more[name] - less[name] for name in more}


def _with_layers(config: Any, count: int) -> Any:
    return type(config)(**{**config.to_dict(), "num_hidden_layers": count, "layer_types": None})
