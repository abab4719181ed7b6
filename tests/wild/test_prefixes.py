"""Checkpoints stored with or without their base model's prefix, tied in odd places, or under two names at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from conftest import stored
from safetensors.torch import save_file
from test_names import TEXT, VLMS, check, folded, made, store
from wild import lora

from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import LoraConfig
from mot_lora.merging.lowrank import Adapter, Factors
from mot_lora.merging.merged import combine
from mot_lora.training.adapter import add_adapter
from mot_lora.training.student import fold, load_model

TINY: dict[str, Any] = {k: TEXT[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
GPT2 = t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **TINY)
OPT = t.OPTConfig(
    hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
    max_position_embeddings=64, **TINY,
)  # fmt: skip
BLOOM = t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **TINY)
LLAMA = t.LlamaConfig(**TEXT, tie_word_embeddings=False)
MODELS: dict[str, tuple[Callable[[], t.PreTrainedModel], str, list[str]]] = {
    "gpt2": (lambda: t.GPT2LMHeadModel(GPT2), "transformer.", ["c_attn", "c_proj", "c_fc"]),
    "bloom": (lambda: t.BloomForCausalLM(BLOOM), "transformer.", ["query_key_value", "dense_h_to_4h"]),
    "opt": (lambda: t.OPTForCausalLM(OPT), "model.", ["q_proj", "v_proj", "fc1"]),
    "llama": (lambda: t.LlamaForCausalLM(LLAMA), "model.", ["q_proj", "down_proj"]),
    "square llama": (lambda: t.LlamaForCausalLM(LLAMA), "model.", ["q_proj", "o_proj"]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("more", [[], ["lm_head"]], ids=["layers", "and head"])
def test_a_checkpoint_without_the_base_models_prefix(name: str, more: list[str], tmp_path: Path) -> None:
    """gpt2, bloom and opt on the Hub name their layers `h.0` and `decoder.layers.0`, as their base models do."""
    make, prefix, targets = MODELS[name]
    model = made(make)
    base = store(model, tmp_path / "base", lambda n: n.removeprefix(prefix))
    assert not any(n.startswith(prefix) for n in stored(base))
    live = lora(model, tmp_path / "a", target_modules=[*targets, *more], save={"save_embedding_layers": False})
    after = folded(base, [tmp_path / "a"], tmp_path / "out")
    check(model, tmp_path / "out", live)
    assert after.keys() - stored(base).keys() <= {"lm_head.weight"}
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["tie_word_embeddings"] is (model.config.tie_word_embeddings and not more)


def test_a_base_model_stored_with_the_prefix_of_a_larger_one(tmp_path: Path) -> None:
    """Embedding models: the class has no head, the file the names of the class that has, or none of them."""
    whole = made(MODELS["llama"][0])
    part = whole.model
    live = lora(whole, tmp_path / "a")
    shorter = lora(part, tmp_path / "b", task_type="FEATURE_EXTRACTION")
    ids = torch.arange(3, 27).view(2, -1)
    for how in (str, lambda n: f"model.{n}"):
        folder = tmp_path / how("base")
        part.save_pretrained(folder)
        save_file({how(n): x for n, x in part.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
        for adapter, want in (("a", live.get_base_model().model), ("b", shorter)):
            folded(folder, [tmp_path / adapter], tmp_path / how(f"{adapter} out"))
            with torch.no_grad():
                got = t.LlamaModel.from_pretrained(tmp_path / how(f"{adapter} out"))(ids).last_hidden_state
                torch.testing.assert_close(got, want(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    # and an adapter of the base model on a checkpoint of the whole
    folded(store(whole, tmp_path / "whole"), [tmp_path / "b"], tmp_path / "last")
    with torch.no_grad():
        got = t.LlamaModel.from_pretrained(tmp_path / "last")(ids).last_hidden_state
        torch.testing.assert_close(got, shorter(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


# --- what is tied, and where -----------------------------------------------------------------------------


def tied_llama() -> t.PreTrainedModel:
    return made(lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, tie_word_embeddings=True)))


HEAD, TOKENS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("kept", [(TOKENS,), (HEAD,), (TOKENS, HEAD)], ids=["embedding", "head", "both"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_proj"])
def test_a_tied_pair_of_which_one_or_both_are_stored(kept: tuple[str, ...], target: str, tmp_path: Path) -> None:
    model = tied_llama()
    base = store(model, tmp_path / "base")
    tensors = {n: x for n, x in stored(base).items() if n not in (HEAD, TOKENS)}
    tensors |= {n: model.get_input_embeddings().weight.detach().clone() for n in kept}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    live = lora(model, tmp_path / "a", target_modules=[target, "v_proj"], save={"save_embedding_layers": False})
    after = folded(base, [tmp_path / "a"], tmp_path / "out")
    check(model, tmp_path / "out", live)
    assert ({HEAD, TOKENS} <= after.keys()) is (target != "q_proj" or len(kept) == 2)


def test_a_config_that_ties_what_is_stored_apart(tmp_path: Path) -> None:
    """transformers ties a pair only where both are equal or one is missing, whatever the config says."""
    model = made(lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, tie_word_embeddings=False)))
    base = store(model, tmp_path / "base")
    said = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": True}))
    live = lora(model, tmp_path / "a", target_modules=["lm_head", "v_proj"], save={"save_embedding_layers": False})
    after = folded(base, [tmp_path / "a"], tmp_path / "out")
    check(model, tmp_path / "out", live)
    assert torch.equal(after[TOKENS], stored(base)[TOKENS])


def test_copies_of_one_tensor_under_its_old_and_its_new_name_are_changed_alike(tmp_path: Path) -> None:
    model = made(MODELS["gpt2"][0])
    base = store(model, tmp_path / "base")
    tensors = stored(base)
    copies = {n.removeprefix("transformer."): x.clone() for n, x in tensors.items()}
    save_file(tensors | copies, base / "model.safetensors", {"format": "pt"})
    live = lora(model, tmp_path / "a", target_modules=["c_attn", "c_fc"])
    after = folded(base, [tmp_path / "a"], tmp_path / "out")
    check(model, tmp_path / "out", live)
    assert all(torch.equal(after[n], after[f"transformer.{n}"]) for n in copies)


SEQ2SEQ: dict[str, Callable[[], t.PreTrainedModel]] = {
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=96, decoder_start_token_id=0)
    ),
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=96, max_position_embeddings=64,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("target", ["lm_head", "encoder.embed_tokens", "shared", "v"])
def test_embeddings_that_encoder_decoder_and_head_share(family: str, target: str, tmp_path: Path) -> None:
    model = made(SEQ2SEQ[family])
    base = store(model, tmp_path / "base")
    layers = ["q", "wo"] if family == "t5" else ["q_proj", "fc1"]
    live = lora(
        model, tmp_path / "a", target_modules=[*layers, target], task_type="SEQ_2_SEQ_LM",
        save={"save_embedding_layers": False},
    )  # fmt: skip
    folded(base, [tmp_path / "a"], tmp_path / "out")
    check(model, tmp_path / "out", live)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    # T5 reads of it how outputs are scaled, and ties whatever it says
    assert said["tie_word_embeddings"] is (family == "t5" or target == "v")


# --- the student of a run --------------------------------------------------------------------------------


def gemma3() -> t.PreTrainedModel:
    return VLMS["gemma3"][0]()


def fused() -> t.PreTrainedModel:
    return t.HrmTextForCausalLM(t.HrmTextConfig(**TEXT, head_dim=8))


STUDENTS: dict[str, tuple[Callable[[], t.PreTrainedModel], Callable[[str], str] | None]] = {
    "without prefix": (MODELS["llama"][0], lambda n: n.removeprefix("model.")),
    "one that also sees": (gemma3, None),
    "stored in wider tensors": (fused, None),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_in_memory_is_folded_from_the_names_of_its_file(name: str, tmp_path: Path) -> None:
    make, how = STUDENTS[name]
    base = store(made(make), tmp_path / "base", how)
    checkpoint = Checkpoint.open(base)
    model = load_model(checkpoint, "none", torch.device("cpu"))
    live = add_adapter(model, LoraConfig(r=2, alpha=4, target_modules=r".*layers.*(q_proj|up_proj)"))
    before = {n: p.detach().clone() for n, p in live.get_base_model().named_parameters()}
    generator = torch.Generator().manual_seed(0)
    updates = {
        n.removesuffix(".base_layer.weight"): Factors(
            torch.randn(2, p.shape[1], generator=generator), torch.randn(p.shape[0], 2, generator=generator)
        )
        for n, p in before.items()
        if n.endswith(".base_layer.weight") and "vision" not in n
    }
    assert len(updates) >= 4
    done = {f.module: f for f in fold(live, checkpoint, [combine([Adapter("a", updates)])])}
    assert done.keys() == updates.keys()
    for n, p in live.get_base_model().named_parameters():
        update = updates.get(n.removesuffix(".base_layer.weight"))
        want = before[n] + update.delta() if update else before[n]
        torch.testing.assert_close(p, want, rtol=1e-5, atol=1e-5)
