"""Experts stored one by one or stacked, and adapters that hold one LoRA an expert or one of all."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from conftest import apart, stored
from safetensors.torch import save_file
from test_names import TEXT, check, folded, logits, made, store
from torch import Tensor
from wild import far, lora

from mot_lora import UserError

ROUTED = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
MLA = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_group": 1, "topk_group": 1, "head_dim": 4, "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], t.PreTrainedModel]] = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2-moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**TEXT, **ROUTED, num_experts=4, shared_expert_intermediate_size=24)
    ),
    "qwen3-moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**TEXT, **ROUTED, num_experts=4, head_dim=8)),
    "deepseek-v3": lambda: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(**{**TEXT, **MLA}, **ROUTED, n_routed_experts=4, first_k_dense_replace=1)
    ),
    "olmoe": lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2)),
}
PROJECTIONS = {"mixtral": ["w1", "w2", "w3"]}
BESIDE = {"nothing": [], "head": ["lm_head"], "embedding": ["embed_tokens"], "router": ["gate"]}


def adapter(folder: Path, base: dict[str, Tensor], modules: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
    """One LoRA for each of these linear layers, as PEFT wrote them before transformers 5; the true updates in fp64."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    updates: dict[str, Tensor] = {}
    for module in modules:
        out, into = base[f"{module}.weight"].shape
        a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((4, into), (out, 4)))
        embedding = module.endswith("embed_tokens")
        suffix = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
        factors = (b.T, a.T) if embedding else (a, b)
        tensors |= {f"base_model.model.{module}.lora_{s}": f for s, f in zip(suffix, factors, strict=True)}
        updates[f"{module}.weight"] = 2 * b.double() @ a.double()
    folder.mkdir()
    save_file({k: x.contiguous() for k, x in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return updates


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beside", BESIDE)
def test_one_lora_an_expert_and_whatever_else(family: str, beside: str, tmp_path: Path) -> None:
    """NVIDIA-NeMo/Automodel#1151, #1755: the adapters of before transformers 5, on files of then and of now."""
    model = made(FAMILIES[family])
    base = store(model, tmp_path / "base")
    before = stored(base)
    projections = PROJECTIONS.get(family, ["gate_proj", "up_proj", "down_proj"])
    targets = [*projections, "q_proj", *BESIDE[beside]]
    if family == "deepseek-v3":
        targets[3] = "o_proj"
    modules = [m for n in before if (m := n.removesuffix(".weight")).rpartition(".")[2] in targets]
    assert sum("experts." in m for m in modules) >= 12
    updates = adapter(tmp_path / "a", before, modules, targets)
    want = {n: (x.double() + updates.get(n, 0)).float() for n, x in before.items()}
    got = folded(base, [tmp_path / "a"], tmp_path / "out")
    assert far(got, want) < 1e-6
    expected = type(model).from_pretrained(tmp_path / "out")
    assert apart(logits(expected), logits(model)) > 0.1

    current = store(model, tmp_path / "current", str)
    assert any(x.ndim == 3 for x in stored(current).values())
    got = folded(current, [tmp_path / "a"], tmp_path / "current out")
    assert far(got, {n: x for n, x in expected.state_dict().items() if n in got}) < 1e-6


@pytest.mark.parametrize("family", [*FAMILIES, "gpt-oss"])
def test_one_lora_of_all_experts(family: str, tmp_path: Path) -> None:
    gpt_oss = t.GptOssConfig(**TEXT, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model = made(FAMILIES.get(family, lambda: t.GptOssForCausalLM(gpt_oss)))
    live = lora(
        model,
        tmp_path / "a",
        target_modules=["o_proj", "lm_head"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        save={"save_embedding_layers": False},
    )
    for kind, how in (("saved", None), ("current", str)):
        base = store(model, tmp_path / kind, how)
        assert folded(base, [tmp_path / "a"], tmp_path / f"{kind} out").keys() == stored(base).keys()
        check(model, tmp_path / f"{kind} out", live)


@pytest.mark.parametrize("kind", ["saved", "current"])
def test_attention_alone_of_a_model_whose_old_experts_had_the_targets_names(kind: str, tmp_path: Path) -> None:
    """Stored expert by expert, the file has linear layers that the model of today has not, and no adapter can hold."""
    model = made(FAMILIES["qwen2-moe"])
    base = store(model, tmp_path / "base", None if kind == "saved" else str)
    live = lora(model, tmp_path / "a", target_modules=r".*(q_proj|shared_expert\.\w+_proj)")
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    said["target_modules"] = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(said))
    folded(base, [tmp_path / "a"], tmp_path / "out")
    check(model, tmp_path / "out", live)


def test_some_experts_alone(tmp_path: Path) -> None:
    model = made(FAMILIES["mixtral"])
    names = ["model.layers.0.block_sparse_moe.experts.2.w3", "model.layers.1.block_sparse_moe.experts.0.w2"]
    for kind, how in (("saved", None), ("current", str)):
        base = store(model, tmp_path / kind, how)
        updates = adapter(tmp_path / f"{kind} a", stored(tmp_path / "saved"), names, [])
        got = type(model).from_pretrained(folded_to(base, tmp_path / f"{kind} a", tmp_path / f"{kind} out"))
        before = model.state_dict()
        for name, tensor in got.state_dict().items():
            want = before[name].double().clone()
            if name == "model.layers.0.mlp.experts.gate_up_proj":
                want[2, 48:] += updates[f"{names[0]}.weight"]
            if name == "model.layers.1.mlp.experts.down_proj":
                want[0] += updates[f"{names[1]}.weight"]
            torch.testing.assert_close(tensor, want.float(), rtol=0, atol=1e-6)


def folded_to(base: Path, adapter: Path, out: Path, **settings: Any) -> Path:
    folded(base, [adapter], out, **settings)
    return out


def test_an_expert_that_is_missing_among_others_is_told(tmp_path: Path) -> None:
    model = made(FAMILIES["mixtral"])
    base = store(model, tmp_path / "base")
    modules = [m for n in stored(base) if (m := n.removesuffix(".weight")).rpartition(".")[2] in ("w1", "w2", "w3")]
    gone = "model.layers.1.block_sparse_moe.experts.2.w1"
    for name, beside in (("plain", []), ("head", ["lm_head"])):
        left = [m for m in modules if m != gone]
        adapter(tmp_path / name, stored(base), [*left, *beside], ["w1", "w2", "w3", *beside])
        with pytest.raises(UserError, match=rf"config asks for {gone}"):
            folded(base, [tmp_path / name], tmp_path / "out")


def test_experts_of_gpt_oss_as_linear_layers(tmp_path: Path) -> None:
    """unslothai/unsloth-zoo takes gpt-oss' experts apart: gate_up_projs.0 is the transpose of gate_up_proj[0]."""
    model = made(
        lambda: t.GptOssForCausalLM(t.GptOssConfig(**TEXT, head_dim=8, num_local_experts=4, num_experts_per_tok=2))
    )
    base = store(model, tmp_path / "base")
    where = {"gate_up_projs": "gate_up_proj", "down_projs": "down_proj"}
    modules = {f"model.layers.{i}.mlp.experts.{p}.{e}": (i, p, e) for i in (0, 1) for p in where for e in range(4)}
    shapes = {
        f"{name}.weight": model.get_parameter(f"model.layers.{i}.mlp.experts.{where[p]}").detach()[e].T
        for name, (i, p, e) in modules.items()
    }
    updates = adapter(tmp_path / "a", shapes, list(modules), ["gate_up_projs.0"])
    got = folded(base, [tmp_path / "a"], tmp_path / "out")
    want = {n: x.double() for n, x in stored(base).items()}
    for name, (i, p, e) in modules.items():
        want[f"model.layers.{i}.mlp.experts.{where[p]}"][e] += updates[f"{name}.weight"].T
    assert far(got, want) < 1e-6
