"""One base as many machines write it, and many bases in folders of one name."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import change_config, refused
from wild import llama, lora

from mot_lora import Adapter, Factors, UserError, merge_adapters
from mot_lora.adapters.bases import compare
from mot_lora.adapters.save import pack
from mot_lora.adapters.sources import check_bases
from mot_lora.errors import Remark

QWEN = "Qwen/Qwen2.5-7B-Instruct"
SNAPSHOT = "snapshots/a09a35458c702b33eeacc393d103063234e8bc28"
ONE = [
    (QWEN, QWEN),
    (QWEN, "qwen/qwen2.5-7b-instruct"),
    (QWEN, f"{QWEN}@main"),
    (QWEN, f"https://huggingface.co/{QWEN}"),
    (QWEN, f"hf://{QWEN}"),
    (QWEN, f"/home/user/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B-Instruct/{SNAPSHOT}"),
    (QWEN, f"/home/user/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B-Instruct/{SNAPSHOT}/"),
    (QWEN, "/mnt/workspace/.cache/modelscope/hub/Qwen/Qwen2___5-7B-Instruct"),
    (QWEN, "/home/user/.cache/modelscope/hub/models/Qwen/Qwen2___5-7B-Instruct"),
    (QWEN, r"C:\models\Qwen2.5-7B-Instruct"),
    (QWEN, "/data/Qwen2.5-7B-Instruct/"),
    (QWEN, "models/Qwen_Qwen2.5-7B-Instruct"),
    (QWEN, "/models/Qwen--Qwen2.5-7B-Instruct"),
    (QWEN, "unsloth/qwen2.5-7b-instruct-unsloth-bnb-4bit"),
    (QWEN, "unsloth/Qwen2.5-7B-Instruct-bnb-4bit"),
    (QWEN, "unsloth/Qwen2.5-7B-Instruct"),
    (QWEN, "Qwen/Qwen2.5-7B-Instruct-AWQ"),
    (QWEN, "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"),
    ("meta-llama/Llama-3.1-8B-Instruct", "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"),
    ("meta-llama/Meta-Llama-3-8B", "LLM-Research/Meta-Llama-3-8B"),
    ("/a/models--gpt2/snapshots/607a30d7", "gpt2"),
    ("/mnt/hub/models--Qwen--Qwen3-0.6B/snapshots/1111111", "/other/models--Qwen--Qwen3-0.6B/snapshots/2222222"),
    ("/data/sft/checkpoint-500", "/data/sft/checkpoint-500/"),
]
GENERIC = (
    *("final", "merged", "output", "base", "merged_model", "final-model", "best_model", "last", "checkpoint_1000"),
    *(
        "step-500",
        "epoch_3",
        "hf",
        "huggingface",
        "global_step_100",
        "weights",
        "sft",
        "v2",
        "7b-instruct",
        "1",
        "student",
    ),
    *("export", "a09a35458c702b33eeacc393d103063234e8bc28", "model-bf16", "my_model", "Checkpoint-500"),
)
UNKNOWN = [
    ("/data/sft/checkpoint-500", "/data/dpo/checkpoint-500"),
    ("/models/llama/model", "/models/qwen/model"),
    *((f"/a/{name}", f"/b/{name}") for name in GENERIC),
    ("sft/checkpoint-500", "dpo/checkpoint-500"),
    (r"C:\runs\a\merged", r"D:\runs\b\merged"),
    ("global_step_10/actor/huggingface", "global_step_20/actor/huggingface"),
]
TWO = [
    (QWEN, "Qwen/Qwen2.5-7B"),
    (QWEN, "Qwen/Qwen2.5-Coder-7B-Instruct"),
    (QWEN, "Qwen/Qwen2.5-14B-Instruct"),
    ("/data/sft/checkpoint-500", "/data/sft/checkpoint-1000"),
    ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base"),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"),
    (QWEN, "/data/dpo/checkpoint-500"),
]
BY_NAME = [
    ("alice/assistant-8b", "bob/assistant-8b"),
    ("/alice/assistant-8b", "/bob/assistant-8b"),
    ("alice/assistant", "/models/assistant"),
    ("meta-llama/Llama-2-7b-hf", "daryl149/llama-2-7b-hf"),
]


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        (*pair, v)
        for v, pairs in (("one", ONE), ("unknown", UNKNOWN), ("two", TWO), ("by name", BY_NAME))
        for pair in pairs
    ],
)
def test_a_base_is_known_by_its_name(one: str, other: str, verdict: str) -> None:
    """unslothai/unsloth#3726."""
    assert compare(one, other) == compare(other, one) == verdict


def adapter(name: str, base: str | None) -> Adapter:
    return Adapter(name, {"m": Factors(torch.ones(1, 2), torch.ones(3, 1))}, base)


def test_what_the_name_alone_says_is_told() -> None:
    with pytest.warns(
        Remark, match=r"`a` was trained on bob/judge-7b, `b` on eve/judge-7b: the same base by name only.*--base"
    ):
        merge_adapters([adapter("a", "bob/judge-7b"), adapter("b", "eve/judge-7b")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_bases([adapter("a", QWEN), adapter("n", None), adapter("b", ONE[7][1])])


def test_folders_of_one_name_need_a_word(tmp_path: Path, call: Any) -> None:
    base = llama(tmp_path / "base")
    for seed, (name, said) in enumerate((("a", UNKNOWN[0][0]), ("b", UNKNOWN[0][1]))):
        lora(base, tmp_path / name, base=tmp_path / "base", seed=seed)
        change_config(tmp_path / name, base_model_name_or_path=said)
    for command in (("merge", "--out", tmp_path / "m"), ("inspect",)):
        message = refused(call(*command, tmp_path / "a", tmp_path / "b"))
        assert all(s in message for s in (*UNKNOWN[0], "does not say what model it is", "--base"))
    status, _, _ = call("merge", tmp_path / "a", tmp_path / "b", "--base", UNKNOWN[0][0], "--out", tmp_path / "m")
    assert status == 0  # a word is enough: the model need not be there
    change_config(tmp_path / "b", base_model_name_or_path="bob/assistant-8b")
    change_config(tmp_path / "a", base_model_name_or_path="alice/assistant-8b")
    status, out, err = call("merge", tmp_path / "a", tmp_path / "b", "--json", "--out", tmp_path / "n")
    assert (status, err.startswith("note: adapter `a` was trained on alice"), out.count("\n")) == (0, True, 1)


def test_folders_that_are_there_are_compared(tmp_path: Path) -> None:
    folders = ("a/model", "b/model", "a/Qwen3-1B", "b/Qwen3-1B")
    for where in folders:
        llama(tmp_path / where, seed=where.startswith("b"))
    shutil.copytree(tmp_path / "a/model", tmp_path / "copy-of-it")
    (tmp_path / "link").symlink_to(tmp_path / "a/model")
    said = {
        name: str(tmp_path / name) for name in ("a/model", "b/model", "a/Qwen3-1B", "b/Qwen3-1B", "copy-of-it", "link")
    }
    for other in ("copy-of-it", "link"):
        assert compare(said["a/model"], said[other]) == "one"
    for pair in (("a/model", "b/model"), ("a/Qwen3-1B", "b/Qwen3-1B"), ("copy-of-it", "b/model")):
        assert compare(*(said[p] for p in pair)) == "two"
    shutil.rmtree(tmp_path / "b/model")  # what is not there is known by its name
    assert compare(said["a/model"], said["b/model"]) == "unknown"
    (tmp_path / "b/Qwen3-1B/config.json").write_text("{}")
    (tmp_path / "b/Qwen3-1B/model.safetensors").write_bytes(b"")  # and so is what cannot be read
    assert compare(said["a/Qwen3-1B"], said["b/Qwen3-1B"]) == "by name"
    with pytest.raises(UserError, match="does not say what model"):
        merge_adapters([adapter("a", said["a/model"]), adapter("b", said["b/model"])])


def test_the_base_that_is_written_is_the_first_that_is_said() -> None:
    assert pack(merge_adapters([adapter("a", None), adapter("b", QWEN)])).config["base_model_name_or_path"] == QWEN
