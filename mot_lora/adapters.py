"""PEFT LoRA adapters, from a folder or a live model, as factors; and factors as a PEFT folder."""

import json
import math
import re
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mot_lora.errors import UserError
from mot_lora.lowrank import Adapter, Factors, inner, truncate
from mot_lora.merged import Merged

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# What a LoRA config can ask for that is not scaling * B @ A on a frozen linear layer, and what it is.
REFUSED = {
    "use_dora": "DoRA also rescales the columns of the base",
    "lora_bias": "its B has a bias",
    "modules_to_save": "it carries whole trained modules",
    "trainable_token_indices": "it carries trained embeddings",
    "fan_in_fan_out": "its base holds transposed weights (Conv1D)",
    "target_parameters": "it trains parameters that are not linear layers (experts)",
    "layer_replication": "its base has other layers than the checkpoint",
    "alora_invocation_tokens": "it is active on some tokens only",
    "use_qalora": "its A acts on pooled inputs",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "its base is changed by an SVD",
    "monteclora_config": "its weights are random",
    "velora_config": "its inputs are projected",
}
# These start from factors taken out of the base, so that the update is not scaling * B @ A on the original weights.
REFUSED_INITS = {"pissa", "olora", "corda", "loftq", "lora_ga"}


def load_adapter(path: str | Path, name: str | None = None, device: str | torch.device = "cpu") -> Adapter:
    """Read a PEFT LoRA folder. Every tensor in it is used, or the folder is refused.

    D = alpha/r * B @ A, alpha/sqrt(r) * B @ A for rsLoRA; rank_pattern and alpha_pattern count.
    The adapter is named after its folder unless `name` is given.

    Errors: UserError, which names the file, and the key or setting that cannot be merged exactly.

    >>> load_adapter("runs/demo/round-001/steps").name  # doctest: +SKIP
    'steps'
    """
    path = Path(path)
    config = _read_config(path)
    if why := _refusal(config):
        raise UserError(f"{path / CONFIG_FILE}: cannot be merged exactly: {why}")
    file = path / WEIGHTS_FILE
    if not file.exists():
        raise UserError(f"{path}: has no {WEIGHTS_FILE}; save the adapter again with safe_serialization=True")
    try:
        tensors = load_file(file, device=str(device))
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: damaged or not safetensors ({e}); copy or train it again") from e
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise UserError(f"{file}: key {key} is not a LoRA factor of a linear layer, so it cannot be merged")
        halves.setdefault(match[1], {})[match[2]] = tensor
    factors: dict[str, Factors] = {}
    for module, half in sorted(halves.items()):
        if set(half) != {"A", "B"}:
            raise UserError(f"{file}: module {module} has only its lora_{min(half)}")
        a, b = half["A"], half["B"]
        if a.ndim != 2 or b.ndim != 2 or not 0 < a.shape[0] == b.shape[1]:
            raise UserError(
                f"{file}: module {module}: A {list(a.shape)} and B {list(b.shape)} are not [r, in] and [out, r]"
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(f"{file}: module {module} holds numbers that are not finite; train it again")
        factors[module] = Factors(a, b, _scaling(config, module, a.shape[0], file))
    if not factors:
        raise UserError(f"{file}: holds no LoRA factors")
    return Adapter(name or path.name, factors, config.get("base_model_name_or_path"))


def adapter_from_peft(model: PeftModel, name: str = "default") -> Adapter:
    """A copy of one adapter of a live PEFT model, with the scaling it has now.

    Errors: UserError when the model has no such adapter, or it cannot be merged exactly.

    >>> adapter_from_peft(peft_model, "default").factors.keys()  # doctest: +SKIP
    """
    if name not in model.peft_config:
        raise UserError(f"the model has no adapter `{name}`; it has {', '.join(model.peft_config)}")
    if why := _refusal(model.peft_config[name].to_dict()):
        raise UserError(f"adapter `{name}` cannot be merged exactly: {why}")
    if model.peft_config[name].peft_type != "LORA":
        raise UserError(f"adapter `{name}` is not a LoRA adapter; only peft_type LORA can be merged")
    for module, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_embedding_A:
            raise UserError(f"adapter `{name}`: {module} is an embedding, whose update cannot be merged")
    factors = {
        module: Factors(
            cast("Any", layer.lora_A)[name].weight.detach().clone(),
            cast("Any", layer.lora_B)[name].weight.detach().clone(),
            layer.scaling[name],
        )
        for module, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and name in layer.lora_A
    }
    return Adapter(name, factors, model.peft_config[name].base_model_name_or_path)


def save_adapter(adapter: Adapter | Merged, path: str | Path, rank: int | None = None) -> float:
    """Write a folder that PEFT loads, and return the share |lost| / |D| of the update that `rank` cost.

    Without a rank the copy is exact (in fp32): factors as they are, or concatenated for a linear merge. With one,
    each module gets its best copy of that rank. The scaling is folded into B, so r = alpha in the written config.

    Errors: UserError for a TIES or DARE merge without a rank.

    >>> save_adapter(merge_adapters([a, b]), "merged", rank=16)  # doctest: +SKIP
    0.031
    """
    modules = adapter.shapes if isinstance(adapter, Merged) else adapter.factors
    lost_sq = total_sq = 0.0
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module in modules:
        exact = _exact_factors(adapter, module, rank)
        written, lost = (exact, 0.0) if rank is None or rank >= exact.rank else truncate(exact, rank)
        norm_sq = inner(exact, exact)
        lost_sq, total_sq = lost_sq + lost**2 * norm_sq, total_sq + norm_sq
        ranks[module] = written.rank
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = written.a.float().contiguous().cpu()
        tensors[f"{prefix}.lora_B.weight"] = (written.b.float() * written.scaling).contiguous().cpu()
    top = max(ranks.values())
    other = {rf"^{re.escape(m)}": r for m, r in ranks.items() if r != top}
    base = adapter.adapters[0].base if isinstance(adapter, Merged) else adapter.base
    config = LoraConfig(
        r=top,
        lora_alpha=top,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=sorted(ranks),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(path))
    save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
    return math.sqrt(lost_sq / total_sq) if total_sq else 0.0


def _exact_factors(adapter: Adapter | Merged, module: str, rank: int | None) -> Factors:
    if isinstance(adapter, Adapter):
        return adapter.factors[module]
    if adapter.method == "linear" or rank is None:
        return adapter.factors(module)
    dense = adapter.delta(module)
    # a dense result has no factors to start from: put an identity on its shorter side
    eye = torch.eye(min(dense.shape), device=dense.device)
    return Factors(dense, eye) if dense.shape[0] <= dense.shape[1] else Factors(eye, dense)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.exists():
        raise UserError(f"{path}: not an adapter folder: it has no {CONFIG_FILE}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: not JSON ({e})") from e
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{file}: not a LoRA adapter; only peft_type LORA can be merged")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        try:
            if not isinstance(pattern, dict):
                raise TypeError("not a mapping")
            for regex in pattern:
                re.compile(rf"(.*\.)?({regex})$")
        except (TypeError, re.error) as e:
            raise UserError(f"{file}: {key} must map patterns of module names to numbers ({e})") from e
    return config


def _refusal(config: dict[str, Any]) -> str | None:
    """Why an adapter with this config is not scaling * B @ A on linear layers, or None."""
    for key, why in REFUSED.items():
        if config.get(key):
            return f"{key}: {why}"
    if config.get("bias", "none") != "none":
        return f"bias: {config['bias']}: it carries trained biases"
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().split("_niter")[0] in REFUSED_INITS:
        return f"init_lora_weights: {init}: its base is not the original one; convert it to plain LoRA first"
    return None


def _scaling(config: dict[str, Any], module: str, rank: int, file: Path) -> float:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    said = ranks.get(get_pattern_key(list(ranks), module), config.get("r"))
    if said != rank:
        raise UserError(f"{file}: module {module} has rank {rank}, but {CONFIG_FILE} says {said}")
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{file.with_name(CONFIG_FILE)}: lora_alpha is not a number: {alpha!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
