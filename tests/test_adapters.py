"""Adapter folders against PEFT itself: what it saves is read exactly, what is written it loads, the rest is refused."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mot_lora.adapters import CONFIG_FILE, REFUSED, WEIGHTS_FILE, adapter_from_peft, load_adapter, save_adapter
from mot_lora.errors import UserError
from mot_lora.lowrank import Adapter, Factors
from mot_lora.merged import combine as merge_adapters

MakeAdapter = Callable[..., Path]

KINDS: dict[str, dict[str, Any]] = {
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
}


def load_base(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def load_peft(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load_base(base), str(adapter)).eval()


def logits(model: torch.nn.Module) -> Tensor:
    tokens = torch.arange(4, 28).view(2, 12)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def logits_with(base: Path, deltas: Mapping[str, Tensor]) -> Tensor:
    """Logits of the base with dense updates added to its weights."""
    model = load_base(base)
    plain = logits(model)
    with torch.no_grad():
        for module, delta in deltas.items():
            model.get_submodule(module).weight += delta
    changed = logits(model)
    assert (changed - plain).abs().max() > 0.01  # else the comparison would not see a lost update
    return changed


def dense(adapter: Adapter) -> dict[str, Tensor]:
    return {m: f.scaling * (f.b.double() @ f.a.double()) for m, f in adapter.updates.items()}


def share_lost(full: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> float:
    """|D - D'| / |D| over all modules together."""
    assert full.keys() == small.keys()
    lost = sum(float((full[m].double() - small[m].double()).square().sum()) for m in full)
    return math.sqrt(lost / sum(float(d.double().square().sum()) for d in full.values()))


# --- reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_peft(student: Path, make_adapter: MakeAdapter, kind: str) -> None:
    path = make_adapter(student, "one", **KINDS[kind])
    adapter = load_adapter(path)
    live = load_peft(student, path)
    layers = {n: x for n, x in live.get_base_model().named_modules() if isinstance(x, LoraLayer)}
    assert adapter.name == "one"
    assert adapter.base == str(student)
    assert adapter.updates.keys() == layers.keys()
    for module, layer in layers.items():
        expected = layer.get_delta_weight("default")
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(adapter.updates[module].delta(), expected, rtol=1e-5, atol=1e-9)
    copy = adapter_from_peft(live)
    assert copy.updates.keys() == adapter.updates.keys()
    for module, f in copy.updates.items():
        assert torch.equal(f.a, adapter.updates[module].a)
        assert torch.equal(f.b, adapter.updates[module].b)
        assert f.scaling == pytest.approx(adapter.updates[module].scaling)


def test_a_name_can_be_given(qwen3: Path, make_adapter: MakeAdapter) -> None:
    assert load_adapter(str(make_adapter(qwen3, "one")), name="two").name == "two"


def test_a_copy_of_a_live_adapter_does_not_follow_its_training(qwen3: Path, make_adapter: MakeAdapter) -> None:
    live = load_peft(qwen3, make_adapter(qwen3, "one"))
    copy = adapter_from_peft(live)
    before = dense(copy)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    assert all(torch.equal(d, before[m]) for m, d in dense(copy).items())
    assert all(not f.a.requires_grad for f in copy.updates.values())


def test_one_of_several_live_adapters(qwen3: Path, make_adapter: MakeAdapter) -> None:
    live = load_peft(qwen3, make_adapter(qwen3, "one"))
    second = make_adapter(qwen3, "two", seed=1, r=2, target_modules=["q_proj"])
    live.load_adapter(str(second), "second")
    copy = adapter_from_peft(live, "second")
    assert copy.name == "second"
    assert share_lost(dense(load_adapter(second)), dense(copy)) == 0
    with pytest.raises(UserError, match="no adapter `third`; it has default, second"):
        adapter_from_peft(live, "third")


# --- writing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_saved(qwen3: Path, make_adapter: MakeAdapter, tmp_path: Path, kind: str) -> None:
    adapter = load_adapter(make_adapter(qwen3, "one", scale=0.1, **KINDS[kind]))
    assert save_adapter(adapter, tmp_path / "copy") == 0
    expected = logits_with(qwen3, {m: d.float() for m, d in dense(adapter).items()})
    torch.testing.assert_close(logits(load_peft(qwen3, tmp_path / "copy")), expected, rtol=1e-4, atol=1e-4)
    again = load_adapter(tmp_path / "copy")
    assert share_lost(dense(adapter), dense(again)) < 1e-7
    assert again.base == adapter.base


@pytest.fixture
def unlike(student: Path, make_adapter: MakeAdapter) -> list[Adapter]:
    """Adapters of different ranks, scalings and modules."""
    return [
        load_adapter(make_adapter(student, "a", seed=1, scale=0.1, r=3, lora_alpha=7)),
        load_adapter(
            make_adapter(student, "b", seed=2, scale=0.1, r=5, use_rslora=True, target_modules=["q_proj", "up_proj"])
        ),
        load_adapter(
            make_adapter(
                student, "c", seed=3, scale=0.1, target_modules=["q_proj", "o_proj"], rank_pattern={"q_proj": 1}
            )
        ),
    ]


def test_a_linear_merge_is_saved_exactly(student: Path, unlike: list[Adapter], tmp_path: Path) -> None:
    merged = merge_adapters(unlike, weights=(2, 1, 3), scale=1.5)
    assert save_adapter(merged, tmp_path / "merged") == 0
    live = load_peft(student, tmp_path / "merged")
    expected = {
        m: 1.5 * sum(w * dense(a)[m] for w, a in zip((2, 1, 3), unlike, strict=True) if m in a.updates) / 6
        for m in unlike[0].factors
    }
    torch.testing.assert_close(
        logits(live), logits_with(student, {m: d.float() for m, d in expected.items()}), rtol=1e-4, atol=1e-4
    )
    saved = load_adapter(tmp_path / "merged")
    assert {f.rank for f in saved.updates.values()} == {3, 7, 8, 9}
    assert share_lost(expected, dense(saved)) < 1e-6


@pytest.mark.parametrize("rank", [1, 4, 8, 100])
def test_a_smaller_rank_tells_what_it_lost(student: Path, unlike: list[Adapter], tmp_path: Path, rank: int) -> None:
    merged = merge_adapters(unlike)
    lost = save_adapter(merged, tmp_path / "small", rank=rank)
    saved = load_adapter(tmp_path / "small")
    full = {m: merged.delta(m, torch.float64) for m in merged.shapes}
    assert max(f.rank for f in saved.updates.values()) == min(rank, 9)
    assert lost == pytest.approx(share_lost(full, dense(saved)), abs=1e-6)
    assert (lost > 1e-4) == (rank < 9)
    best = {m: (torch.linalg.svdvals(d)[rank:] ** 2).sum() for m, d in full.items()}
    assert lost == pytest.approx(math.sqrt(sum(best.values()) / sum(d.square().sum() for d in full.values())), abs=1e-6)
    expected = logits_with(student, {m: d.float() for m, d in dense(saved).items()})
    torch.testing.assert_close(logits(load_peft(student, tmp_path / "small")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_a_sparse_merge_is_saved_at_a_rank(student: Path, unlike: list[Adapter], tmp_path: Path, method: str) -> None:
    merged = merge_adapters(unlike, method, density=0.3)
    lost = save_adapter(merged, tmp_path / "sparse", rank=8)
    saved = load_adapter(tmp_path / "sparse")
    full = {m: d.double() for m, d in merged}
    assert {f.rank for f in saved.updates.values()} == {8}
    assert lost == pytest.approx(share_lost(full, dense(saved)), abs=1e-6)
    assert 0.05 < lost < 1
    best = sum(float((torch.linalg.svdvals(d)[8:] ** 2).sum()) for d in full.values())
    assert lost == pytest.approx(math.sqrt(best / sum(float(d.square().sum()) for d in full.values())), abs=1e-6)
    expected = logits_with(student, {m: d.float() for m, d in dense(saved).items()})
    torch.testing.assert_close(logits(load_peft(student, tmp_path / "sparse")), expected, rtol=1e-4, atol=1e-4)


def test_a_sparse_merge_at_full_rank_loses_nothing(unlike: list[Adapter], tmp_path: Path) -> None:
    merged = merge_adapters(unlike, "ties", density=0.3)
    assert save_adapter(merged, tmp_path / "all", rank=128) == pytest.approx(0, abs=1e-6)
    assert share_lost(dict(merged), dense(load_adapter(tmp_path / "all"))) < 1e-6


@pytest.mark.parametrize("kind", ["alpha != r", "rslora", "patterns"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_three_thirds_of_an_adapter_are_that_adapter(
    qwen3: Path, make_adapter: MakeAdapter, tmp_path: Path, kind: str, method: str
) -> None:
    path = make_adapter(qwen3, "one", scale=0.1, **KINDS[kind])
    copies = [load_adapter(path, name) for name in ("a", "b", "c")]
    merged = merge_adapters(copies, method, [1 / 3] * 3, None if method == "linear" else 1.0)
    save_adapter(merged, tmp_path / "merged", rank=None if method == "linear" else 8)
    expected = logits(load_peft(qwen3, path))
    torch.testing.assert_close(logits(load_peft(qwen3, tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)


def test_a_sparse_merge_without_a_rank_is_refused(tmp_path: Path) -> None:
    merged = merge_adapters([small_adapter()], "ties", density=0.5)
    with pytest.raises(UserError, match="ties merge is not low-rank"):
        save_adapter(merged, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_ranks_of_modules_with_like_names_stay_apart(tmp_path: Path) -> None:
    names = ["model.layers.1.q", "model.layers.11.q", "layers.1.q", "q", "model.layersX1.q"]
    generator = torch.Generator().manual_seed(0)
    factors = {
        n: Factors(torch.randn(i + 1, 8, generator=generator), torch.randn(8, i + 1, generator=generator), 0.5 * i + 1)
        for i, n in enumerate(names)
    }
    save_adapter(Adapter("a", factors), tmp_path / "a")
    again = load_adapter(tmp_path / "a")
    assert {n: f.rank for n, f in again.updates.items()} == {n: i + 1 for i, n in enumerate(names)}
    assert share_lost(dense(Adapter("a", factors)), dense(again)) < 1e-7


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


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS_FILE)


def refusal(path: Path, *named: str) -> str:
    with pytest.raises(UserError) as e:
        load_adapter(path)
    message = str(e.value)
    assert "\n" not in message
    assert all(n in message for n in (str(path), *named)), message
    return message


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer:UserWarning")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias: all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights: pissa_niter_2"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: olora"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_adapters_that_peft_makes_otherwise_are_refused_by_name(
    llama: Path, make_adapter: MakeAdapter, settings: dict[str, Any], named: str
) -> None:
    path = make_adapter(llama, "other", target_modules=["q_proj", "up_proj"], **settings)
    refusal(path, CONFIG_FILE, named)
    with pytest.raises(UserError, match=named):
        adapter_from_peft(get_peft_model(load_base(llama), LoraConfig(**{"target_modules": ["q_proj"], **settings})))


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_each_refused_setting_is_named(folder: Path, key: str) -> None:
    load_adapter(folder)
    change_config(folder, **{key: {"x": 1}})
    refusal(folder, CONFIG_FILE, key)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_fine(folder: Path, init: bool | str) -> None:
    change_config(folder, init_lora_weights=init)
    assert load_adapter(folder).updates.keys() == small_adapter().updates.keys()


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "PiSSA"])
def test_starts_that_change_the_base_are_refused(folder: Path, init: str) -> None:
    change_config(folder, init_lora_weights=init)
    refusal(folder, CONFIG_FILE, f"init_lora_weights: {init}")


@pytest.mark.parametrize("config", [IA3Config, LoHaConfig])
def test_other_kinds_of_adapter_are_refused(llama: Path, tmp_path: Path, config: type[IA3Config | LoHaConfig]) -> None:
    extra = {"feedforward_modules": []} if config is IA3Config else {}
    live = get_peft_model(load_base(llama), config(target_modules=["q_proj"], task_type="CAUSAL_LM", **extra))
    live.save_pretrained(str(tmp_path / "other"))
    refusal(tmp_path / "other", CONFIG_FILE, "LORA")
    with pytest.raises(UserError, match="`default`"):
        adapter_from_peft(live)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_trained_embeddings_are_refused(llama: Path, make_adapter: MakeAdapter) -> None:
    path = make_adapter(llama, "embedding", target_modules=["q_proj", "embed_tokens"])
    refusal(path, WEIGHTS_FILE, "embed_tokens")
    with pytest.raises(UserError, match="embed_tokens"):
        adapter_from_peft(load_peft(llama, path))


def write(file: str, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(text)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, change)


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: change_config(folder, **changes)


PREFIX = "base_model.model.model.layers.0.q_proj"
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (shutil.rmtree, [CONFIG_FILE]),
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
    "other type": (config(peft_type="LOHA"), [CONFIG_FILE, "LORA"]),
    "no rank": (config(r=None), [PREFIX[17:], CONFIG_FILE, "rank 2"]),
    "other rank": (config(r=3), [PREFIX[17:], CONFIG_FILE, "rank 2", "says 3"]),
    "other rank in the pattern": (config(rank_pattern={"q_proj": 9}), [PREFIX[17:], "rank 2", "says 9"]),
    "alpha is a text": (config(lora_alpha="8"), [CONFIG_FILE, "lora_alpha", "'8'"]),
    "no alpha": (config(lora_alpha=None), [CONFIG_FILE, "lora_alpha"]),
    "alpha is not finite": (config(lora_alpha=math.nan), [CONFIG_FILE, "lora_alpha"]),
    "rank_pattern is a list": (config(rank_pattern=["q_proj"]), [CONFIG_FILE, "rank_pattern"]),
    "rank_pattern is no regex": (config(rank_pattern={"(q_proj": 2}), [CONFIG_FILE, "rank_pattern"]),
    "alpha_pattern is a list": (config(alpha_pattern=["q_proj"]), [CONFIG_FILE, "alpha_pattern"]),
    "stray key": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)})),
        [WEIGHTS_FILE, "base_model.model.lm_head.weight"],
    ),
    "magnitude vector": (
        tensors(lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(5)})),
        [WEIGHTS_FILE, f"{PREFIX}.lora_magnitude_vector"],
    ),
    "bias of B": (
        tensors(lambda t: t.update({f"{PREFIX}.lora_B.bias": torch.ones(5)})),
        [WEIGHTS_FILE, f"{PREFIX}.lora_B.bias"],
    ),
    "A without B": (tensors(lambda t: t.pop(f"{PREFIX}.lora_B.weight")), [WEIGHTS_FILE, PREFIX[17:], "lora_A"]),
    "B without A": (tensors(lambda t: t.pop(f"{PREFIX}.lora_A.weight")), [WEIGHTS_FILE, PREFIX[17:], "lora_B"]),
    "A and B of different ranks": (
        tensors(lambda t: t.update({f"{PREFIX}.lora_B.weight": torch.ones(5, 3)})),
        [WEIGHTS_FILE, PREFIX[17:], "[2, 6]", "[5, 3]"],
    ),
    "a convolution": (
        tensors(lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(2, 6, 3, 3)})),
        [WEIGHTS_FILE, PREFIX[17:]],
    ),
    "a scalar": (
        tensors(lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.tensor(1.0)})),
        [WEIGHTS_FILE, PREFIX[17:]],
    ),
    "rank 0": (
        lambda f: (
            change_config(f, r=0, rank_pattern={}),
            change_tensors(f, lambda t: t.update({k: x[:0] if "_A" in k else x[:, :0] for k, x in t.items()})),
        ),
        [PREFIX[17:]],
    ),
    "not a number in A": (
        tensors(lambda t: t[f"{PREFIX}.lora_A.weight"].fill_(math.nan)),
        [WEIGHTS_FILE, PREFIX[17:]],
    ),
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
        assert load_adapter(folder).factors
    except UserError as e:
        message = str(e)
    else:
        message = str(folder)
    shutil.rmtree(folder)
    assert str(folder) in message
