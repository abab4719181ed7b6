"""The memory of a student and of a training step: the step itself is run on tensors without data.

On torch's meta device operations compute only shapes, so a model of any size is built and trained here in seconds, as
transformers and PEFT do it, while live bytes and operations are counted.
"""

import math
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from mot_lora.checkpoints.weights import quantization_config
from mot_lora.config import BranchConfig, LoraConfig
from mot_lora.planning.kernels import PRODUCTS, Attention, as_released, fused_without_data, register_attention
from mot_lora.training.adapter import add_adapter
from mot_lora.training.branch import set_checkpoints
from mot_lora.training.decoding import Decoding, Layer, next_logits
from mot_lora.training.lora import one_product
from mot_lora.training.loss import chunked_cross_entropy
from mot_lora.training.offload import NEAR, is_worth_moving

FEW = NEAR + 2  # layers; beyond this every further one adds the same


@dataclass(frozen=True)
class Weights:
    """The bytes of a student's weights: linear layers, all others, and the adapter in fp32; and numbers of parameters:
    of the largest adapted layer, and in total.
    """

    layers: int
    others: int
    adapter: int
    largest: int
    parameters: int


@dataclass(frozen=True)
class Step:
    """The memory of training on one batch, in bytes: what the forward pass saves, on the device and (offloaded) in host
    memory, and the additional peaks of the loss and of the layers' backward pass; and its floating-point operations.
    """

    kept: int
    host: int
    loss: int
    layer: int
    flops: float

    @property
    def peak(self) -> int:
        """The peak memory beside weights, gradients and optimizer state."""
        return self.kept + max(self.loss, self.layer)


def student(
    config: PreTrainedConfig, quantization: str, lora: LoraConfig, dtype: torch.dtype, attention: Attention
) -> Any:
    """The student with its adapter, without data, as `student.load_model` and `adapter.add_adapter` make it.

    Errors: UserError as in `add_adapter`; ValueError for a model that transformers does not know.

    >>> model = student(Qwen3Config(), "nf4", LoraConfig(), torch.bfloat16, "cuda")  # doctest: +SKIP
    """
    kind = register_attention(attention)
    with torch.device("meta"), warnings.catch_warnings(), as_released(_modeling(config)):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)
        model.requires_grad_(False)
        if quantization != "none":
            replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantization_config(quantization, dtype))
            for module in model.modules():
                if isinstance(module, Linear4bit):
                    _pack(module, dtype)
                elif isinstance(module, Linear8bitLt):
                    codes = torch.empty(module.weight.shape, dtype=torch.int8)
                    scales = torch.empty(module.out_features)
                    module.weight = cast("Any", Int8Params)(codes, requires_grad=False, CB=codes, SCB=scales)
            setattr(model, "is_loaded_in_4bit" if quantization == "nf4" else "is_loaded_in_8bit", True)
        return add_adapter(model, lora)


def weights(model: Any) -> Weights:
    """The memory of the parameters of a student without data."""
    layers = others = adapter = parameters = 0
    inner = set[int]()  # the linear layers' weights
    for module in model.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            layers += sum(t.nbytes for t in _tensors(module.weight))
            parameters += module.in_features * module.out_features
            inner.add(id(module.weight))
    adapted = [cast("Any", m) for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in adapted:
        if (weight := layer.get_base_layer().weight) is not None and id(weight) not in inner:
            layers, parameters = layers + weight.nbytes, parameters + weight.numel()
            inner.add(id(weight))
    for parameter in model.parameters():  # tied parameters count once
        if parameter.requires_grad:
            adapter += 4 * parameter.numel()
        elif id(parameter) not in inner:
            others, parameters = others + parameter.nbytes, parameters + parameter.numel()
    return Weights(layers, others, adapter, max(m.in_features * m.out_features for m in adapted), parameters)


def step(
    model: Any, batch: int, tokens: int, settings: BranchConfig, offload: bool = False, liger: bool = False
) -> Step:
    """The memory and operations of training on a batch of [batch, tokens], all of them trained.

    If all layers are alike, the model is run with a few of them and with one more, and extrapolated.

    >>> step(model, 1, 32768, BranchConfig(), offload=True).kept  # doctest: +SKIP
    """
    take = partial(_step, model, batch, tokens, settings, offload, liger)
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
    """A computation without gradients: its peak bytes, of which `cache` are the keys and values of `rows` rows, and its
    floating-point operations.
    """

    bytes: int
    flops: float
    cache: int = 0
    rows: int = 1


def measure(model: Any, batch: int, tokens: int, chunk: int) -> Pass:
    """The loss of a batch of [batch, tokens], all of them trained, with logits of `chunk` tokens at a time."""
    base = model.get_base_model().eval()

    def take() -> tuple[float, ...]:
        with _measuring(model) as live:
            states, every = _trained(_forward(base, batch, tokens).last_hidden_state)
            chunked_cross_entropy(states, base.get_output_embeddings(), every, chunk)
            return live.most, live.flops

    most, flops = _extended(model, take)
    return Pass(int(most), flops)


def answer(model: Any, rows: int, prompt: int, how: Decoding, read: int) -> Pass:
    """Decoding `rows` answers of maximum length to prompts of `prompt` tokens, as `decode` does.

    The bytes are the peak of reading prompts, `read` tokens at once, or of the last step; the operations
    are the last step's.
    """
    base, together = model.get_base_model().eval(), min(rows, max(read // prompt, 1))

    def prompts() -> list[Any]:
        cache = DynamicCache(config=base.config)
        _forward(base, together, prompt - 1, cache=cache)
        return [layer for layer in cast("list[Any]", cache.layers) if layer.is_initialized]

    def take() -> tuple[float, ...]:
        with _measuring(model) as live:
            layers = [Layer(of_prompt, rows, prompt + how.max_new_tokens) for of_prompt in prompts()]
            cache = live.bytes
            if together < rows:
                prompts()
            reading, live.most, live.flops = live.most, live.bytes, 0
            text = [0] * (prompt + how.max_new_tokens - 1)
            how.choose(next_logits(base, layers, [text] * rows), [0.5] * rows)
            return cache, reading, live.most, live.flops

    cache, reading, writing, flops = _extended(model, take)
    return Pass(int(max(reading, writing)), flops, int(cache), rows)


def _extended(model: Any, take: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """The numbers that `take` returns for all layers; if they are alike, extrapolated from two and three."""
    layers, alike = _layers(model)
    if not alike or len(layers) <= 3:
        return take()
    with _first(model, layers, 2):
        two = take()
    with _first(model, layers, 3):
        three = take()
    return tuple(y + (len(layers) - 3) * (y - x) for x, y in zip(two, three, strict=True))


class Live(TorchDispatchMode):
    """While active, counts the bytes of live tensors, their peak, and floating-point operations; tensors in `there` do
    not count.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.flops = 0.0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if product := PRODUCTS.get(func.name()):
            with self:
                return product(*args, **kwargs)
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


def _step(model: Any, batch: int, tokens: int, settings: BranchConfig, offload: bool, liger: bool) -> Step:
    base = model.get_base_model()
    set_checkpoints(base, settings)
    base.train()
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(torch.device("meta"))
        stack.enter_context(one_product(model))
        if any(m.p for m in model.modules() if isinstance(m, nn.Dropout)):  # then PEFT's own forward is used
            stack.enter_context(_autocast(model))
        stack.enter_context(as_released(_modeling(base.config)))
        stack.enter_context(fused_without_data(base) if liger else nullcontext())
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


def _forward(base: Any, batch: int, tokens: int, cache: Any = None) -> Any:
    ids = torch.empty(batch, tokens, dtype=torch.int64)
    # transformers uses a four-dimensional mask as it is, and the attention here ignores it
    mask = torch.empty(1, 1, 1, 1)
    return base.base_model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, past_key_values=cache)


def _trained(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Like `trained_tokens`, with all tokens trained."""
    every = torch.empty(hidden.shape[0] * (hidden.shape[1] - 1), dtype=torch.int64)
    return hidden[:, :-1].flatten(0, 1).index_select(0, every), every


@contextmanager
def _measuring(model: Any) -> Generator[Live]:
    released = as_released(_modeling(model.config))
    with _autocast(model), torch.no_grad(), torch.device("meta"), released, Live(_held(model)) as live:
        yield live


@contextmanager
def _autocast(model: Any) -> Generator[None]:
    """Within the block the adapter is in the student's dtype, as autocast computes it."""
    adapter = [(p, p.data) for p in model.parameters() if p.requires_grad]
    for parameter, data in adapter:
        parameter.data = data.to(model.dtype)
    try:
        yield
    finally:
        for parameter, data in adapter:
            parameter.data = data


def _pack(layer: Linear4bit, dtype: torch.dtype) -> None:
    """Give a layer the shapes of NF4: 4 bits an entry, 8 bits a block of 64 entries, 32 bits a block of 256 blocks."""
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


def _modeling(config: Any) -> ModuleType:
    """The module of transformers that defines a config's model."""
    return sys.modules[AutoModelForCausalLM._model_mapping[type(config)].__module__]


def _held(model: Any) -> Generator[Tensor]:
    """Every tensor that exists before a step."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield from _tensors(tensor)
        if tensor.grad is not None:
            yield tensor.grad


def _tensors(weight: Any) -> list[Tensor]:
    """The tensors of a layer's weight: its entries and its scales."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        return [weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    scales = getattr(weight, "SCB", None)
    return [weight] if scales is None else [weight, scales]


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
    """Within the block the model has only its first `count` layers."""
    decoder = model.get_base_model().base_model
    decoder.layers = layers[:count]
    try:
        yield
    finally:
        decoder.layers = layers


Moved = tuple[torch.Size, torch.dtype]


@contextmanager
def _offload(moved: list[Moved], dtype: torch.dtype) -> Generator[None]:
    """Layers' inputs are offloaded as `Offload` does it: NEAR of them are in copy to the host at once, and one is
    prefetched. Their shapes and dtypes are appended to `moved`.
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
