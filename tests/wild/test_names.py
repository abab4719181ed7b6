"""Models, adapters and checkpoints that name the same weights differently: what is folded computes what PEFT does."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from conftest import apart, change_config, change_tensors, stored
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from wild import far, lora, rename

from mot_lora import UserError, fold_checkpoint, inspect_adapters, load_adapter, merge_adapters

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
PATCHES: dict[str, Any] = {"depth": 1, "num_heads": 2, "patch_size": 4, "in_channels": 3, "hidden_size": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
IMAGE = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


def made(make: Callable[[], t.PreTrainedModel]) -> t.PreTrainedModel:
    """A model with weights of a size at which nothing is lost among rounding."""
    torch.manual_seed(0)
    model = make().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.2 if p.ndim > 1 else p + noise * 0.05)
    return model


def logits(model: Any) -> Tensor:
    ids = torch.arange(3, 27).view(2, -1)
    decoder = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **decoder).logits.float()


def store(model: t.PreTrainedModel, folder: Path, how: Callable[[str], str] | None = None) -> Path:
    """A model as transformers saves it, or by its own names, changed by `how`; transformers loads it as it was."""
    model.save_pretrained(folder)
    if how:
        tied = model.all_tied_weights_keys or {}
        tensors = {how(n): x.clone() for n, x in model.state_dict().items() if n not in tied}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    again, said = type(model).from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"], said
    assert torch.equal(logits(again), logits(model))
    return folder


def folded(
    base: Path, adapters: Iterable[Path], out: Path, at_hand: bool = False, **settings: Any
) -> dict[str, Tensor]:
    """What is stored in a fold that was read back and checked; `at_hand`: the merge sees the base, too."""
    read = [load_adapter(a, f"a{i}", base=base) for i, a in enumerate(adapters)]
    merged = merge_adapters(read, base=base if at_hand else None, **settings)
    fold_checkpoint(base, merged, out, verify=True)
    return stored(out)


def check(model: t.PreTrainedModel, out: Path, live: PeftModel) -> None:
    """What was folded has the logits of the base with its adapter, and nothing is missing in it."""
    again, said = type(model).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"], said
    want = logits(live)
    assert apart(want, logits(model)) > 0.1
    assert apart(logits(again), want, logits(model)) < 1e-4


# --- models that also see or hear ------------------------------------------------------------------------

LLAVA = {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"}
VLMS: dict[str, tuple[Callable[[], t.PreTrainedModel], dict[str, str]]] = {
    "llava": (
        lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**VISION), image_token_index=90
            )
        ),
        LLAVA,
    ),
    "gemma3": (
        lambda: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(
                text_config={**TEXT, "head_dim": 8}, vision_config=VISION, image_token_index=90, mm_tokens_per_image=4
            )
        ),
        LLAVA,
    ),
    "mistral3": (
        lambda: t.Mistral3ForConditionalGeneration(
            t.Mistral3Config(
                text_config=t.MistralConfig(**TEXT),
                vision_config=t.PixtralVisionConfig(**VISION),
                image_token_index=90,
            )
        ),
        LLAVA,
    ),
    "paligemma": (
        lambda: t.PaliGemmaForConditionalGeneration(
            t.PaliGemmaConfig(
                text_config=t.GemmaConfig(**TEXT, head_dim=8),
                vision_config=t.SiglipVisionConfig(**VISION, projection_dim=32),
                image_token_index=90,
                projection_dim=32,
            )
        ),
        LLAVA,
    ),
    "internvl": (
        lambda: t.InternVLForConditionalGeneration(
            t.InternVLConfig(
                text_config=t.Qwen2Config(**TEXT),
                vision_config={**VISION, "image_size": [8, 8], "patch_size": [4, 4]},
                image_token_id=90,
            )
        ),
        LLAVA,
    ),
    "smolvlm": (
        lambda: t.SmolVLMForConditionalGeneration(
            t.SmolVLMConfig(text_config=t.LlamaConfig(**TEXT), vision_config=VISION, image_token_id=90, scale_factor=2)
        ),
        {},
    ),
    "mllama": (
        lambda: t.MllamaForConditionalGeneration(
            t.MllamaConfig(
                text_config={**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}},
                vision_config={
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 1,
                    "num_global_layers": 1,
                    "attention_heads": 2,
                    "image_size": 8,
                    "patch_size": 4,
                    "vision_output_dim": 32,
                    "intermediate_layers_indices": [0],
                    "max_num_tiles": 1,
                    "supported_aspect_ratios": [[1, 1]],
                },
                image_token_index=90,
            )
        ),
        LLAVA,
    ),
    "qwen2-audio": (
        lambda: t.Qwen2AudioForConditionalGeneration(
            t.Qwen2AudioConfig(
                text_config=t.Qwen2Config(**TEXT),
                audio_config={
                    "d_model": 16,
                    "encoder_layers": 1,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 24,
                    "num_mel_bins": 8,
                    "max_source_positions": 8,
                },
                audio_token_index=90,
            )
        ),
        LLAVA,
    ),
    "qwen2-vl": (
        lambda: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(
                text_config={**TEXT, **MROPE},
                vision_config={**PATCHES, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
                **IMAGE,
            )
        ),
        {"model.language_model.": "model."},
    ),
    "qwen2.5-vl": (
        lambda: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(
                text_config={**TEXT, **MROPE},
                vision_config={
                    **PATCHES,
                    "out_hidden_size": 32,
                    "intermediate_size": 24,
                    "fullatt_block_indexes": [0],
                },
                **IMAGE,
            )
        ),
        {"model.language_model.": "model."},
    ),
    "qwen3-vl": (
        lambda: t.Qwen3VLForConditionalGeneration(
            t.Qwen3VLConfig(
                text_config={**TEXT, **MROPE, "head_dim": 8},
                vision_config={
                    **PATCHES,
                    "out_hidden_size": 32,
                    "intermediate_size": 24,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0],
                },
                **IMAGE,
            )
        ),
        {},
    ),
    "llama4": (
        lambda: t.Llama4ForConditionalGeneration(
            t.Llama4Config(
                text_config={**TEXT, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
                vision_config={
                    **VISION,
                    "projector_input_dim": 16,
                    "projector_output_dim": 16,
                    "vision_output_dim": 16,
                    "pixel_shuffle_ratio": 0.5,
                },
                image_token_index=90,
            )
        ),
        {},
    ),
}
TEXT_LAYERS = r".*(language_model|text_model).*\.(q_proj|v_proj|down_proj)"


def renaming(changes: dict[str, str]) -> Callable[[str], str]:
    """Names with the first fitting beginning changed, behind PEFT's prefix too."""

    def how(name: str) -> str:
        prefix = "base_model.model." if name.startswith("base_model.model.") else ""
        rest = name.removeprefix(prefix)
        for old, new in changes.items():
            if rest.startswith(old):
                return prefix + new + rest.removeprefix(old)
        return name

    return how


@pytest.mark.parametrize("family", VLMS)
def test_every_name_of_a_layer_of_a_vision_model_is_understood(family: str, tmp_path: Path) -> None:
    """illuin-tech/colpali#424, unslothai/unsloth-zoo#158: transformers 4.52 renamed the layers of all these models."""
    make, old = VLMS[family]
    model = made(make)
    bases = {"saved": store(model, tmp_path / "saved"), "current": store(model, tmp_path / "current", str)}
    live = lora(model, tmp_path / "new", target_modules=TEXT_LAYERS)
    adapters = [tmp_path / "new"]
    texts = {f"model.{part}.": "model." for part in ("language_model", "text_model")}
    for name, changes in (("old", old), ("text", {**texts, "language_model.model.": "model."})):
        folder = Path(shutil.copytree(tmp_path / "new", tmp_path / name))
        rename(folder, renaming(changes))
        change_config(folder, target_modules=["q_proj", "v_proj", "down_proj"])
        adapters.append(folder)
    for kind, base in bases.items():
        for adapter in adapters:
            out = tmp_path / f"{kind} {adapter.name}"
            assert folded(base, [adapter], out).keys() == stored(base).keys()
            if adapter.name == "new":
                check(model, out, live)
                want = stored(out)
            assert all(torch.equal(tensor, want[name]) for name, tensor in stored(out).items())


# --- what else of a vision model an adapter may hold -----------------------------------------------------


def tied(family: str) -> t.PreTrainedModel:
    """A vision model that ties its head."""

    def make() -> t.PreTrainedModel:
        config = VLMS[family][0]().config
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
        return getattr(t, config.architectures[0] if config.architectures else CLASSES[family])(config)

    return made(make)


CLASSES = {"qwen2-vl": "Qwen2VLForConditionalGeneration", "gemma3": "Gemma3ForConditionalGeneration"}
PARTS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": r".*language_model.*q_proj|lm_head"},
    "embedding": {"target_modules": r".*language_model.*q_proj|.*embed_tokens"},
    "both": {"target_modules": r".*language_model.*q_proj|.*embed_tokens|lm_head"},
    "tokens": {"target_modules": r".*language_model.*q_proj", "trainable_token_indices": {"embed_tokens": [3, 5, 9]}},
    "copy": {"target_modules": r".*language_model.*q_proj", "modules_to_save": ["norm", "embed_tokens"]},
    "DoRA": {"target_modules": r".*language_model.*(q_proj|up_proj)", "use_dora": True},
    "vision": {"target_modules": r".*(language_model|visual|vision_tower).*(q_proj|qkv|fc1)"},
}


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("part", PARTS)
def test_tied_heads_copies_and_tokens_of_a_vision_model(family: str, part: str, tmp_path: Path) -> None:
    """thinking-machines-lab/tinker-cookbook#593 in a model that also sees: the names are those of the model."""
    model = tied(family)
    base = store(model, tmp_path / "base")
    live = lora(model, tmp_path / "a", save={"save_embedding_layers": False}, **PARTS[part])
    with torch.no_grad():
        for name, p in live.named_parameters():
            if p.requires_grad and "lora_" not in name:
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    live.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    current = store(model, tmp_path / "current", str)
    for where in (base, current):
        out = tmp_path / f"{where.name} out"
        folded(where, [tmp_path / "a"], out)
        check(model, out, live)
        apart_now = part in ("head", "embedding", "both", "copy")
        said = json.loads((out / "config.json").read_text())
        assert [said["tie_word_embeddings"], said["text_config"]["tie_word_embeddings"]] == [not apart_now] * 2
        assert any(n.endswith("lm_head.weight") for n in stored(out)) is apart_now
    head = {n for n in stored(tmp_path / "base out") if n.endswith("lm_head.weight")}
    assert head <= {"language_model.lm_head.weight" if family == "gemma3" else "lm_head.weight"}  # in the file's names


def test_adapters_of_two_times_are_merged_as_one(tmp_path: Path) -> None:
    """One adapter in today's names and one in the older ones: both are a part, of whatever method."""
    model = made(VLMS["qwen2-vl"][0])
    base = store(model, tmp_path / "base")
    for seed, name in enumerate("ab"):
        lora(model, tmp_path / name, seed=seed, target_modules=r".*language_model.*(q_proj|v_proj)")
    both = [tmp_path / "a", tmp_path / "b"]
    ties = {"method": "ties", "density": 0.5, "at_hand": True}
    want = [folded(base, both, tmp_path / "linear", weights=[1, 3]), folded(base, both, tmp_path / "ties", **ties)]
    rename(tmp_path / "b", renaming({"model.language_model.": "model."}))
    got = [folded(base, both, tmp_path / "linear 2", weights=[1, 3]), folded(base, both, tmp_path / "ties 2", **ties)]
    assert [far(g, w) < 1e-6 for g, w in zip(got, want, strict=True)] == [True, True]
    with pytest.raises(UserError, match="save them in one layout"):  # without the base at hand
        folded(base, both, tmp_path / "out", method="ties", density=0.5)


def test_a_layer_that_is_missing_is_told_whatever_its_names(tmp_path: Path) -> None:
    model = made(VLMS["qwen2-vl"][0])
    base = store(model, tmp_path / "base")
    lora(model, tmp_path / "new", target_modules=r".*language_model.*(q_proj|v_proj)")
    change_config(tmp_path / "new", target_modules=["q_proj", "v_proj"])
    change_tensors(tmp_path / "new", lambda x: [x.pop(k) for k in list(x) if "layers.1.self_attn.v_proj" in k])
    old = Path(shutil.copytree(tmp_path / "new", tmp_path / "old"))
    rename(old, renaming({"model.language_model.": "model."}))
    for name, gone in (("new", "model.language_model.layers.1"), ("old", "model.layers.1")):
        with pytest.raises(UserError, match=rf"config asks for {gone}\.self_attn\.v_proj\.weight"):
            folded(base, [tmp_path / name], tmp_path / "out")


# --- the text model alone --------------------------------------------------------------------------------


def test_a_text_model_that_was_taken_out_of_a_vision_model(tmp_path: Path) -> None:
    """Adapters of Gemma 3 as AutoModelForCausalLM of its time saw it, and of the whole, each on the other's file."""
    whole = made(VLMS["gemma3"][0])
    vision = store(whole, tmp_path / "vision")
    text = t.Gemma3ForCausalLM(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.tie_weights()
    alone = store(text, tmp_path / "text")
    targets = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]}
    seen = {"target_modules": r".*language_model.*(q_proj|down_proj)"}
    lives = {
        "of the text": lora(text, tmp_path / "of the text", **targets),
        "of both": lora(whole, tmp_path / "of both", **seen),
    }
    older = Path(shutil.copytree(tmp_path / "of both", tmp_path / "older"))
    rename(older, renaming({"model.language_model.": "language_model.model."}))
    for name, live in (*lives.items(), ("older", lives["of both"])):
        for base, model in ((vision, whole), (alone, text)):
            out = tmp_path / f"{name} {base.name}"
            folded(base, [tmp_path / name], out)
            check(model, out, live)


def test_a_folder_that_names_no_class_or_one_whose_code_comes_with_it(tmp_path: Path) -> None:
    """Without `architectures` the model's type says what it is; of code of its own the stored names are the model's."""
    model = made(lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)))
    base = store(model, tmp_path / "base")
    live = lora(
        model, tmp_path / "a", target_modules=["q_proj", "o_proj", "lm_head"], save={"save_embedding_layers": False}
    )
    said = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**said, "architectures": None}))
    folded(base, [tmp_path / "a"], tmp_path / "nameless")
    check(model, tmp_path / "nameless", live)

    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    own = {**said, "architectures": ["XForCausalLM"], "model_type": "x", "auto_map": code}
    (base / "config.json").write_text(json.dumps(own))
    folded(base, [tmp_path / "a"], tmp_path / "own")
    assert far(stored(tmp_path / "own"), stored(tmp_path / "nameless")) == 0
    # squares alone: nothing shows whether they are turned
    lora(model, tmp_path / "square", target_modules=["q_proj", "o_proj"])
    folded(base, [tmp_path / "square"], tmp_path / "squares")


def test_a_vision_model_of_its_own_code_says_in_its_text_config_that_nothing_is_tied(tmp_path: Path) -> None:
    """InternVL, as OpenGVLab publishes it: `llm_config`, and a class that transformers does not have."""
    model = made(lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)))
    base = store(model, tmp_path / "base")
    tensors = {f"language_model.{n}": x for n, x in stored(base).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    own = {"architectures": ["XChatModel"], "model_type": "x_chat", "auto_map": {"AutoModel": "modeling_x.XChatModel"}}
    (base / "config.json").write_text(json.dumps({**own, "llm_config": {"tie_word_embeddings": False}}))
    lora(model, tmp_path / "a", target_modules=["q_proj", "lm_head"], save={"save_embedding_layers": False})
    update = {n: f.delta() for n, f in load_adapter(tmp_path / "a").updates.items()}
    rename(tmp_path / "a", lambda n: n.replace("base_model.model.", "base_model.model.language_model."))
    got = folded(base, [tmp_path / "a"], tmp_path / "out")
    moved = {f"language_model.{n}.weight": x for n, x in update.items()}
    assert far(got, {n: x + moved[n] if n in moved else x for n, x in tensors.items()}) < 1e-6
    (base / "config.json").write_text(json.dumps({**own, "llm_config": {"tie_word_embeddings": True}}))
    with pytest.raises(UserError, match=r"whether language_model\.lm_head\.weight is tied"):
        folded(base, [tmp_path / "a"], tmp_path / "tied")


def test_layer_norms_in_the_words_of_tensorflow(tmp_path: Path) -> None:
    """bert-base-uncased still stores LayerNorm.gamma and LayerNorm.beta."""
    config = t.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=96, is_decoder=True
    )
    model = made(lambda: t.BertLMHeadModel(config))

    def older(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    base = store(model, tmp_path / "base", older)
    live = lora(
        model, tmp_path / "a", target_modules=["query", "dense"], modules_to_save=["attention.output.LayerNorm"]
    )
    with torch.no_grad():
        for name, p in live.named_parameters():
            if "modules_to_save" in name:
                p += 0.5
    live.save_pretrained(str(tmp_path / "a"))
    assert folded(base, [tmp_path / "a"], tmp_path / "out").keys() == stored(base).keys()
    check(model, tmp_path / "out", live)


def test_a_classifier_with_its_score(tmp_path: Path) -> None:
    """PEFT lists `classifier` and `score` in modules_to_save of any classifier; a model has one of them."""
    model = made(lambda: t.Qwen2ForSequenceClassification(t.Qwen2Config(**TEXT, num_labels=3)))
    live = lora(model, tmp_path / "a", task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    for where, how in (("saved", None), ("bare", lambda n: n.removeprefix("model."))):
        base = store(model, tmp_path / where, how)
        folded(base, [tmp_path / "a"], tmp_path / f"{where} out")
        check(model, tmp_path / f"{where} out", live)


def test_how_large_an_update_is_beside_its_weight_whatever_the_weights_name(tmp_path: Path) -> None:
    model = made(VLMS["gemma3"][0])
    base = store(model, tmp_path / "base")
    lora(model, tmp_path / "a", target_modules=r".*language_model.*(q_proj|down_proj)")
    updates = load_adapter(tmp_path / "a").updates
    squares = [
        sum(float(x.double().square().sum()) for x in xs)
        for xs in (
            (u.delta() for u in updates.values()),
            (model.get_submodule(n).weight.detach() for n in updates),
        )
    ]
    record = inspect_adapters([tmp_path / "a"], base)
    assert record.adapters[0].relative_norm == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-5)
