"""Names that wrappers leave in adapters: understood, in tensors and in the config, or refused by name."""

import copy
import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import change_config, change_tensors, refused, stored
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from wild import far, llama, lora, rename

from mot_lora import UserError, fold_checkpoint, load_adapter, merge_adapters, save_adapter

PEFT = "base_model.model."


def inside(wrapper: str, before: str) -> Callable[[str], str]:
    return lambda key: key.replace(before, f"{wrapper}.{before}", 1)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "compiled, the whole": lambda k: f"_orig_mod.{k}",
    "compiled, the base (huggingface/peft#2957)": inside("_orig_mod", "model.layers"),
    "compiled, each layer": inside("_orig_mod", "self_attn"),
    "compiled, each linear": inside("_orig_mod", "lora_"),
    "compiled, the LoRA's own layers": inside("_orig_mod", "weight"),
    "FSDP": lambda k: "_fsdp_wrapped_module." + inside("_fsdp_wrapped_module", "self_attn")(k),
    "FSDP of each factor": inside("_fsdp_wrapped_module", "weight"),
    "FSDP of torch 1.12": inside("_fsdp_wrapped_module._fpw_module", "self_attn"),
    "checkpointed layers": inside("_checkpoint_wrapped_module", "self_attn"),
    "FSDP, checkpointed, compiled": inside("_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod", "self_attn"),
    "DDP": lambda k: f"module.{k}",
    "DDP around DDP": lambda k: f"module.module.{k}",
    "DDP around the base": inside("module", "model.layers"),
    "DDP of a compiled model": lambda k: f"module._orig_mod.{k}",
    "a module of Lightning's": lambda k: f"model.{k}",
    "Fabric's": lambda k: f"_forward_module.{k}",
    "trl's value head": lambda k: f"pretrained_model.{k}",
    "PEFT twice": lambda k: PEFT + k,
    "PEFT three times": lambda k: PEFT + PEFT + k,
    "PEFT around DDP around PEFT": lambda k: f"{PEFT}module.{k}",
    "without PEFT's prefix": lambda k: k.removeprefix(PEFT),
    "without PEFT's prefix, DDP": lambda k: "module." + k.removeprefix(PEFT),
    "ms-swift's own": lambda k: k.removeprefix(PEFT).replace(".weight", ".default.weight"),
    "an adapter's name": lambda k: k.replace(".weight", ".default.weight"),
    "another adapter's name": lambda k: k.replace(".weight", ".my-teacher_1.weight"),
    "an adapter's name, FSDP": lambda k: k.replace(".weight", ".default._fsdp_wrapped_module.weight"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names") / "base"
    llama(folder)
    return folder


@pytest.fixture(scope="module")
def plain(base: Path) -> dict[str, Path]:
    """Two adapters as PEFT saves them, and their merge."""
    made = {name: base.parent / name for name in ("a", "b", "merged")}
    for seed, name in enumerate("ab"):
        lora(llama(), made[name], base=base, seed=seed)
    save_adapter(merge_adapters([made["a"], made["b"]]), made["merged"])
    return made


@pytest.fixture
def wrapped(plain: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter whose names are to be changed."""
    return Path(shutil.copytree(plain["a"], tmp_path / "a"))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_merge_has_names_that_peft_loads(plain: dict[str, Path], wrapped: Path, spelling: str) -> None:
    rename(wrapped, SPELLINGS[spelling])
    assert stored(wrapped).keys() != stored(plain["a"]).keys()
    out = wrapped.parent / "merged"
    save_adapter(merge_adapters([wrapped, plain["b"]]), out)
    assert far(stored(out), stored(plain["merged"])) == 0


def test_peft_loads_the_merge_of_wrapped_adapters(plain: dict[str, Path], wrapped: Path) -> None:
    rename(wrapped, SPELLINGS["compiled, the base (huggingface/peft#2957)"])
    save_adapter(merge_adapters([wrapped]), wrapped.parent / "merged")
    ids = torch.arange(3, 15).view(1, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it does not take up
        models = [PeftModel.from_pretrained(llama(), str(f)) for f in (wrapped.parent / "merged", plain["a"])]
    got, want = (m.eval()(ids).logits for m in models)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# --- as the wrappers themselves write them ---------------------------------------------------------------


def compiled(model: PeftModel) -> nn.Module:
    model.base_model.model = torch.compile(model.base_model.model)  # compiles nothing before it is called
    return model


def checkpointed(model: PeftModel) -> nn.Module:
    layers = model.base_model.model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    return model


WRAPPED: dict[str, Callable[[PeftModel], nn.Module]] = {
    "torch.compile of the base": compiled,
    "torch.compile of all": torch.compile,  # pyright: ignore
    "checkpoint_wrapper": checkpointed,
    "DataParallel": nn.DataParallel,
    "get_peft_model twice": lambda m: get_peft_model(m, LoraConfig(target_modules=["o_proj"], r=2), "second"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_state_dict_of_a_wrapped_model_is_read(plain: dict[str, Path], wrapped: Path, wrapper: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about two adapters in one model
        model = WRAPPED[wrapper](PeftModel.from_pretrained(llama(), str(plain["a"])))
    state = {k: t for k, t in model.state_dict().items() if ".default." in k}
    save_file(state, wrapped / "adapter_model.safetensors")
    want = load_adapter(plain["a"]).updates
    got = load_adapter(wrapped).updates
    assert got.keys() == want.keys()
    assert all(torch.equal(got[m].delta(), u.delta()) for m, u in want.items())


def test_a_whole_state_dict_is_read_with_its_base(base: Path, plain: dict[str, Path], wrapped: Path) -> None:
    """FSDP's and DeepSpeed's full state dicts hold the base's own weights beside the factors."""
    model = PeftModel.from_pretrained(llama(), str(plain["a"]))
    save_file({k: t.clone() for k, t in model.state_dict().items()}, wrapped / "adapter_model.safetensors")
    want, got = (load_adapter(f, base=base).updates for f in (plain["a"], wrapped))
    assert {m: u.shape for m, u in got.items()} == {m: u.shape for m, u in want.items()}
    change_config(wrapped, base_model_name_or_path="org/model")
    with pytest.raises(UserError, match=r"key base_model\.model\.\S+\.weight is no part of a LoRA.*--base"):
        load_adapter(wrapped)


@pytest.mark.parametrize("wrapper", [w for w in WRAPPED if w != "checkpoint_wrapper"])
def test_a_wrapped_live_model_is_read(plain: dict[str, Path], wrapper: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about two adapters in one model
        model: Any = WRAPPED[wrapper](PeftModel.from_pretrained(llama(), str(plain["a"])))
    source = (model, "default") if "twice" in wrapper else model
    got, want = merge_adapters([source]).adapters[0].updates, load_adapter(plain["a"]).updates
    assert got.keys() == want.keys()
    assert all(torch.equal(got[m].delta(), u.delta()) for m, u in want.items())


# --- the config ------------------------------------------------------------------------------------------

FULL = "model.layers.1.self_attn.q_proj"
ALL = [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"]
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # what wrappers leave, and what is meant
    "full names": (
        "compiled, the base (huggingface/peft#2957)",
        {"target_modules": [f"_orig_mod.{m}" for m in ALL]},
        {"target_modules": ALL},
    ),
    "a regex": (
        "compiled, each layer",
        {"target_modules": r"model\.layers\.\d+\._orig_mod\.self_attn\.[qv]_proj"},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"},
    ),
    "ranks": (
        "FSDP",
        {"r": 9, "rank_pattern": {rf"^model.layers.\d._fsdp_wrapped_module.self_attn.{x}_proj": 4 for x in "qv"}},
        {},
    ),
    "alphas": (
        "FSDP",
        {"alpha_pattern": {r"layers\.1\._fsdp_wrapped_module\.self_attn\.q_proj": 2}},
        {"alpha_pattern": {FULL: 2}},
    ),
    "DDP around the base": (
        "DDP around the base",
        {"target_modules": [f"module.{m}" for m in ALL]},
        {"target_modules": ALL},
    ),
    "PEFT twice": ("PEFT twice", {"target_modules": [PEFT + m for m in ALL]}, {"target_modules": ALL}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_in_the_config_are_understood(base: Path, plain: dict[str, Path], wrapped: Path, kind: str) -> None:
    spelling, left, meant = CONFIGS[kind]
    rename(wrapped, SPELLINGS[spelling])
    change_config(wrapped, **left)
    reference = Path(shutil.copytree(plain["a"], wrapped.parent / "reference"))
    change_config(reference, **meant)
    got, want = (load_adapter(f) for f in (wrapped, reference))
    assert all(torch.equal(got.updates[m].delta(), u.delta()) for m, u in want.updates.items())
    assert got.targets["target_modules"] == want.targets["target_modules"]
    fold_checkpoint(base, merge_adapters([got]), wrapped.parent / "out")  # nothing that the config lists is missing


def test_trained_copies_keep_their_names(base: Path, tmp_path: Path) -> None:
    lora(llama(), tmp_path / "a", base=base, modules_to_save=["lm_head"])
    change_tensors(tmp_path / "a", lambda t: t[f"{PEFT}lm_head.weight"].add_(0.5))
    fold_checkpoint(base, merge_adapters([tmp_path / "a"]), tmp_path / "want")
    for spelling in ("compiled, the whole", "DDP", "PEFT twice"):
        folder = Path(shutil.copytree(tmp_path / "a", tmp_path / spelling))
        rename(folder, SPELLINGS[spelling])
        fold_checkpoint(base, merge_adapters([folder]), tmp_path / f"{spelling} out")
        assert far(stored(tmp_path / f"{spelling} out"), stored(tmp_path / "want")) == 0
    named = rename_copies(tmp_path / "a", "modules_to_save.default")
    fold_checkpoint(base, merge_adapters([named]), tmp_path / "named out")
    assert far(stored(tmp_path / "named out"), stored(tmp_path / "want")) == 0


def rename_copies(folder: Path, owner: str) -> Path:
    def named(key: str) -> str:
        return re.sub(r"(lora_[AB])", r"\1.default", key).replace("lm_head.weight", f"lm_head.{owner}.weight")

    rename(folder, named)
    return folder


# --- what stays unknown ----------------------------------------------------------------------------------


def twice(how: Callable[[str], str], change: float = 0) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({how(k): x + change for k, x in copy.copy(t).items()})


def all_as(how: Callable[[str], str]) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({how(k): t.pop(k) for k in list(t)})


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "two adapters": (all_as(lambda k: re.sub("lora_([AB])", r"lora_\1.of_\1", k)), "two adapters"),
    "one adapter without a name": (all_as(lambda k: k.replace("lora_A", "lora_A.a")), "two adapters"),
    "two models": (all_as(lambda k: f"{'ab'['_A' in k]}.{k}"), "two models"),
    "one name twice": (twice(SPELLINGS["compiled, each layer"], 1.0), "names of one tensor"),
    "some without PEFT's prefix": (
        all_as(lambda k: k.removeprefix(PEFT) if "layers.0" in k else k),
        "not a LoRA factor",
    ),
    "an unknown wrapper": (all_as(lambda k: k.replace("self_attn", "_wrapped.self_attn")), "_wrapped"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_stays_unknown_is_refused_by_name(call: Any, wrapped: Path, kind: str) -> None:
    change, named = REFUSED[kind]
    change_tensors(wrapped, change)
    change_config(wrapped, base_model_name_or_path="org/model")
    message = refused(call("merge", wrapped, "--out", wrapped.parent / "out"))
    assert named in message
    assert any(key in message for key in stored(wrapped))
    assert not (wrapped.parent / "out").exists()


def test_the_same_tensor_under_two_names_is_one(plain: dict[str, Path], wrapped: Path) -> None:
    change_tensors(wrapped, twice(SPELLINGS["compiled, each layer"]))
    assert load_adapter(wrapped).updates.keys() == load_adapter(plain["a"]).updates.keys()


def test_a_name_that_its_base_has_is_no_wrappers(base: Path, wrapped: Path) -> None:
    rename(wrapped, lambda k: k.replace("q_proj", "_q_proj"))
    with pytest.raises(UserError, match=r"_q_proj\S* holds a name .*has no"):
        load_adapter(wrapped, base=base)


def test_a_dot_module_within_a_model_stays(wrapped: Path) -> None:
    rename(wrapped, lambda k: k.replace("self_attn", "language_module.self_attn"))
    change_config(wrapped, target_modules=[f"language_module.self_attn.{x}_proj" for x in "qv"])
    adapter = load_adapter(wrapped)
    assert "model.layers.0.language_module.self_attn.q_proj" in adapter.updates
    assert adapter.targets["target_modules"] == ["language_module.self_attn.q_proj", "language_module.self_attn.v_proj"]


# --- names of other classes ------------------------------------------------------------------------------


def test_adapters_of_a_model_without_its_head_need_the_base(
    base: Path, plain: dict[str, Path], tmp_path: Path, call: Any
) -> None:
    """Embedding models and AutoModel have `layers.0`, where a causal model has `model.layers.0`."""
    headless = llama().model
    lora(headless, tmp_path / "headless", base=base, seed=1, task_type=None)  # pyright: ignore
    assert "layers.0.self_attn.q_proj" in load_adapter(tmp_path / "headless").updates
    message = refused(call("merge", plain["a"], tmp_path / "headless", "--out", tmp_path / "m"))
    assert all(s in message for s in ("`a`", "`headless`", "model.layers.0.self_attn.q_proj", "--base"))
    assert call("merge", plain["a"], tmp_path / "headless", "--base", base, "--out", tmp_path / "m")[0] == 0
    assert call("merge", plain["a"], plain["b"], "--out", tmp_path / "want")[0] == 0
    assert far(stored(tmp_path / "m"), stored(tmp_path / "want")) == 0
    status, out, _ = call("inspect", plain["b"], tmp_path / "headless", "--base", base, "--json")
    assert status == 0
    assert json.loads(out)["overall"]["cosine"][0][1] == pytest.approx(1)
    assert call("merge", tmp_path / "headless", "--out", tmp_path / "alone")[0] == 0  # alone, it is one for AutoModel


def test_modules_of_two_names_within_an_adapter_are_two(plain: dict[str, Path]) -> None:
    a, b = (load_adapter(plain[n]) for n in "ab")
    both = {**a.updates, **{m.removeprefix("model."): u for m, u in b.updates.items()}}
    merged = merge_adapters([replace(a, updates=both), b])
    assert len(merged.shapes) == 8
