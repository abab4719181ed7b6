"""Everything that people get wrong, through the command: one line that names it, status 2, nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import refused, stored
from safetensors.torch import load_file, save_file

from mot_lora import UserError
from mot_lora.errors import enough_memory
from mot_lora.reader import parse_config
from mot_lora.training.driver import driver_version, why_unused
from mot_lora.training.student import device_of

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refusal(call: Call, config_file: Path, tmp_path: Path) -> Callable[..., str]:
    """What `run` says to these overrides; it has left no run folder."""

    def say(*overrides: str) -> str:
        line = refused(call("run", config_file, f"output={tmp_path / 'run'}", *overrides))
        assert not (tmp_path / "run").exists()
        return line

    return say


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("branch.learning_rat=1", "`branch.learning_rat` is not a setting; did you mean `learning_rate`?"),
        ("teachers.0.sample=1", "`teachers.0.sample` is not a setting; did you mean `samples`?"),
        ("eval.split_name=a", "`eval.split_name` is not a setting; did you mean `split`?"),
        ("branch.steps=many", "`branch.steps`: input should be a valid integer"),
        ("teachers=[]", "`teachers`: needs at least one teacher"),
        ("teachers.0.name=a/b", "`teachers.0.name`: `a/b` also names a folder: use letters"),
        ("teachers.0.name=..", "`teachers.0.name`: `..` also names a folder: use letters"),
        ("teachers.0.name=B", "`teachers`: teacher listed twice: b"),
        ("merge.method=ties", "`merge`: method `ties` needs a `density`"),
        ("merge={method: ties, density: 1.5}", "`merge.density`: density must be in (0, 1], not 1.5"),
        ("merge={method: ties, density: 0}", "`merge.density`: density must be in (0, 1], not 0"),
        ("merge.weights=[1]", "merge.weights has 1 numbers for 2 teachers"),
        ("merge.weights=[1, -1]", "`merge.weights.1`: weights must not be negative, but one is -1"),
        ("merge.method=nowhere:mean", "merge method `nowhere:mean` cannot be imported"),
        ("lora.target_modules=[query, valeu]", "match no layer; the student has down_proj, gate_proj, k_proj"),
        ("branch.max_length=3", "teacher `a`: no traces to train on: 24 too long; branch.max_length is 3"),
        ("branch.report_to=trackio", "branch.report_to: trackio is not installed; pip install trackio"),
        ("student=/nowhere/at/all", "/nowhere/at/all: neither a local folder nor a model that can be downloaded"),
        ("teachers.0.data=/nowhere/a.jsonl", "/nowhere/a.jsonl: no such file"),
        ("teachers.0.split=train", "a file has no `split` or `subset`"),
        ("teachers.0.columns={reasoning: thoughts}", "`columns` takes reasoning from `thoughts`, but it has question"),
        ("teachers.0.columns={resoning: thoughts}", "`teachers.0.columns.resoning`"),
        ("branch={steps: 3, steps: 4}", "the value is not YAML"),
        ("eval.holdout=0.0001", "no traces held out to measure; raise eval.holdout"),
    ],
)
def test_a_setting_that_cannot_be_is_told_before_any_work(
    refusal: Callable[..., str], override: str, words: str
) -> None:
    assert words in refusal(*(["stop.metric=loss"] if "holdout" in override else []), override)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_told(refusal: Callable[..., str]) -> None:
    assert "device `cuda`: torch finds no CUDA GPU; to run on the CPU, set device=cpu" in refusal("device=cuda")


ROW = {"question": "1 + 1 = ?", "answer": "2"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", "empty.jsonl: holds no rows"),
        ("binary.jsonl", b"\x00\xff\xfe", "binary.jsonl: not text in UTF-8"),
        ("broken.jsonl", json.dumps(ROW).encode() + b'\n{"question": ', "broken.jsonl:2: not JSON"),
        ("broken.json", b'[{"question": "q"},\n {"answer": ]', "broken.json:2: not JSON"),
        (
            "other.jsonl",
            b'{"text": "all in one", "id": 3}',
            "other.jsonl:1: needs `question`, or `messages`; it has text",
        ),
        ("role.jsonl", b'{"messages": [{"role": "user", "content": "q"}]}', "a trace of one role only (user)"),
        ("traces.txt", json.dumps(ROW).encode(), "traces.txt: not named as a data file is"),
        ("rows.parquet", b"PAR1 but not really", "rows.parquet: not parquet"),
        ("rows.jsonl.gz", b"not gzip", "rows.jsonl.gz: cannot be read (not gzip)"),
    ],
)
def test_a_data_file_that_cannot_be_read_is_named(
    refusal: Callable[..., str], tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refusal(f"teachers.0.data={tmp_path / name}")


def test_a_key_that_is_given_twice_is_named(call: Call, config_file: Path) -> None:
    config_file.write_text(f"{config_file.read_text()}seed: 3\n")
    assert "`seed` is given twice" in refused(call("data", config_file))


def test_what_is_no_student_is_named(
    refusal: Callable[..., str], qwen3: Path, make_adapter: Any, tmp_path: Path
) -> None:
    assert "an adapter, not a model" in refusal(f"student={make_adapter(qwen3, 'adapter')}")
    assert "not a model folder" in refusal(f"student={tmp_path}")

    def copy(name: str, **config: Any) -> Path:
        path = Path(shutil.copytree(qwen3, tmp_path / name))
        said = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**said, **config}))
        return path

    four = copy("four-bits", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    for file in four.glob("*.safetensors"):
        packed = {n: t.view(torch.uint8) if n.endswith("_proj.weight") else t for n, t in load_file(file).items()}
        save_file(packed, file, metadata={"format": "pt"})
    assert "its weights are stored quantized" in refusal(f"student={four}")
    pickled = copy("pickled")
    for file in [*pickled.glob("*.safetensors"), pickled / "model.safetensors.index.json"]:
        file.unlink()
    torch.save(stored(qwen3), pickled / "pytorch_model.bin")
    assert "not .safetensors; convert them: AutoModelForCausalLM" in refusal(f"student={pickled}")
    plain = copy("no-template")
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = json.loads((plain / "tokenizer_config.json").read_text())
    (plain / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": None}))
    assert "has no chat template" in refusal(f"student={plain}")
    assert "cannot be loaded as a causal language model" in refusal(f"student={copy('unknown', model_type='nonsense')}")
    short = copy("short", max_position_embeddings=9)
    assert f"but {short} reads at most 9; set branch.max_length to 9 or less" in refusal(f"student={short}")


def test_code_that_a_model_brings_is_not_run_unless_asked_for(
    refusal: Callable[..., str], qwen3: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(qwen3, tmp_path / "coded"))
    mark = tmp_path / "it ran"
    (path / "own.py").write_text(f"open({str(mark)!r}, 'w')\nfrom transformers import Qwen3Config as Own\n")
    config = json.loads((path / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (path / "config.json").write_text(json.dumps({**config, **own}))
    assert "trust_remote_code: true" in refusal(f"student={path}")
    assert not mark.exists()


def test_an_index_cannot_name_files_outside_its_folder(
    call: Call, qwen3: Path, make_adapter: Any, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(qwen3, tmp_path / "models" / "evil"))
    shard = min(path.glob("*.safetensors"))
    shutil.move(shard, tmp_path / "models" / shard.name)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {k: f"../{v}" if v == shard.name else v for k, v in index["weight_map"].items()}
    file.write_text(json.dumps(index))
    before = sorted(tmp_path.rglob("*"))
    line = refused(call("fold", path, make_adapter(qwen3, "adapter"), "--out", tmp_path / "out" / "model"))
    assert f"names '../{shard.name}', which is no .safetensors file of its folder" in line
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and "adapter" not in p.parts] == []


def test_an_adapter_in_a_bin_is_refused_with_the_way_to_convert_it(
    call: Call, qwen3: Path, make_adapter: Any, tmp_path: Path
) -> None:
    adapter = make_adapter(qwen3, "adapter")
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert "safe_serialization=True" in refused(call("merge", adapter, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_folder_that_cannot_be_is_named(call: Call, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be written (Not a directory)" in refused(
        call("run", config_file, f"output={tmp_path / 'file' / 'run'}")
    )
    assert (tmp_path / "file").read_text() == "mine"
    run = tmp_path / "newer"
    run.mkdir()
    config = yaml.safe_load(config_file.read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "output": str(run), "later": 1}))
    (run / "environment.json").write_text(json.dumps({"format": 99, "versions": {"mot-lora": "9.0"}}))
    for arguments in (("show", run), ("report", run), ("export", run, "--out", tmp_path / "out")):
        assert "written by mot-lora 9.0, which is newer than this; update mot-lora" in refused(call(*arguments))
    assert "newer than this" in refused(call("run", config_file, f"output={run}"))
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "environment.json"]


# --- a GPU that cannot be used ---------------------------------------------------------------------------

KERNEL = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (root@host)\nGCC version: 12.2.0\n"
)


def test_a_driver_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    file = tmp_path / "proc/driver/nvidia/version"
    assert driver_version(tmp_path) is None
    file.parent.mkdir(parents=True)
    file.write_text(KERNEL.format("535.104.05"))
    assert driver_version(tmp_path) is None  # a container that was given no GPU
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert driver_version(tmp_path) == "535.104.05"

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 550.54\necho 550.54\n")
    smi.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda _: str(smi))
    assert driver_version(tmp_path / "dev") == "550.54"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert driver_version(tmp_path / "dev") is None

    old = "the NVIDIA driver 535.104.05 cannot run torch's CUDA 13.0: update it to 580 or newer"
    assert why_unused("535.104.05", "13.0") == old
    assert "torch (CUDA 13.0) finds no GPU, although the NVIDIA driver 580.65.06 is installed" in (
        why_unused("580.65.06", "13.0") or ""
    )
    assert "finds no GPU" in (why_unused("535.104.05", "12.8") or "")  # new enough for that
    for nothing in (why_unused(None, "13.0"), why_unused("535.104.05", None)):
        assert nothing is None

    monkeypatch.setattr("mot_lora.training.student.driver_version", lambda: "535.104.05")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = {"student": "s", "teachers": [{"name": "a", "data": "a.jsonl"}]}
    for asked, begin in (("auto", "device `auto`: "), ("cuda", "device `cuda`: ")):
        with pytest.raises(UserError) as e:
            device_of(parse_config({**here, "device": asked}, "test"))
        assert str(e.value) == f"{begin}{old}; to run on the CPU, set device=cpu"
    assert device_of(parse_config({**here, "device": "cpu"}, "test")).type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # GPUs are hidden on purpose
    assert device_of(parse_config(here, "test")).type == "cpu"


LATE = """
import os
import torch
from mot_lora.training.driver import expandable_segments
expandable_segments()
print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch has it on Linux alone")
@pytest.mark.parametrize(
    ("said", "want"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ],
)
def test_segments_can_grow_also_where_torch_was_imported_before(said: dict[str, str], want: str) -> None:
    kept = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
    done = subprocess.run([sys.executable, "-c", LATE], env=kept | said, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == want


# --- memory that ran out ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_out_of_memory_is_known_by_every_name(error: Exception, is_one: bool) -> None:
    with pytest.raises(UserError if is_one else type(error)) as e, enough_memory("folding x", "lower y"):
        raise error
    if is_one:
        reason = " ".join(str(error).split()) or "MemoryError"
        assert str(e.value) == f"out of memory folding x ({reason}); lower y"
