"""Adapter folders against PEFT itself: what it saves is read exactly, every tensor of it, and the rest is refused."""

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeAdapter, change_config, change_tensors, dense, fresh, peft_adapter, share_lost, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from test_updates import KINDS
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mot_lora import UserError, adapter_from_peft, fold_checkpoint, load_adapter, merge_adapters, save_adapter
from mot_lora.adapters.load import WEIGHTS_FILE
from mot_lora.adapters.stored import CONFIG_FILE
from mot_lora.checkpoints.targets import REFUSED, REFUSED_INITS
from mot_lora.merging.lowrank import Adapter, Factors

SETTINGS: dict[str, dict[str, Any]] = {
    "alpha = r": {"r": 4, "lora_alpha": 4},
    "alpha != r": {"r": 4, "lora_alpha": 11},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"v_proj": 5, r"layers\.0\.self_attn\.q_proj": 3},
    },
    "rslora and patterns": {
        "use_rslora": True,
        "rank_pattern": {"^model.layers.0.self_attn.k_proj": 7},
        "alpha_pattern": {"gate_proj|up_proj": 1},
    },
    "few modules": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "a regex": {"target_modules": r".*\.0\.self_attn\.[qk]_proj"},
    "all but": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "MiCA": {"init_lora_weights": "mica", "target_modules": ["q_proj"]},
}


def load_base(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


# --- reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETTINGS)
def test_updates_are_those_of_peft(student: Path, make_adapter: MakeAdapter, kind: str) -> None:
    path = make_adapter(student, "one", **SETTINGS[kind])
    adapter = load_adapter(path)
    live = PeftModel.from_pretrained(load_base(student), str(path)).eval()
    layers = {n: x for n, x in live.get_base_model().named_modules() if isinstance(x, LoraLayer)}
    assert adapter.name == "one"
    assert adapter.base == str(student)
    assert adapter.updates.keys() == layers.keys()
    for module, layer in layers.items():
        expected = layer.get_delta_weight("default")
        assert expected.abs().max() > 1e-5
        assert adapter.updates[module].shape == expected.shape
        torch.testing.assert_close(adapter.updates[module].delta(), expected, rtol=1e-5, atol=1e-8)
    copy = adapter_from_peft(live)
    assert copy.updates.keys() == adapter.updates.keys()
    for module, f in copy.updates.items():
        assert torch.equal(f.a, adapter.updates[module].a)
        assert torch.equal(f.b, adapter.updates[module].b)
        assert f.scaling == pytest.approx(adapter.updates[module].scaling)
    fold_checkpoint(student, merge_adapters([adapter]), path.parent / "folded", verify=True)  # nothing is missing


def test_a_name_can_be_given(qwen3: Path, make_adapter: MakeAdapter) -> None:
    assert load_adapter(str(make_adapter(qwen3, "one")), name="two").name == "two"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_factors_may_be_of_any_precision(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda t: t.update({k: x.to(dtype) for k, x in t.items()}))
    tensors = stored(folder)
    for module, update in load_adapter(folder).updates.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        assert a.dtype == dtype
        torch.testing.assert_close(update.delta(torch.float64), b.double() @ a.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "copies", "tokens", "DoRA", "bias", "embedding, tied"])
def test_what_was_loaded_stays_when_the_folder_goes(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[KINDS[kind].base]
    for seed, name in enumerate(("one", "other")):
        peft_adapter(base, tmp_path / name, seed, **KINDS[kind].settings)
    first, second = (load_adapter(tmp_path / "one", base=base) for _ in range(2))
    want = {m: u.delta() for m, u in load_adapter(tmp_path / "one", base=base).updates.items()}
    other = load_adapter(tmp_path / "other", base=base)

    save_adapter(merge_adapters([first, other]), tmp_path / "one", rank=48 if kind == "DoRA" else None)  # onto itself
    assert all(torch.equal(u.delta(), want[m]) for m, u in first.updates.items())
    merged = {m: u.delta() for m, u in load_adapter(tmp_path / "one", base=base).updates.items()}
    for module, delta in merged.items():
        torch.testing.assert_close(delta, (want[module] + other.updates[module].delta()) / 2, rtol=1e-3, atol=1e-5)
    shutil.rmtree(tmp_path / "one")
    assert all(torch.equal(u.delta(), want[m]) for m, u in second.updates.items())


def test_an_adapter_takes_no_memory_of_its_own(folder: Path) -> None:
    update = load_adapter(folder).updates
    assert update["model.layers.0.q_proj"].a.data_ptr() != update["model.layers.0.q_proj"].a.data_ptr()


# --- refusals ----------------------------------------------------------------------------------------


def small_adapter(rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"model.layers.{i}.q_proj": Factors(
            torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
        )
        for i in range(2)
    }
    return Adapter("small", factors, "some/base")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small adapter folder, to be damaged."""
    save_adapter(small_adapter(), tmp_path / "small")
    return tmp_path / "small"


def refusal(path: Path, *named: str, **settings: Any) -> str:
    with pytest.raises(UserError) as e:
        load_adapter(path, **settings)
    message = str(e.value)
    assert "\n" not in message
    assert all(n in message for n in (str(path), *named)), message
    return message


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_2"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [3, 4]},
    ],
    ids=str,
)
def test_adapters_that_peft_makes_otherwise_are_refused_by_name(
    bases: dict[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    peft_adapter(bases["qwen2"], tmp_path / "other", 0, target_modules=["q_proj", "up_proj"], **settings)
    ((key, value),) = settings.items()
    refusal(tmp_path / "other", key, f"{key}: {value}" if isinstance(value, str) else key, base=bases["qwen2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
        live = get_peft_model(fresh(bases["qwen2"]), config)
    with pytest.raises(UserError, match=rf"`default`.*{key}"):
        adapter_from_peft(live)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_each_refused_setting_is_named_with_the_reason(folder: Path, key: str) -> None:
    load_adapter(folder)
    change_config(folder, **{key: {"x": 1}})
    refusal(folder, WEIGHTS_FILE, key, REFUSED[key])
    change_config(folder, **{key: None})
    load_adapter(folder)


def test_every_variant_of_lora_that_peft_has_is_known() -> None:
    """PEFT marks the settings that change what a LoRA computes: each one must be supported or refused."""
    fields = LoraConfig.__dataclass_fields__
    variants = {name for name, f in fields.items() if f.metadata.get("is_lora_variant")}
    assert len(variants) >= 5
    assert variants - {"use_dora"} <= set(REFUSED)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_fine(folder: Path, init: bool | str) -> None:
    change_config(folder, init_lora_weights=init)
    assert load_adapter(folder).updates.keys() == small_adapter().updates.keys()


@pytest.mark.parametrize("init", [*sorted(REFUSED_INITS), "PiSSA", "pissa_niter_4"])
def test_starts_that_change_the_base_are_refused(folder: Path, init: str) -> None:
    change_config(folder, init_lora_weights=init)
    refusal(folder, f"init_lora_weights: {init}")


@pytest.mark.parametrize("kind", sorted(k.value for k in PeftType if k.value != "LORA"))
def test_every_other_type_of_peft_is_refused(folder: Path, kind: str) -> None:
    change_config(folder, peft_type=kind)
    refusal(folder, CONFIG_FILE, "LORA")


@pytest.mark.parametrize("config", [IA3Config, LoHaConfig])
def test_other_kinds_of_live_adapter_are_refused(bases: dict[str, Path], config: Any) -> None:
    extra = {"feedforward_modules": []} if config is IA3Config else {}
    live = get_peft_model(fresh(bases["tied"]), config(target_modules=["q_proj"], task_type="CAUSAL_LM", **extra))
    with pytest.raises(UserError, match=r"`default`.*LORA"):
        adapter_from_peft(live)


def test_an_adapter_in_pickles_is_refused(folder: Path) -> None:
    torch.save(stored(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()
    refusal(folder, WEIGHTS_FILE, "safe_serialization=True")


def write(file: str, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(text)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, change)


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: change_config(folder, **changes)


PREFIX = "base_model.model.model.layers.0.q_proj"
MODULE = PREFIX.removeprefix("base_model.model.")
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (shutil.rmtree, ["neither a local folder nor a"]),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), [CONFIG_FILE]),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), [WEIGHTS_FILE, "safe_serialization=True"]),
    "weights are a folder": (
        lambda f: ((f / WEIGHTS_FILE).unlink(), (f / WEIGHTS_FILE).mkdir()),
        [WEIGHTS_FILE],
    ),
    "config is a folder": (lambda f: ((f / CONFIG_FILE).unlink(), (f / CONFIG_FILE).mkdir()), [CONFIG_FILE]),
    "cut-off weights": (
        lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-9]),
        [WEIGHTS_FILE, "damaged"],
    ),
    "empty weights": (write(WEIGHTS_FILE, b""), [WEIGHTS_FILE, "damaged"]),
    "weights that are a git-lfs pointer": (
        write(WEIGHTS_FILE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        [WEIGHTS_FILE, "damaged"],
    ),
    "no tensors": (tensors(lambda t: t.clear()), [WEIGHTS_FILE, "no LoRA factors"]),
    "broken JSON": (write(CONFIG_FILE, b'{"r": 2,'), [CONFIG_FILE, "not JSON"]),
    "not UTF-8": (write(CONFIG_FILE, b'{"r": "\xff"}'), [CONFIG_FILE, "not JSON"]),
    "a list": (write(CONFIG_FILE, b"[1]"), [CONFIG_FILE]),
    "no type": (config(peft_type=None), [CONFIG_FILE, "LORA"]),
    "no rank": (config(r=None), [MODULE, CONFIG_FILE, "rank"]),
    "other rank": (config(r=3), [MODULE, CONFIG_FILE, "rank 2", "says 3"]),
    "other rank in the pattern": (config(rank_pattern={"q_proj": 9}), [MODULE, "rank 2", "says 9"]),
    "rank in the pattern is a text": (config(rank_pattern={"q_proj": "2"}), [MODULE, "'2'"]),
    "alpha is a text": (config(lora_alpha="8"), [CONFIG_FILE, "lora_alpha", "'8'"]),
    "alpha in the pattern is a text": (config(alpha_pattern={"q_proj": "8"}), ["lora_alpha", "'8'"]),
    "no alpha": (config(lora_alpha=None), [CONFIG_FILE, "lora_alpha"]),
    "alpha is not finite": (config(lora_alpha=math.nan), [CONFIG_FILE, "lora_alpha"]),
    "rank_pattern is a list": (config(rank_pattern=["q_proj"]), [CONFIG_FILE, "rank_pattern"]),
    "rank_pattern is no regex": (config(rank_pattern={"(q_proj": 2}), [CONFIG_FILE, "rank_pattern"]),
    "alpha_pattern is a list": (config(alpha_pattern=["q_proj"]), [CONFIG_FILE, "alpha_pattern"]),
    "stray key": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)})),
        [WEIGHTS_FILE, "base_model.model.lm_head.weight"],
    ),
    "a key without PEFT's prefix": (
        tensors(lambda t: t.update({"model.q_proj.lora_A.weight": torch.ones(2, 2)})),
        [WEIGHTS_FILE, "model.q_proj.lora_A.weight", "base_model.model."],
    ),
    "a key with an adapter's name": (
        tensors(lambda t: t.update({f"{PREFIX}.lora_A.default.weight": t.pop(f"{PREFIX}.lora_A.weight")})),
        [WEIGHTS_FILE, f"{PREFIX}.lora_A.default.weight"],
    ),
    "magnitude vector": (
        tensors(lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(5)})),
        [WEIGHTS_FILE, f"{PREFIX}.lora_magnitude_vector"],
    ),
    "bias of B": (
        tensors(lambda t: t.update({f"{PREFIX}.lora_B.bias": torch.ones(5)})),
        [WEIGHTS_FILE, f"{PREFIX}.lora_B.bias"],
    ),
    "A without B": (tensors(lambda t: t.pop(f"{PREFIX}.lora_B.weight")), [WEIGHTS_FILE, MODULE, "lora_A"]),
    "B without A": (tensors(lambda t: t.pop(f"{PREFIX}.lora_A.weight")), [WEIGHTS_FILE, MODULE, "lora_B"]),
    "A and B of different ranks": (
        tensors(lambda t: t.update({f"{PREFIX}.lora_B.weight": torch.ones(5, 3)})),
        [WEIGHTS_FILE, MODULE, "[2, 6]", "[5, 3]"],
    ),
    "a convolution": (
        tensors(lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(2, 6, 3, 3)})),
        [WEIGHTS_FILE, MODULE],
    ),
    "a scalar": (tensors(lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.tensor(1.0)})), [WEIGHTS_FILE, MODULE]),
    "rank 0": (
        lambda f: (
            change_config(f, r=0, rank_pattern={}),
            change_tensors(f, lambda t: t.update({k: x[:0] if "_A" in k else x[:, :0] for k, x in t.items()})),
        ),
        [MODULE],
    ),
    "not a number in A": (tensors(lambda t: t[f"{PREFIX}.lora_A.weight"].fill_(math.nan)), [WEIGHTS_FILE, MODULE]),
    "infinity in B": (
        tensors(lambda t: t[f"{PREFIX}.lora_B.weight"][1].fill_(math.inf)),
        [WEIGHTS_FILE, f"{PREFIX}.lora_B.weight", "finite"],
    ),
    "modules_to_save and no module": (
        config(modules_to_save=["lm_head"]),
        [WEIGHTS_FILE, "lm_head", "modules_to_save"],
    ),
    "tokens and no token": (config(trainable_token_indices=[1, 2]), [WEIGHTS_FILE, "trainable_token_indices"]),
    "DoRA and no magnitudes": (config(use_dora=True), [WEIGHTS_FILE, MODULE, "magnitude"]),
    "lora_bias and no bias": (config(lora_bias=True), [WEIGHTS_FILE, MODULE, "bias"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(folder: Path, damage: str) -> None:
    change, named = DAMAGES[damage]
    change(folder)
    refusal(folder, *named)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_damaged_bytes_raise_nothing_but_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    save_adapter(small_adapter(), folder)
    file = folder / data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 700) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        updates = load_adapter(folder).updates
        assert updates
        assert all(u.delta().ndim == 2 for u in updates.values())
    except UserError as e:
        message = str(e)
    else:
        message = str(folder)
    shutil.rmtree(folder)
    assert str(folder) in message


# --- every tensor is accounted for -----------------------------------------------------------------------

KEYS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_A.bias", "lora_embedding_A", "lora_embedding_B")
OTHERS = ("lora_magnitude_vector", "base_layer.weight", "base_layer.bias", "weight", "bias", "lora_C.weight")
MODULES = (MODULE, "model.layers.1.q_proj", "model.layers.0.k_proj", "model.embed_tokens", "lm_head", "model", "")
names = st.one_of(
    st.text(min_size=1, max_size=20),
    st.text(max_size=20).map(lambda t: f"base_model.model.{t}"),
    st.tuples(
        st.sampled_from(MODULES),
        st.sampled_from([*KEYS, *OTHERS, "token_adapter.trainable_tokens_delta", "lora_magnitude_vector.weight"]),
    ).map(lambda p: f"base_model.model.{p[0]}.{p[1]}"),
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(names, st.lists(st.integers(0, 6), max_size=3), st.data())
def test_a_tensor_too_many_is_refused_by_its_name(
    tmp_path_factory: pytest.TempPathFactory, name: str, shape: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("extra")
    save_adapter(small_adapter(), folder)
    held = stored(folder)
    if name in (*held, "__metadata__"):  # what the format itself has this name for
        return
    extra = torch.ones(data.draw(st.sampled_from([shape, [5], [5, 6]])))
    needs_base = name.endswith("base_layer.weight")  # to be held against
    save_file({**held, name: extra}, folder / WEIGHTS_FILE)
    with pytest.raises(UserError) as e:
        load_adapter(folder)
    module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
    told = str(e.value)
    name, module = (x.replace("\r", " ").replace("\n", " ") for x in (name, module))  # in one line
    assert name in told or f"module {module} has only" in told or (needs_base and "needs its base's weights" in told)
    shutil.rmtree(folder)


def test_a_second_pair_for_one_module_is_refused(folder: Path) -> None:
    pair = {
        f"{PREFIX}.base_layer.lora_A.weight": torch.ones(2, 6),
        f"{PREFIX}.base_layer.lora_B.weight": torch.ones(5, 2),
    }
    change_tensors(folder, lambda t: t.update(pair))
    refusal(folder, MODULE)


@pytest.fixture(scope="module", params=KINDS)
def whole(
    request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A base and an adapter folder of each kind."""
    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    peft_adapter(bases[kind.base], folder, 0, **kind.settings)
    return bases[kind.base], folder


def accepted(base: Path, folder: Path, held: dict[str, Tensor], out: Path) -> bool:
    """Whether an adapter of just these tensors can be folded; it must not write anything if not."""
    save_file(held, folder / WEIGHTS_FILE)
    try:
        fold_checkpoint(base, merge_adapters([load_adapter(folder, base=base)]), out)
    except UserError as e:
        assert "\n" not in str(e)  # noqa: PT017
        assert not out.exists()
        return False
    shutil.rmtree(out)
    return True


def test_no_tensor_can_be_missing(whole: tuple[Path, Path], tmp_path: Path) -> None:
    base, original = whole
    folder = Path(shutil.copytree(original, tmp_path / "adapter"))
    held = stored(original)
    # PEFT's copy of a base's weight beside its LoRA says nothing that the base does not
    needed = [k for k in held if "base_layer.weight" not in k]
    missed = [k for k in needed if accepted(base, folder, {n: t for n, t in held.items() if n != k}, tmp_path / "out")]
    assert missed == []
    assert accepted(base, folder, held, tmp_path / "out")


def test_no_module_can_be_missing(whole: tuple[Path, Path], tmp_path: Path) -> None:
    base, original = whole
    settings = json.loads((original / CONFIG_FILE).read_text())
    folder = Path(shutil.copytree(original, tmp_path / "adapter"))
    held = stored(original)
    module_of = {
        k: k.partition(".lora_")[0] if ".lora_" in k else k.rpartition(".")[0].removesuffix(".base_layer") for k in held
    }
    missed = []
    shared = "base_model.model.lm_head" if settings["trainable_token_indices"] else None  # it has the tokens, at least
    for module in sorted(set(module_of.values()) - {shared}):
        left = {k: t for k, t in held.items() if module_of[k] != module}
        if accepted(base, folder, left, tmp_path / "out"):
            missed.append(module)
    assert missed == []


# --- what needs the base, and fits it or not -------------------------------------------------------------

NEEDY = ["DoRA", "DoRA of an embedding", "copies", "tokens", "tokens, untied", "embedding", "copy, tied", "experts"]


@pytest.mark.parametrize("kind", NEEDY)
def test_what_needs_its_base_says_so(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, folder = bases[KINDS[kind].base], tmp_path / "adapter"
    peft_adapter(base, folder, 0, **KINDS[kind].settings)
    want = {m: u.delta() for m, u in load_adapter(folder).updates.items()}  # of the base that it names
    for gone in ("gone/base", str(tmp_path / "nothing"), None):
        change_config(folder, base_model_name_or_path=gone)
        refusal(folder, "base= or --base")
        got = {m: u.delta() for m, u in load_adapter(folder, base=base).updates.items()}
        assert all(torch.equal(got[m], d) for m, d in want.items())


def test_a_base_that_is_named_wrongly_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    peft_adapter(bases["tied"], folder, 0, **KINDS["copies"].settings)
    with pytest.raises(UserError, match="not a model folder"):
        load_adapter(folder, base=tmp_path)
    with pytest.raises(UserError, match="an adapter, not a model"):
        load_adapter(folder, base=folder)
    with pytest.raises(UserError, match=r"has no|in its base|is not the base's"):
        load_adapter(folder, base=bases["gpt2"])


@pytest.mark.parametrize("kind", ["embedding", "embedding and head"])
def test_a_resized_vocabulary_is_refused(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[KINDS[kind].base]
    peft_adapter(base, tmp_path / "adapter", 0, **KINDS[kind].settings)
    (copy,) = [k for k in stored(tmp_path / "adapter") if "embed_tokens.base_layer" in k]
    change_tensors(tmp_path / "adapter", lambda t: t.update({copy: torch.cat([t[copy], t[copy][:2]])}))
    refusal(tmp_path / "adapter", copy, "resized")


def test_a_copy_that_is_not_the_bases_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    peft_adapter(bases["tied"], tmp_path / "adapter", 0, **KINDS["embedding"].settings)
    (copy,) = [k for k in stored(tmp_path / "adapter") if "base_layer" in k]
    change_tensors(tmp_path / "adapter", lambda t: t[copy][7, 3].add_(0.01))
    refusal(tmp_path / "adapter", copy, "not the base's")
    # the same copy in fewer bits is no other copy
    base = stored(bases["tied"])["model.embed_tokens.weight"]
    change_tensors(tmp_path / "adapter", lambda t: t.update({copy: base.bfloat16()}))
    load_adapter(tmp_path / "adapter")


def test_a_copy_of_another_shape_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    peft_adapter(bases["tied"], tmp_path / "adapter", 0, **KINDS["copies"].settings)
    key = "base_model.model.model.embed_tokens.weight"
    change_tensors(tmp_path / "adapter", lambda t: t.update({key: t[key][:-1]}))
    refusal(tmp_path / "adapter", key, "in its base")


@pytest.mark.parametrize("tokens", [[3], [3, 5, 6], None, {"lm_head": [3, 5]}])
def test_tokens_that_do_not_fit_are_refused(bases: dict[str, Path], tmp_path: Path, tokens: Any) -> None:
    peft_adapter(bases["tied"], tmp_path / "adapter", 0, **KINDS["tokens"].settings)
    change_config(tmp_path / "adapter", trainable_token_indices=tokens)
    refusal(tmp_path / "adapter", "trainable_tokens_delta")


@pytest.mark.parametrize("tokens", [[3, 40], [3, -1], [3, "5"], [3, 3]], ids=str)
def test_tokens_that_the_base_does_not_have_are_refused(bases: dict[str, Path], tmp_path: Path, tokens: Any) -> None:
    peft_adapter(bases["tied"], tmp_path / "adapter", 0, **KINDS["tokens"].settings)
    change_config(tmp_path / "adapter", trainable_token_indices=tokens)
    with pytest.raises(UserError, match="token"):
        merge_adapters([tmp_path / "adapter"]).delta("model.embed_tokens")


def test_a_bias_needs_a_layer_that_has_one(bases: dict[str, Path], tmp_path: Path) -> None:
    peft_adapter(bases["qwen2"], tmp_path / "adapter", 0, target_modules=["o_proj"], lora_bias=True)
    adapter = load_adapter(tmp_path / "adapter")
    assert "model.layers.0.self_attn.o_proj.bias" in adapter.updates
    with pytest.raises(UserError, match=r"o_proj\.bias: its layer has no bias.*`adapter`"):
        fold_checkpoint(bases["qwen2"], merge_adapters([adapter]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_share_lost_and_dense_are_what_tests_think(folder: Path) -> None:
    adapter = load_adapter(folder)
    assert share_lost(dense(adapter), {m: d * 0.5 for m, d in dense(adapter).items()}) == pytest.approx(0.5)
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["r"] == config["lora_alpha"] == 2
