"""What a PEFT LoRA config asks for: which modules, and what cannot be an update of the base."""

import re
from collections.abc import Mapping
from typing import Any, cast

# What a LoRA config can ask for that no update of the base's parameters is, and what it is.
REFUSED = {
    "layer_replication": "its base has other layers than the checkpoint",
    "alora_invocation_tokens": "it is active on some tokens only",
    "use_qalora": "its A acts on pooled inputs",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "its base is changed by an SVD",
    "monteclora_config": "its weights are random",
    "velora_config": "it holds a projection for training beside its factors",
}
# These start from factors taken out of the base, so that the update is not scaling * B @ A on the original weights.
REFUSED_INITS = {"pissa", "olora", "corda", "loftq", "lora_ga"}


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why an adapter with this config is no update of its base's parameters, or None."""
    if str(getattr(config.get("peft_type"), "value", config.get("peft_type"))) != "LORA":
        return f"peft_type {config.get('peft_type')}: only LORA adapters can be merged"
    for key, why in REFUSED.items():
        if config.get(key):
            return f"{key}: {why}"
    if config.get("bias", "none") != "none":
        return f"bias: {config['bias']}: the biases are the base's own, which adapters overwrite for one another"
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().split("_niter")[0] in REFUSED_INITS:
        return f"init_lora_weights: {init}: its base is not the original one; convert it to plain LoRA first"
    return None


def is_within(module: str, target: str) -> bool:
    """Whether the name of a module, or of one around it, ends like this: PEFT's rule for modules_to_save."""
    parts = module.split(".")
    return any(".".join(parts[: i + 1]).endswith(target) for i in range(len(parts)))


def ends(module: str, target: str) -> bool:
    """Whether a module is called like this, or ends so at a dot."""
    return module == target or module.endswith(f".{target}")


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether an adapter's config asks for a LoRA on this module."""
    targets = config.get("target_modules")
    if targets == "all-linear":  # PEFT writes out what it found, so this says nothing
        return False
    if not any(config.get(key) for key in ("exclude_modules", "layers_to_transform", "modules_to_save")):
        return bool(re.fullmatch(targets, module)) if isinstance(targets, str) else _any_ends(module, targets)
    from peft import LoraConfig  # its own rule for the rare cases: it takes seconds to load
    from peft.tuners import tuners_utils

    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    asked: Any = LoraConfig(**cast("Any", {k: config.get(k) for k in keys}))
    return bool(cast("Any", tuners_utils).check_target_module_exists(asked, module))


def _any_ends(module: str, targets: Any) -> bool:
    return any(ends(module, t) for t in targets or ())
