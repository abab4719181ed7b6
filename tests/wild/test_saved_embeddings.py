"""Embeddings that PEFT saved beside a LoRA: dropped where they are the base's, else both sizes and a way out."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import change_config, change_tensors, refused, stored
from transformers import LlamaForCausalLM
from wild import far, llama, lora

from mot_lora import UserError, fold_checkpoint, load_adapter, merge_adapters

SAVED = {"save_embedding_layers": True}
HEAD = "base_model.model.lm_head.weight"
# the library's advice on vocabularies and tied weights is not under test
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "base"
    llama(folder, tie=request.param)
    return folder


def model(base: Path, rows: int | None = None) -> LlamaForCausalLM:
    made = LlamaForCausalLM.from_pretrained(base)
    if rows:
        made.resize_token_embeddings(rows)
    return made


def folded(base: Path, adapter: Path, name: str) -> dict[str, torch.Tensor]:
    return stored(fold_checkpoint(base, merge_adapters([load_adapter(adapter, base=base)]), adapter.parent / name))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "a LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "trained tokens": {"trainable_token_indices": [1, 5]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bases_own_are_dropped(base: Path, tmp_path: Path, kind: str) -> None:
    lora(model(base), tmp_path / "saved", base=base, save=SAVED, **KINDS[kind])
    lora(model(base), tmp_path / "plain", base=base, save={"save_embedding_layers": False}, **KINDS[kind])
    assert stored(tmp_path / "saved").keys() > stored(tmp_path / "plain").keys()
    assert far(folded(base, tmp_path / "saved", "one"), folded(base, tmp_path / "plain", "other")) == 0


@pytest.mark.parametrize("bits", [torch.bfloat16, torch.float16])
def test_copies_of_a_base_that_was_loaded_in_16_bits_are_its_own(base: Path, tmp_path: Path, bits: torch.dtype) -> None:
    lora(model(base), tmp_path / "a", base=base, save=SAVED)
    for again in (bits, torch.float32):  # saved in 16 bits, and in 32 after that
        change_tensors(
            tmp_path / "a", lambda t, d=again: t.update({k: x.to(bits).to(d) for k, x in t.items() if "lora" not in k})
        )
        assert len(load_adapter(tmp_path / "a").updates) == 4


def test_a_vocabulary_cut_to_the_tokenizers_size_is_the_bases(base: Path, tmp_path: Path) -> None:
    """axolotl-ai-cloud/axolotl#2277."""
    lora(model(base, 264), tmp_path / "cut", base=base)
    assert stored(tmp_path / "cut")[HEAD].shape[0] == 264
    got = folded(base, tmp_path / "cut", "out")
    assert (
        far(
            {k: t for k, t in got.items() if "_proj" not in k},
            {k: t for k, t in stored(base).items() if "_proj" not in k},
        )
        == 0
    )


# --- what is not the base's ------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [["embed_tokens", "lm_head"], None], ids=["modules_to_save", "saved beside"])
@pytest.mark.parametrize("rows", [280, 264])
def test_a_resized_vocabulary_has_both_sizes_and_a_way_out_that_works(
    base: Path, tmp_path: Path, call: Any, rows: int, listed: Any
) -> None:
    lora(model(base, rows), tmp_path / "a", base=base, save=SAVED, modules_to_save=listed)
    change_tensors(
        tmp_path / "a",
        lambda t: [
            x.add_(0.1)
            for k, x in t.items()
            if k.endswith(("embed_tokens.weight", "lm_head.weight", "modules_to_save.weight"))
        ],
    )
    message = refused(call("fold", base, tmp_path / "a", "--out", tmp_path / "out"))
    assert all(said in message for said in (str(rows), "272", f"resize_token_embeddings({rows})", "--base"))
    assert ("modules_to_save of adapter_config.json" in message) is (listed is None)
    # which is to be done as it says
    model(base, rows).save_pretrained(tmp_path / "larger")
    if listed is None:
        change_config(tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    got = folded(tmp_path / "larger", tmp_path / "a", "out")
    trained = stored(tmp_path / "a")[HEAD]
    assert torch.allclose(got.get("lm_head.weight", got["model.embed_tokens.weight"]), trained, atol=1e-6)


def test_a_head_that_was_trained_without_a_word_is_named(base: Path, tmp_path: Path, call: Any) -> None:
    lora(model(base), tmp_path / "a", base=base, save=SAVED)
    change_tensors(tmp_path / "a", lambda t: [t[k].add_(0.1) for k in t if "lora" not in k])
    message = refused(call("fold", base, tmp_path / "a", "--out", tmp_path / "out"))
    assert "is not the base's weight" in message
    assert "list `" in message
    change_config(tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    got = folded(base, tmp_path / "a", "out")
    assert torch.allclose(got["model.embed_tokens.weight"], stored(base)["model.embed_tokens.weight"] + 0.1, atol=1e-6)


def test_a_merge_without_a_base_asks_for_it(base: Path, tmp_path: Path, call: Any) -> None:
    lora(model(base), tmp_path / "a", base=base, save=SAVED)
    change_config(tmp_path / "a", base_model_name_or_path="org/model")
    message = refused(call("merge", tmp_path / "a", "--out", tmp_path / "out"))
    assert HEAD in message or "embed_tokens.weight" in message
    assert "--base" in message
    status, _, _ = call("merge", tmp_path / "a", "--base", base, "--out", tmp_path / "out")
    assert status == 0
    assert all("lora_" in key for key in stored(tmp_path / "out"))


def test_a_merge_with_one_that_has_none(base: Path, tmp_path: Path) -> None:
    """huggingface/peft#2450: what ZeRO-3 has not gathered is named as such."""
    lora(model(base), tmp_path / "a", base=base, save=SAVED)
    lora(model(base), tmp_path / "b", base=base, seed=2)
    shutil.copytree(tmp_path / "a", tmp_path / "empty")
    both = merge_adapters([tmp_path / "a", tmp_path / "b"], base=base)
    assert all(u == "linear" for u in both.forms.values())
    change_tensors(tmp_path / "empty", lambda t: t.update({HEAD: torch.zeros(0)}))
    with pytest.raises(UserError, match=r"lm_head\.weight is \[0\].*ZeRO-3"):
        load_adapter(tmp_path / "empty", base=base)
