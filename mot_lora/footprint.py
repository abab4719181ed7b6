"""What a student and a training step take in memory: the step itself, run on tensors that hold no data.

On torch's meta device every operation gives shapes alone, so a model of any size is built and trained here in seconds,
layer by layer as transformers and PEFT do it, while the bytes alive and the operations are counted.
"""

import math
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.quantizers.base import get_keys_to_not_convert

from mot_lora.branch import add_adapter, set_checkpoints
from mot_lora.config import BranchConfig, LoraConfig
from mot_lora.lora import one_product
from mot_lora.loss import chunked_cross_entropy
from mot_lora.offload import NEAR, is_worth_moving
from mot_lora.weights import quantization_config

FEW = NEAR + 2  # layers, after which one more adds what every other one does
Attention = Literal["cuda", "repeated", "cpu"]
"""By which kernel attention is computed, none of which makes a matrix of scores: FlashAttention-2; before Ampere the
memory-efficient one, which has keys and values once for each head; or the CPU's."""


@dataclass(frozen=True)
class Weights:
    """What a student's weights take, in bytes: its linear layers, all else, and the adapter, in fp32. And numbers of
    parameters: of the largest layer that is adapted, and in all.
    """

    layers: int
    others: int
    adapter: int
    largest: int
    parameters: int


@dataclass(frozen=True)
class Step:
    """What one batch adds while it is trained on, in bytes: what the forward pass keeps, on the device and (with
    offloading) in host memory, and beside that at most, while the loss and while the layers go backward; and its
    floating-point operations.
    """

    kept: int
    host: int
    loss: int
    layer: int
    flops: float

    @property
    def peak(self) -> int:
        """The most that is held at once beside weights, gradients and the optimizer's state."""
        return self.kept + max(self.loss, self.layer)


def student(
    config: PreTrainedConfig, quantization: str, lora: LoraConfig, dtype: torch.dtype, attention: Attention
) -> Any:
    """The student with its adapter, without data: what `base.load_model` and `branch.add_adapter` make.

    int8 layers are nf4 ones here, and counted twice by `weights`.

    Errors: UserError as `add_adapter`; ValueError for a model that transformers does not know.

    >>> model = student(Qwen3Config(), "nf4", LoraConfig(), torch.bfloat16, "cuda")  # doctest: +SKIP
    """
    _register_attention()
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=f"{PLANNED}_{attention}")
        model.requires_grad_(False)
        if quantization != "none":
            replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantization_config("nf4", dtype))
            for module in model.modules():
                if isinstance(module, Linear4bit):
                    _pack(module, dtype)
            model.is_loaded_in_4bit = True
        return add_adapter(model, lora)


def weights(model: Any, quantization: str) -> Weights:
    """What the parameters of a student without data take."""
    layers = others = adapter = parameters = 0
    inner = set[int]()  # the linear layers' weights
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = cast("Any", module.weight).quant_state
            nf4 = sum(t.nbytes for t in (module.weight, state.absmax, state.state2.absmax))
            layers += nf4 if quantization == "nf4" else 2 * module.weight.nbytes + 4 * module.out_features
            parameters += module.in_features * module.out_features
            inner.add(id(module.weight))
    adapted = [cast("Any", m) for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in adapted:
        if (weight := layer.get_base_layer().weight) is not None and id(weight) not in inner:
            layers, parameters = layers + weight.nbytes, parameters + weight.numel()
            inner.add(id(weight))
    for parameter in model.parameters():  # each once, also where two are tied
        if parameter.requires_grad:
            adapter += 4 * parameter.numel()
        elif id(parameter) not in inner:
            others, parameters = others + parameter.nbytes, parameters + parameter.numel()
    return Weights(layers, others, adapter, max(m.in_features * m.out_features for m in adapted), parameters)


def step(model: Any, batch: int, tokens: int, settings: BranchConfig, offload: bool) -> Step:
    """What training on a batch of [batch, tokens] adds to the weights, all its tokens with loss.

    Where a model's layers are all alike it is run with a few of them and with one more, and the rest is that
    difference.

    >>> step(model, 1, 32768, BranchConfig(), offload=True).kept  # doctest: +SKIP
    """
    take = partial(_step, model, batch, tokens, settings, offload)
    layers, alike = _layers(model)
    if not alike or len(layers) <= FEW + 1:
        return take()
    with _first(model, layers, FEW):
        few = take()
    with _first(model, layers, FEW + 1):
        one_more = take()
    rest = len(layers) - FEW - 1
    return Step(
        kept=one_more.kept + rest * (one_more.kept - few.kept),
        host=one_more.host + rest * (one_more.host - few.host),
        loss=one_more.loss,
        layer=one_more.layer,
        flops=one_more.flops + rest * (one_more.flops - few.flops),
    )


@dataclass(frozen=True)
class Pass:
    """What is computed without gradients: the bytes that it adds at most, of which `cache` are keys and values, and its
    floating-point operations.
    """

    bytes: int
    cache: int
    flops: float


def measure(model: Any, batch: int, tokens: int, chunk: int) -> Pass:
    """The loss of [batch, tokens], all of them with loss, logits in chunks of so many tokens."""
    base = model.get_base_model().eval()

    def take() -> Pass:
        with _measuring(model) as live:
            states, every = _trained(_forward(base, batch, tokens).last_hidden_state)
            chunked_cross_entropy(states, base.get_output_embeddings(), every, chunk)
            return Pass(live.most, 0, live.flops)

    return _extended(model, take)


def answer(model: Any, batch: int, prompt: int, tokens: int) -> Pass:
    """Answers to padded prompts, [batch, prompt], where all have become `tokens` long: reading the prompts, or the last
    token with the keys and values of all others. The operations are the last token's.
    """
    base = model.get_base_model().eval()

    def take() -> Pass:
        with _measuring(model) as live:
            _forward(base, batch, prompt, torch.empty(batch, 1, prompt, prompt), DynamicCache(config=base.config))
            read = live.most
            cache = DynamicCache(config=base.config)
            _forward(base, batch, tokens - 1, None, cache)
            live.most, live.flops = live.bytes, 0
            base.get_output_embeddings()(
                _forward(base, batch, 1, torch.empty(batch, 1, 1, tokens), cache).last_hidden_state
            )
            return Pass(max(read, live.most), live.bytes, live.flops)

    return _extended(model, take)


def _extended(model: Any, take: Callable[[], Pass]) -> Pass:
    """`take` of all layers; where they are alike, from the first one and two."""
    layers, alike = _layers(model)
    if not alike or len(layers) <= 2:
        return take()
    with _first(model, layers, 1):
        one = take()
    with _first(model, layers, 2):
        two = take()
    rest = len(layers) - 2
    cache, flops = rest * (two.cache - one.cache), rest * (two.flops - one.flops)
    return Pass(two.bytes + cache, two.cache + cache, two.flops + flops)


class Live(TorchDispatchMode):
    """Counts, while it is on, the bytes of the tensors that are alive, their most, and floating-point operations;
    not what was there before.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.flops = 0.0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name() == "bitsandbytes::gemm_4bit":
            with self:
                return _product(*args, **kwargs)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += cast("Any", formula)(*args, **kwargs, out_val=result)
        return result

    def _see(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, count: int) -> None:
        self.bytes -= count


# --- the step ------------------------------------------------------------------------------------


def _step(model: Any, batch: int, tokens: int, settings: BranchConfig, offload: bool) -> Step:
    base = model.get_base_model()
    set_checkpoints(base, settings)
    base.train()
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(torch.device("meta"))
        stack.enter_context(one_product(model))
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        live = stack.enter_context(Live(_held(model)))
        moved: list[Moved] = []
        if offload:
            stack.enter_context(_offload(moved, base.dtype))
        hidden = _forward(base, batch, tokens).last_hidden_state
        kept, live.most = live.bytes, 0
        loss_peak = 0

        def reach_layers(_: Tensor) -> None:
            nonlocal loss_peak
            loss_peak, live.most = live.most, live.bytes

        hidden.register_hook(reach_layers)
        states, every = _trained(hidden)
        del hidden
        loss = chunked_cross_entropy(states, base.get_output_embeddings(), every, settings.loss_chunk)
        del states
        loss.backward()
        host = sum(math.prod(shape) * dtype.itemsize for shape, dtype in moved)
    for parameter in model.parameters():
        parameter.grad = None
    return Step(kept, host, loss_peak - kept, live.most - kept, live.flops)


def _forward(base: Any, batch: int, tokens: int, padding: Tensor | None = None, cache: Any = None) -> Any:
    """The model without its head on so many tokens, after those in a cache; `padding` is a mask of four dimensions."""
    ids = torch.empty(batch, tokens, dtype=torch.int64)
    mask = torch.empty(1, 1, 1, 1) if padding is None else padding  # one of four dimensions is taken as it is
    return base.base_model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, past_key_values=cache)


def _trained(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """As `trained_tokens`, where all are."""
    every = torch.empty(hidden.shape[0] * (hidden.shape[1] - 1), dtype=torch.int64)
    return hidden[:, :-1].flatten(0, 1).index_select(0, every), every


@contextmanager
def _measuring(model: Any) -> Generator[Live]:
    """Without gradients, and with the adapter in what autocast makes of it."""
    adapter = [(p, p.data) for p in model.parameters() if p.requires_grad]
    for parameter, data in adapter:
        parameter.data = data.to(model.dtype)
    try:
        with torch.no_grad(), torch.device("meta"), Live(_held(model)) as live:
            yield live
    finally:
        for parameter, data in adapter:
            parameter.data = data


def _product(x: Tensor, codes: Tensor, shape: Any, absmax: Tensor, block: int, kind: str, *rest: Any) -> Tensor:
    """What a Linear4bit does with many tokens: its weight in x's format, and one product."""
    ops: Any = torch.ops.bitsandbytes
    bias, quantized, code, offset = rest
    scales = ops.dequantize_blockwise(quantized, absmax, code, 256, torch.float32) + offset
    weight = ops.dequantize_4bit(codes, scales, block, kind, shape, x.dtype)
    flat = torch.mm(x.flatten(0, -2), weight.t())  # what `linear` would be here, but counted
    return (flat if bias is None else flat.add_(bias)).unflatten(0, x.shape[:-1])


def _pack(layer: Linear4bit, dtype: torch.dtype) -> None:
    """Give a layer the shapes that quantizing it gives: 4 bits an entry, 8 a block of 64, 32 a block of 256 blocks."""
    count, shape = layer.weight.numel(), layer.weight.shape
    blocks = math.ceil(count / 64)
    inner = QuantState(torch.empty(math.ceil(blocks / 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    layer.weight = cast("Any", Params4bit)(
        torch.empty(math.ceil(count / 2), 1, dtype=torch.uint8),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        bnb_quantized=True,
        quant_state=QuantState(
            torch.empty(blocks, dtype=torch.uint8),
            shape=shape,
            code=torch.empty(16),
            blocksize=64,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.empty(()),
            state2=inner,
        ),
    )
    cast("Any", layer).support_avx512bf16_for_cpu = False


def _held(model: Any) -> Generator[Tensor]:
    """Every tensor that is there before a step."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        if tensor.grad is not None:
            yield tensor.grad
        if (state := getattr(tensor, "quant_state", None)) is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def _layers(model: Any) -> tuple[nn.ModuleList, bool]:
    """A decoder's layers, and whether they are all alike."""
    layers = getattr(model.get_base_model().base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return nn.ModuleList(), False
    kinds = {
        (getattr(layer, "attention_type", None), *((n, p.shape, p.dtype) for n, p in layer.named_parameters()))
        for layer in layers
    }
    return layers, len(kinds) == 1


@contextmanager
def _first(model: Any, layers: nn.ModuleList, count: int) -> Generator[None]:
    """The model with its first layers alone."""
    decoder = model.get_base_model().base_model
    decoder.layers = layers[:count]
    try:
        yield
    finally:
        decoder.layers = layers


Moved = tuple[torch.Size, torch.dtype]


@contextmanager
def _offload(moved: list[Moved], dtype: torch.dtype) -> Generator[None]:
    """Layers' inputs out of the device's memory and back, as `Offload` does it: NEAR of them leave at once, and while
    one is used the next is on its way. `moved` is told what they are.
    """
    leaving: deque[Tensor] = deque(maxlen=NEAR)
    coming: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor | int:
        if not is_worth_moving(tensor, dtype):
            return tensor
        leaving.append(tensor)
        moved.append((tensor.shape, tensor.dtype))
        return len(moved) - 1

    def fetched(number: int) -> Tensor:
        shape, dtype = moved[number]
        return torch.empty(shape, dtype=dtype, device="meta")

    def unpack(packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        leaving.clear()
        here = coming.pop(packed, None)
        if packed:
            coming[packed - 1] = fetched(packed - 1)
        return fetched(packed) if here is None else here

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# --- attention -----------------------------------------------------------------------------------

PLANNED = "planned"


@custom_op("mot_lora::attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError  # it has shapes alone


@_attend.register_fake
def _(q: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@custom_op("mot_lora::attention_backward", mutates_args=())
def _attend_backward(q: Tensor, k: Tensor, v: Tensor, expanded: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    raise NotImplementedError


@_attend_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, expanded: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    # FlashAttention-2 sums q's gradient in fp32, and writes those of shared keys and values once for each head
    scratch = [q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)]
    scratch += [torch.empty_like(q), torch.empty_like(q)] if q.shape[1] != k.shape[1] else []
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), scratch if expanded else []


@register_flop_formula(torch.ops.mot_lora.attention)
def _forward_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    batch, heads, tokens, width = q
    seen = tokens if tokens == k[2] else 2 * k[2]  # half of each of the two products is masked, but for a last token
    return 2 * batch * heads * tokens * seen * width


@register_flop_formula(torch.ops.mot_lora.attention_backward)
def _backward_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    return 5 * _forward_flops(q, k) // 2


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, expanded: bool) -> Tensor:
        output, sums = _attend(q, k, v)
        ctx.save_for_backward(q, k, v, output, sums)
        ctx.expanded = expanded
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        q, k, v, *_rest = ctx.saved_tensors
        return *_attend_backward(q, k, v, ctx.expanded)[:3], None


def _register_attention() -> None:
    def attend(
        _: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, repeats: bool, expanded: bool, **__: Any
    ) -> Any:
        if repeats or (mask is not None and mask.shape[-1] > 1):  # torch's kernels share no heads where some is masked
            k, v = (repeat_kv(x, q.shape[1] // x.shape[1]) for x in (k, v))
        return cast("Tensor", _Flash.apply(q, k, v, expanded)).transpose(1, 2).contiguous(), None

    kinds: Mapping[Attention, Callable[..., Any]] = {
        "cuda": partial(attend, repeats=False, expanded=True),
        "repeated": partial(attend, repeats=True, expanded=True),
        "cpu": partial(attend, repeats=False, expanded=False),
    }
    for name, function in kinds.items():
        AttentionInterface.register(f"{PLANNED}_{name}", function)
        AttentionMaskInterface.register(f"{PLANNED}_{name}", lambda *_, **__: None)
