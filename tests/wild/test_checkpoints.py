"""Model folders as people have them: which files are the model, which travel, and what is said of the rest."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from wild import far, jsonl, llama, lora, recipe, rows, student

from mot_lora import UserError, fold_checkpoint, merge_adapters, verify_checkpoint
from mot_lora.checkpoints.checkpoint import INDEX_FILE, Checkpoint
from mot_lora.checkpoints.companions import NOT_DOWNLOADED, companions
from mot_lora.errors import Remark
from mot_lora.training.student import from_pretrained

Call = Callable[..., tuple[int, str, str]]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in one file, the same in shards, and an adapter of it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = llama(folder / "base")
    model.save_pretrained(folder / "sharded", max_shard_size="40KB")
    lora(model, folder / "a", base=folder / "base")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the base, or of another folder, with these settings in its config."""

    def copied(of: str = "base", **config: Any) -> Path:
        path = Path(shutil.copytree(made / of, tmp_path / "model"))
        said = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**said, **config}))
        return path

    return copied


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def update(adapter: Path) -> dict[str, Tensor]:
    """What an adapter of alpha / r = 2 adds to each tensor."""
    stored = {k.removeprefix("base_model.model."): t for k, t in weights(adapter).items()}
    modules = {k.removesuffix(".lora_A.weight") for k in stored if "lora_A" in k}
    return {f"{m}.weight": 2 * stored[f"{m}.lora_B.weight"] @ stored[f"{m}.lora_A.weight"] for m in modules}


def plus(base: Mapping[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    added = update(adapter)
    return {name: t + added[name] if name in added else t for name, t in base.items()}


def loaded(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """What transformers loads of a folder, and nothing may be missing or too much."""
    model, said = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **settings
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert not hasattr(model, "peft_config")
    return {name: t.detach() for name, t in model.state_dict().items()}


def in_training(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """What a run trains on."""
    model = from_pretrained(Checkpoint.open(folder), torch.device("cpu"), torch.float32, **settings)
    assert not hasattr(model, "peft_config")
    assert model.name_or_path == str(folder)
    return {name: t.detach() for name, t in model.state_dict().items()}


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


# --- which files are the model -----------------------------------------------------------------------------


def beside_old_shards(path: Path, made: Path) -> None:
    llama(seed=5).save_pretrained(path, max_shard_size="40KB")  # removes what was there
    shutil.copy(made / "base" / "model.safetensors", path)


def with_an_adapter(path: Path, _: Path) -> None:
    lora(llama(), path.parent / "stray", seed=7)
    for file in (path.parent / "stray").iterdir():
        shutil.copy(file, path)


def with_other_weights(path: Path, _: Path) -> None:
    other = {name: t + 1 for name, t in weights(path).items()}
    for name in ("model.fp16", "consolidated", "consolidated.00", "ema"):
        save_file(other, path / f"{name}.safetensors", metadata={"format": "pt"})
    (path / "original").mkdir()
    save_file(other, path / "original" / "model.safetensors")
    (path / "pytorch_model.bin").write_bytes(b"old")


def named_in_the_config(path: Path, _: Path) -> None:
    (path / "model.safetensors").rename(path / "mine.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "transformers_weights": "mine.safetensors"}))


def in_shards(path: Path, made: Path) -> None:
    (path / "model.safetensors").unlink()
    shutil.copytree(made / "sharded", path, dirs_exist_ok=True)


def without_metadata(path: Path, made: Path) -> None:
    in_shards(path, made)
    change_index(path, lambda index: index.pop("metadata"))


def without_an_index(path: Path, made: Path) -> None:
    in_shards(path, made)
    (path / INDEX_FILE).unlink()


def with_an_index_that_lacks_a_tensor(path: Path, made: Path) -> None:
    in_shards(path, made)
    change_index(path, lambda index: index["weight_map"].pop("model.norm.weight"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (beside_old_shards, "model.safetensors is the model, as for transformers; model-00001-of"),
        (with_an_adapter, "the adapter in the model's folder is no part of it"),
        (with_other_weights, "consolidated.00.safetensors and 3 more beside it is not read"),
        (named_in_the_config, None),
        (in_shards, None),
        (without_metadata, None),
        (without_an_index, "its 4 numbered shards are the model"),
        (with_an_index_that_lacks_a_tensor, None),
    ],
)
def test_one_set_of_files_is_read_trained_on_and_written(
    call: Call, made: Path, copy: Callable[..., Path], tmp_path: Path, change: Callable[..., None], told: str | None
) -> None:
    """huggingface/lerobot#826, Blaizzy/mlx-vlm#1329, unslothai/unsloth#1061, Neph0s/CoSER#3."""
    path = copy()
    change(path, made)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    status, _, err = call("fold", path, made / "a", "--out", tmp_path / "out", "--verify")
    assert status == 0, err
    assert (told in err) if told else err == ""
    base = weights(made / "base")
    assert far(in_training(path), base) == 0
    assert far(loaded(tmp_path / "out"), plus(base, made / "a")) < 1e-6
    assert Checkpoint.open(tmp_path / "out").remarks == []
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def ghost(path: Path) -> None:
    change_index(path, lambda i: i["weight_map"].update({f"{Q}.bias": "model-00001-of-00004.safetensors"}))


def missing_shard(path: Path) -> None:
    change_index(path, lambda i: i["weight_map"].update({"model.norm.weight": "model-00099-of-00099.safetensors"}))


def half_a_download(path: Path) -> None:
    (path / INDEX_FILE).unlink()
    (path / "model-00003-of-00004.safetensors").unlink()


def only_a_variant(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    save_file({"a": torch.ones(1)}, path / "model.fp16.safetensors")


def only_gguf(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    (path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


def only_an_adapter(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.ones(1)}, path / "adapter_model.safetensors")


def distributed(path: Path) -> None:
    shutil.copy(path / "model-00001-of-00004.safetensors", path / "shard-00000-model-00001-of-00001.safetensors")


def dangling(path: Path) -> None:
    (path / "model.safetensors").symlink_to(path.parent / "gone")


def absolute(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "transformers_weights": str(path / "model.safetensors")}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (ghost, rf"its index lists {Q}\.bias in model-00001-of-00004\.safetensors, which does not hold it"),
        (missing_shard, "model-00099-of-00099.safetensors: missing"),
        (half_a_download, "no model.safetensors.index.json, and not all shards"),
        (only_a_variant, r"from model\.safetensors or an index; rename model\.fp16\.safetensors"),
        (only_gguf, "its weights are GGUF"),
        (only_an_adapter, "an adapter, not a model"),
        (distributed, "holds shard-00000-model-00001-of-00001.safetensors, a distributed checkpoint"),
        (dangling, "model.safetensors: missing"),
        (absolute, r"config\.json names .*no \.safetensors file of its folder"),
    ],
)
def test_a_model_that_is_not_whole_is_refused_by_its_file(
    copy: Callable[..., Path], change: Callable[[Path], None], words: str
) -> None:
    path = copy("sharded")
    change(path)
    with pytest.raises(UserError, match=words):
        Checkpoint.open(path)


def test_an_index_may_list_a_head_that_is_tied(tmp_path: Path) -> None:
    llama(tmp_path / "tied", tie=True).save_pretrained(tmp_path / "tied", max_shard_size="40KB")
    change_index(
        tmp_path / "tied", lambda i: i["weight_map"].update({"lm_head.weight": "model-00001-of-00004.safetensors"})
    )
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "tied").files


# --- what is quantized, and what only says so --------------------------------------------------------------

LEFT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quantization_config": None}, False),
        ({"quantization_config": {}}, False),
        ({"quantization_config": LEFT}, True),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, True),
        ({"quantization": {"group_size": 64, "bits": 4}}, True),
        ({"vision_config": {"quantization_config": {"quant_method": "fp8"}}}, True),
    ],
)
def test_what_a_config_says_of_16_bit_weights_is_not_believed(
    call: Call, made: Path, copy: Callable[..., Path], tmp_path: Path, config: dict[str, Any], told: bool
) -> None:
    """unslothai/unsloth#1601, allenai/open-instruct#149."""
    path = copy(**config)
    status, _, err = call("fold", path, made / "a", "--out", tmp_path / "out")
    assert status == 0, err
    assert ("in config.json left out: the weights are not quantized" in err) == told
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    assert far(loaded(tmp_path / "out"), plus(weights(made / "base"), made / "a")) < 1e-6
    assert far(in_training(path), weights(made / "base")) == 0


def test_files_of_a_quantization_that_was_undone_do_not_travel(
    call: Call, made: Path, copy: Callable[..., Path], tmp_path: Path
) -> None:
    path = copy()
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    _, _, err = call("fold", path, made / "a", "--out", tmp_path / "out")
    assert "hf_quant_config.json left out" in err
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


FP8, INT8, INT32, U8, U32 = torch.float8_e4m3fn, torch.int8, torch.int32, torch.uint8, torch.uint32


@pytest.mark.parametrize(
    ("instead", "words"),
    [
        ({f"{Q}.qweight": INT32, f"{Q}.scales": torch.float16}, f"{Q}.qweight is int32"),
        ({f"{Q}.weight": U8, f"{Q}.weight.absmax": torch.float32}, f"{Q}.weight is uint8"),
        ({f"{Q}.weight": INT8, f"{Q}.SCB": torch.float32}, f"{Q}.SCB is of bitsandbytes"),
        ({f"{Q}.weight": INT8, f"{Q}.weight_scale": torch.float32}, f"{Q}.weight is int8"),
        ({f"{Q}.weight": FP8}, f"{Q}.weight is float8_e4m3fn"),
        ({f"{Q}.weight": torch.float8_e5m2, f"{Q}.weight_scale_inv": torch.float32}, "float8_e5m2"),
        ({f"{Q}.weight": torch.bfloat16, f"{Q}.weight_scale": torch.bfloat16}, f"{Q}.weight_scale is of compressed"),
        (
            {f"{Q}.weight_packed": INT32, f"{Q}.weight_shape": torch.int64},
            f"{Q}.weight_packed is of compressed-tensors",
        ),
        ({f"{Q}.weight_packed": U8, f"{Q}.weight_scale": FP8}, f"{Q}.weight_packed is of compressed-tensors"),
        ({f"{Q}.weight": U32, f"{Q}.scales": torch.float16, f"{Q}.biases": torch.float16}, f"{Q}.weight is uint32"),
        ({f"{Q}.W_q": U8, f"{Q}.scale": torch.float16, f"{Q}.zero": torch.float16}, f"{Q}.W_q is of HQQ"),
        ({f"{Q}.codes": INT8, f"{Q}.codebooks": torch.float16}, f"{Q}.codebooks is of AQLM"),
        ({"model.layers.0.mlp.experts.down_proj_blocks": U8}, "down_proj_blocks is uint8"),
        ({"model.layers.0.mlp.experts.gate_up_proj": FP8}, "experts.gate_up_proj is float8_e4m3fn"),
        ({f"{Q}.weight._data": INT8, f"{Q}.weight._scale": torch.bfloat16}, f"{Q}.weight._data is of Quanto"),
        ({f"{Q}.weight:qdata": INT8, f"{Q}.weight:scale": torch.float32}, f"{Q}.weight:qdata is of torchao"),
        ({f"{Q}._weight_qdata": U8, f"{Q}._weight_scale": torch.float32}, f"{Q}._weight_qdata is of torchao"),
        ({f"{Q}.centroids": torch.float16, f"{Q}.indices": torch.int16}, f"{Q}.centroids is of VPTQ"),
        ({f"{Q}.trellis": torch.int16}, f"{Q}.trellis is of EXL3"),
    ],
)
def test_quantized_weights_are_refused_by_what_they_are(
    made: Path, copy: Callable[..., Path], instead: dict[str, torch.dtype], words: str
) -> None:
    """modelscope/ms-swift#384; the config says nothing of it."""
    path = copy()
    tensors = {n: t for n, t in weights(path).items() if n != f"{Q}.weight"}
    tensors |= {name: torch.ones(4, 4, dtype=torch.float32).to(dtype) for name, dtype in instead.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"stored quantized \(") as e:
        fold_checkpoint(path, merge_adapters([made / "a"]), path.parent / "out")
    assert words in str(e.value)
    assert not (path.parent / "out").exists()


def test_whole_numbers_that_are_no_weights_are_no_sign_of_quantization(copy: Callable[..., Path]) -> None:
    path = copy()
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "model.embeddings.position_ids": torch.arange(8)[None],
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "router.counts": torch.ones(4, 4, dtype=torch.int32),
    }
    save_file(weights(path) | masks, path / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint.open(path).remarks == []


def test_a_hub_model_is_judged_before_its_weights_are_downloaded(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    config = json.loads((made / "base" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": LEFT}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))

    def of(dtype: Any) -> SafetensorsRepoMetadata:
        tensor = TensorInfo(dtype=dtype, shape=[32, 32], data_offsets=(0, 1024))
        file = SafetensorsFileMetadata(metadata={}, tensors={f"{Q}.weight": tensor})
        return SafetensorsRepoMetadata(metadata={}, sharded=False, weight_map={}, files_metadata={"f": file})

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda _: of("BF16"))
    assert Checkpoint.open("someone/model", weights=False).config["hidden_size"] == 32
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda _: of("U8"))
    with pytest.raises(UserError, match="stored quantized"):
        Checkpoint.open("someone/model", weights=False)


def test_a_model_that_rounds_its_weights_whenever_it_runs_is_refused(copy: Callable[..., Path]) -> None:
    """microsoft/bitnet-b1.58-2B-4T-bf16: 16-bit weights, and quantization on the fly."""
    path = copy(quantization_config={"quant_method": "bitnet", "quantization_mode": "online"})
    with pytest.raises(UserError, match="BitNet rounds its weights"):
        Checkpoint.open(path)


# --- what travels -----------------------------------------------------------------------------------------

TRAVELS = (
    *("configuration_x.py", "modeling_x.py", "code/helper.py", "vocab.tiktoken", "vocab.json", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json", "chat_template.json", "chat_template.jinja"),
    *("additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "processor_config.json", "LICENSE"),
    *(
        "video_preprocessor_config.json",
        "NOTICE.txt",
        "USE_POLICY.md",
        "generation_config.json",
        "rwkv_vocab_v20230424",
    ),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "dict.txt", "bpe.codes", "font.ttf"),
)
STAYS = (
    *("README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "params.json"),
    *("adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "training_args.bin", "optimizer.pt"),
    *("scheduler.pt", "rng_state_0.pth", "latest", "zero_to_fp32.py", "global_step100/mp_rank_00_model_states.pt"),
    *("checkpoint-10/config.json", "checkpoint-10/model.safetensors", "runs/today/events.out.tfevents.1.host.2.0"),
    *("original/params.json", "onnx/config.json", "onnx/model.onnx", "model-Q4_K_M.gguf", ".gitattributes"),
    *(".cache/huggingface/x.lock", "__pycache__/modeling_x.pyc", "tf_model.h5", "flax_model.msgpack", "figure.png"),
    *(
        "all_results.json",
        "trainer_log.jsonl",
        "model.safetensors.index.json",
        "draft/config.json",
        "draft/w.safetensors",
    ),
)


def fill(path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if not (path / name).exists():
            (path / name).write_text(name)


def test_all_travels_but_weights_and_training_state(tmp_path: Path) -> None:
    """huggingface/transformers#24737, yangjianxin1/Firefly#118, NVIDIA-NeMo/Megatron-Bridge#3924."""
    fill(tmp_path, (*TRAVELS, *STAYS))
    assert [str(p) for p in companions(tmp_path)] == sorted(TRAVELS, key=Path)
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"tokenizer\.json: a broken link"):
        companions(tmp_path)


def test_a_download_brings_all_that_travels_and_no_weights() -> None:
    from huggingface_hub.utils import filter_repo_objects

    brought = set(filter_repo_objects((*TRAVELS, *STAYS), ignore_patterns=NOT_DOWNLOADED))
    assert set(TRAVELS) <= brought
    assert brought - set(TRAVELS) == {
        *("params.json", "adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
        "draft/config.json",
    }


def test_a_model_with_code_of_its_own_loads_as_its_base_did(
    made: Path, copy: Callable[..., Path], tmp_path: Path
) -> None:
    """huggingface/transformers#24737: `auto_map` kept, the files it names lost."""
    maps = {"AutoConfig": "own_configuration.OwnConfig", "AutoModelForCausalLM": "own_modeling.OwnForCausalLM"}
    path = copy(model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=maps)
    (path / "own_configuration.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    (path / "own_modeling.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .own_configuration import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    merged = merge_adapters([made / "a"])
    fold_checkpoint(path, merged, tmp_path / "out", verify=True)
    assert not verify_checkpoint(path, merged, tmp_path / "out").loaded
    assert far(loaded(tmp_path / "out", trust_remote_code=True), plus(weights(made / "base"), made / "a")) < 1e-6
    assert far(in_training(path, trust_remote_code=True), weights(made / "base")) == 0


# --- formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [{"torch_dtype": "float32"}, {"dtype": "float32"}, {}])
def test_a_config_says_what_was_written_to_old_and_new_readers(
    made: Path, copy: Callable[..., Path], tmp_path: Path, said: dict[str, Any]
) -> None:
    """unslothai/unsloth-zoo#286: a reader of before transformers 4.56 meets a config that says only `dtype`."""
    path = copy(
        text_config={"torch_dtype": "float32", "vision_config": {"dtype": "float32"}}, audio_config={"dtype": None}
    )
    config = json.loads((path / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")} | said
    (path / "config.json").write_text(json.dumps(config))
    fold_checkpoint(path, merge_adapters([made / "a"]), tmp_path / "out", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["text_config"] == {"torch_dtype": "bfloat16", "vision_config": {"dtype": "bfloat16"}}
    assert config["audio_config"] == {"dtype": None}
    fold_checkpoint(path, merge_adapters([made / "a"]), tmp_path / "same")
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    assert {k: v for k, v in config.items() if k in ("dtype", "torch_dtype")} == said


def test_a_cast_that_overflows_in_a_tensor_that_no_adapter_updates_is_refused(
    made: Path, copy: Callable[..., Path], tmp_path: Path
) -> None:
    path = copy()
    save_file(weights(path) | {"model.norm.weight": torch.full((32,), 1e5)}, path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight: its numbers are too large for float16"):
        fold_checkpoint(path, merge_adapters([made / "a"]), tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    fold_checkpoint(path, merge_adapters([made / "a"]), tmp_path / "out", dtype=torch.bfloat16, verify=True)


# --- numbers that are not finite --------------------------------------------------------------------------


def broken(path: Path, name: str, number: float, dtype: torch.dtype | None = None) -> None:
    """Put a number that is not finite into a base."""
    tensors = {n: t.to(dtype or t.dtype) for n, t in weights(path).items()}
    tensors[name].view(-1)[-1] = number
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_that_is_not_finite_where_it_is_updated_is_refused_as_itself(
    made: Path, copy: Callable[..., Path], tmp_path: Path, number: float, dtype: torch.dtype
) -> None:
    """Neither the disk nor the memory, nor a format that is too small, is to blame."""
    path = copy()
    broken(path, f"{Q}.weight", number, dtype)
    with pytest.raises(UserError, match=rf"{Q}\.weight, which is updated, holds inf or NaN in the base itself"):
        fold_checkpoint(path, merge_adapters([made / "a"]), tmp_path / "out", verify=True)
    shutil.copytree(path, tmp_path / "out")
    with pytest.raises(UserError, match=rf"{Q}\.weight holds inf or NaN, as in .*model itself"):
        verify_checkpoint(path, merge_adapters([made / "a"]), tmp_path / "out")


@pytest.mark.parametrize("to", [None, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_elsewhere_are_told_and_kept(
    made: Path, copy: Callable[..., Path], tmp_path: Path, to: torch.dtype | None
) -> None:
    path = copy()
    broken(path, "model.embed_tokens.weight", float("nan"))
    with pytest.warns(Remark, match=r"model\.embed_tokens\.weight holds inf or NaN in the base already"):
        fold_checkpoint(path, merge_adapters([made / "a"]), tmp_path / "out", dtype=to, verify=True)
    written = weights(tmp_path / "out")["model.embed_tokens.weight"]
    assert written.view(-1)[-1].isnan()
    assert written.isnan().sum() == 1


# --- what was written, as a loader of it sees it ------------------------------------------------------------


def test_a_base_that_lacks_a_tensor_is_told_by_verify(made: Path, copy: Callable[..., Path], tmp_path: Path) -> None:
    """huggingface/transformers fills it at random, with a warning in a log."""
    path = copy()
    tensors = weights(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"transformers finds no model\.layers\.1\.mlp\.up_proj\.weight in it"):
        fold_checkpoint(path, merge_adapters([made / "a"]), tmp_path / "out", verify=True)


def test_what_transformers_does_not_need_of_a_base_is_no_fault_of_what_was_written(
    made: Path, copy: Callable[..., Path], tmp_path: Path
) -> None:
    """Layers for prediction of several tokens (DeepSeek-V3), and buffers that older versions stored."""
    path = copy()
    more = {
        "model.layers.2.eh_proj.weight": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(weights(path) | more, path / "model.safetensors", metadata={"format": "pt"})
    fold_checkpoint(path, merge_adapters([made / "a"]), tmp_path / "out", verify=True)
    assert far(weights(tmp_path / "out"), plus(weights(path), made / "a")) < 1e-6


def rename_norm(path: Path) -> None:
    tensors = weights(path)
    tensors["model.norm_.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def add_adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def other_config(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_norm, r"model\.norm\.?_?\.weight is missing, or should not be there"),
        (add_adapter, "the adapter in the model's folder is no part of it"),
        (other_config, r"transformers finds no model\.layers\.2\.input_layernorm\.weight in it"),
        (beside_old_shards, "beside it is not read; fold again"),
    ],
)
def test_verify_sees_what_a_loader_would(made: Path, tmp_path: Path, change: Callable[..., None], words: str) -> None:
    merged = merge_adapters([made / "a"])
    fold_checkpoint(made / "base", merged, tmp_path / "out")
    kept = (tmp_path / "out" / "model.safetensors").read_bytes()
    change(tmp_path / "out", made) if change is beside_old_shards else change(tmp_path / "out")
    if change is beside_old_shards:
        (tmp_path / "out" / "model.safetensors").write_bytes(kept)
    with pytest.raises(UserError, match=words):
        verify_checkpoint(made / "base", merged, tmp_path / "out")


# --- what a class keeps in fp32 -----------------------------------------------------------------------------


def test_what_a_class_keeps_in_fp32_stays_so_where_transformers_keeps_it(tmp_path: Path) -> None:
    """huggingface/transformers#42580, vllm-project/vllm#23640, intel/auto-round#845: e_score_correction_bias."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16}
    ropes = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **experts, **ropes))
    model.save_pretrained(tmp_path / "base")
    lora(model, tmp_path / "a", base=tmp_path / "base", target_modules=["o_proj"])
    merged = merge_adapters([tmp_path / "a"])
    for dtype in (torch.bfloat16, torch.float16):
        out = tmp_path / str(dtype)
        fold_checkpoint(tmp_path / "base", merged, out, dtype=dtype, verify=True)
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).save_pretrained(tmp_path / "theirs")
        theirs = {name: t.dtype for name, t in weights(tmp_path / "theirs").items()}
        assert {name: t.dtype for name, t in weights(out).items()} == theirs
        assert set(theirs.values()) == {dtype, torch.float32}
    fold_checkpoint(tmp_path / "theirs", merged, tmp_path / "same", verify=True)
    assert {name: t.dtype for name, t in weights(tmp_path / "same").items()} == theirs


def test_some_is_kept_in_fp32_from_fp16_alone(tmp_path: Path) -> None:
    """`_keep_in_fp32_modules`: huggingface/transformers#20287."""
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2))
    model.save_pretrained(tmp_path / "base")
    lora(model, tmp_path / "a", base=tmp_path / "base", target_modules=["key"], task_type=None)
    merged, written = merge_adapters([tmp_path / "a"]), dict[torch.dtype, dict[str, Tensor]]()
    for dtype in (torch.bfloat16, torch.float16):
        written[dtype] = weights(fold_checkpoint(tmp_path / "base", merged, tmp_path / str(dtype), dtype=dtype))
    assert {n for n, t in written[torch.float16].items() if t.dtype == torch.float32} == {
        f"rwkv.blocks.{i}.attention.{name}" for i in range(2) for name in ("time_decay", "time_first")
    }
    assert {t.dtype for t in written[torch.bfloat16].values()} == {torch.bfloat16}


def test_of_a_class_that_transformers_has_not_what_stands_out_in_fp32_is_kept(
    made: Path, copy: Callable[..., Path], tmp_path: Path
) -> None:
    path = copy(architectures=["SomebodysForCausalLM"], tie_word_embeddings=False)
    merged = merge_adapters([made / "a"])
    all_fp32 = weights(fold_checkpoint(path, merged, tmp_path / "all", dtype=torch.bfloat16))
    assert {t.dtype for t in all_fp32.values()} == {torch.bfloat16}
    mixed = {n: t if n == "model.norm.weight" else t.to(torch.bfloat16) for n, t in weights(path).items()}
    save_file(mixed, path / "model.safetensors", metadata={"format": "pt"})
    out = weights(fold_checkpoint(path, merged, tmp_path / "mixed", dtype=torch.float16))
    assert {n for n, t in out.items() if t.dtype != torch.float16} == {"model.norm.weight"}


def test_whole_numbers_are_left_as_they_are(made: Path, copy: Callable[..., Path], tmp_path: Path) -> None:
    path = copy()
    more = {"model.counts": torch.arange(6), "model.mask": torch.ones(3, 3, dtype=torch.bool)}
    save_file(weights(path) | more, path / "model.safetensors", metadata={"format": "pt"})
    out = fold_checkpoint(path, merge_adapters([made / "a"]), tmp_path / "out", dtype=torch.bfloat16, verify=True)
    assert all(torch.equal(weights(out)[name], t) and weights(out)[name].dtype == t.dtype for name, t in more.items())


# --- through a run ------------------------------------------------------------------------------------------


def test_a_run_trains_on_the_model_alone_and_exports_it(call: Call, tmp_path: Path) -> None:
    """An adapter beside the student, a quantization that was undone, an index without metadata."""
    path = tmp_path / "student"
    student(path)
    made = llama(path, vocab_size=len(AutoTokenizer.from_pretrained(path)))
    lora(made, tmp_path / "stray", seed=7)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "stray" / name, path)
    (path / "model.safetensors").unlink()
    made.save_pretrained(path, max_shard_size="40KB")
    without = json.loads((path / INDEX_FILE).read_text())["weight_map"]
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": without}))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": LEFT}))
    settings = {"branch": {"steps": 1}, "eval": {"holdout": 0.2}}
    status, _, err = call("run", recipe(tmp_path, path, jsonl(tmp_path / "one.jsonl", rows(20)), **settings))
    assert status == 0, err
    assert err.count("note: ") == 2
    status, _, err = call("export", tmp_path / "run", "--out", tmp_path / "out", "--round", "1", "--dtype", "float32")
    assert status == 0, err
    branch = tmp_path / "run" / "round-001" / "one"
    scale = json.loads((branch / "adapter_config.json").read_text())
    assert scale["base_model_name_or_path"] == str(path)
    assert scale["lora_alpha"] / scale["r"] == 2
    base = {name: t.detach() for name, t in made.state_dict().items()}
    assert far(loaded(tmp_path / "out"), plus(base, branch)) < 1e-6


def test_a_run_on_a_base_that_is_not_finite_does_not_blame_the_learning_rate_alone(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "student"
    student(path)
    broken(path, "model.layers.1.mlp.up_proj.weight", float("nan"))
    line = refused(call("run", recipe(tmp_path, path, jsonl(tmp_path / "one.jsonl", rows(20))), "--quiet"))
    assert f"model.layers.1.mlp.up_proj.weight of {path} itself holds inf or NaN: use an intact student" in line


def test_a_base_that_transformers_cannot_load_is_no_fault_of_what_was_written(
    made: Path, copy: Callable[..., Path], tmp_path: Path
) -> None:
    path, merged = copy(model_type="unheard_of"), merge_adapters([made / "a"])
    fold_checkpoint(path, merged, tmp_path / "out", verify=True)
    assert not verify_checkpoint(path, merged, tmp_path / "out").loaded
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(UserError, match="transformers cannot load it"):
        verify_checkpoint(path, merged, tmp_path / "out")
