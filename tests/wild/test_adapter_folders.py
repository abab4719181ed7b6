"""Folders that are no adapter's, but hold some: the message says where they lie."""

from pathlib import Path
from typing import Any

import pytest
from conftest import refused

from mot_lora import UserError, load_adapter

DEEPER: dict[str, tuple[list[str], list[str], str]] = {
    "PEFT's named adapters": (["first"], ["first"], ""),
    "a Trainer's checkpoints": (
        [f"checkpoint-{n}" for n in (500, 1000, 1500, 2000, 90)],
        ["checkpoint-2000", "checkpoint-1500", "checkpoint-1000", "checkpoint-500"],
        " and 1 more",
    ),
    "verl's": (["global_step_10/actor/lora_adapter"], ["global_step_10/actor/lora_adapter"], ""),
    "ms-swift's": (["v0-2025/checkpoint-5/default"], ["v0-2025/checkpoint-5/default"], ""),
}


@pytest.mark.parametrize("kind", DEEPER)
def test_a_folder_of_adapters_says_where_they_lie(tmp_path: Path, call: Any, kind: str) -> None:
    """hiyouga/LlamaFactory#2977, #9659."""
    folders, named, more = DEEPER[kind]
    for name in folders:
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "adapter_config.json").write_text("{}")
    message = refused(call("merge", tmp_path / "out", "--out", tmp_path / "m"))
    assert message.endswith(f"lies in it: {', '.join(str(tmp_path / 'out' / n) for n in named)}{more}")


def test_a_model_with_adapters_in_it_says_both(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"a full model, not an adapter.*adapter_config\.json$"):
        load_adapter(tmp_path)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"a full model, not an adapter.*/lora$"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_an_adapter_is_not_its_folder(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=rf"{file}: a file, not an adapter folder; name the folder"):
        load_adapter(tmp_path / file)
