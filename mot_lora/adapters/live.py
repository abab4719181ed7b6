"""Adapters of a live PEFT model: read as updates, and their merge added as one more adapter."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import save_and_load
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from mot_lora.adapters.records import SaveRecord
from mot_lora.adapters.save import pack
from mot_lora.adapters.stored import StoredAdapter
from mot_lora.adapters.updates import updates
from mot_lora.adapters.wrappers import WRAPPERS, module_name, unwrapped_config
from mot_lora.checkpoints.weights import read_weight
from mot_lora.errors import UserError
from mot_lora.merging.lowrank import Adapter
from mot_lora.merging.merged import combine
from mot_lora.merging.methods import Method
from mot_lora.patterns import PerModule

_state_dicts = cast("Any", save_and_load)  # which has types only in part


def adapter_from_peft(model: PeftModel, name: str | None = None) -> Adapter:
    """A copy of one adapter of a live PEFT model, with the scaling it has now; the active one unless `name` is given.

    Errors: UserError when the model has no such adapter, or it cannot be merged exactly.

    >>> adapter_from_peft(peft_model, "default").updates.keys()  # doctest: +SKIP
    """
    peft: Any = model
    name = name or cast("str", peft.active_adapter)
    if name not in model.peft_config:
        raise UserError(f"the model has no adapter `{name}`; it has {', '.join(model.peft_config)}")
    config: dict[str, Any] = peft.peft_config[name].to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it guesses whether embeddings should be saved too
        state = _state_dicts.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {key: tensor.detach().clone() for key, tensor in state.items()}
    config = unwrapped_config(config, tensors)
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"adapter `{name}`: {key} holds numbers that are not finite; train it again")
    base = LiveBase(model)
    stored = StoredAdapter(
        f"adapter `{name}`",
        config,
        {key: tensor.shape for key, tensor in tensors.items()},
        tensors.__getitem__,
        lambda: base,
        lambda module: base.layer(module).scaling[name],
    )
    return Adapter(name, updates(stored), config.get("base_model_name_or_path"), config)


def add_merged_adapter(
    model: PeftModel,
    names: Sequence[str],
    new_name: str,
    method: str | Method = "linear",
    weights: Sequence[PerModule] | None = None,
    density: PerModule | None = None,
    scale: PerModule = 1.0,
    rank: int | None = None,
    seed: int = 0,
    space: str | None = None,
) -> SaveRecord:
    """Add an adapter that is the merge of others by their true deltas, in place of `add_weighted_adapter`.

    A linear merge is exact (rank sum(r)) without a rank; otherwise each module gets the best copy of `rank`, and the
    record says what it cost: the share |lost| / |D|, in all and by module. The base may be in 4, 8 or 16 bits, the
    adapters of different ranks and modules. The new adapter is frozen and not active (`model.set_adapter` makes it
    so); the other adapters and the global random state stay as they are. Other arguments as in `merge_adapters`.

    Errors: UserError for a name that is not there or already is, a merge that is not low-rank without a rank, and what
    `merge_adapters` says.

    >>> add_merged_adapter(model, ["a", "b"], "mean").lost  # doctest: +SKIP
    0.0
    """
    if new_name in model.peft_config:
        raise UserError(f"the model has an adapter `{new_name}` already; choose another name, or delete it first")
    adapters = [adapter_from_peft(model, name) for name in names]
    base = LiveBase(model)
    for module in (m for a in adapters for m, u in a.meta_updates.items() if u.form != "whole"):
        if isinstance(base.modules.get(module), AuxiliaryTrainingWrapper):
            raise UserError(
                f"{module}: PEFT cannot hold a LoRA beside trained tokens or a trained copy in one model; "
                "save the merge with save_adapter and load it into the plain base"
            )
    packed = pack(combine(adapters, method, weights, density, scale, seed, space), rank, filled=False)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with cast("Any", torch.random).fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tied weights: the update is the adapters' own
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        modes = [(module, module.training) for module in model.modules()]
        model.add_adapter(new_name, LoraConfig(**packed.config))
        result = _state_dicts.set_peft_model_state_dict(model, packed.tensors, adapter_name=new_name)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, False))
        for module, training in modes:
            module.training = training
    if result.unexpected_keys:
        model.delete_adapter(new_name)
        raise UserError(f"PEFT did not accept {result.unexpected_keys[0]} of the merge; nothing was added")
    return packed.record


@dataclass(frozen=True)
class LiveBase:
    """The base of a live PEFT model, as adapters ask for it: weights dequantized, without any adapter."""

    model: PeftModel

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Modules by their names in the base, without the wrappers that PEFT put around and under them."""
        found: dict[str, nn.Module] = {}
        modules: Iterator[tuple[str, nn.Module]] = cast("Any", self.model.get_base_model()).named_modules()
        for wrapped, module in modules:
            if any(child in WRAPPERS for child, _ in module.named_children()):
                continue
            name = module_name(wrapped)
            found.setdefault(name.replace(".base_layer", "").replace(".original_module", ""), module)
        return found

    @property
    def tied(self) -> Mapping[str, str]:
        base: Any = self.model.get_base_model()
        return cast("Mapping[str, str]", getattr(base, "all_tied_weights_keys", None) or {})

    def parameter(self, module: str) -> str:
        return f"{module}.weight" if module in self.modules else module

    def layer(self, module: str) -> Any:
        """The LoRA layer of a module, or of a bare parameter that is named in full."""
        layer: Any = self.modules.get(module)
        if isinstance(layer, LoraLayer) and not hasattr(layer, "parameter_name"):
            return layer
        owner, _, parameter = module.rpartition(".")
        layer = self.modules[owner]
        while getattr(layer, "parameter_name", parameter) != parameter:
            layer = layer.base_layer
        return layer

    def module(self, name: str) -> nn.Module:
        module: Any = self.modules[name]
        while isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
            module = module.get_base_layer() if isinstance(module, LoraLayer) else cast("Any", module).original_module
        return module

    def weight(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        if getattr(self.modules.get(module), "merged", False):
            raise UserError(f"{module}: adapters are merged into its weights; call the model's unmerge_adapter() first")
        if module in self.modules:
            layer = self.module(module)
            weight = read_weight(layer)
            return (weight.T if type(layer).__name__ == "Conv1D" else weight).to(dtype)
        owner, _, parameter = module.rpartition(".")
        return getattr(self.module(owner), parameter).detach().to(dtype)
