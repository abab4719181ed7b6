"""What this machine is, and what would stop a run on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from false_gpu import false_gpu

from mot_lora.planning.machine import GpuRecord, MachineRecord, doctor

GIB = 2**30
CARD = GpuRecord(name="NVIDIA GeForce RTX 4090", free=23 * GIB, total=24 * GIB, capability="8.9", bf16=True)
GOOD = MachineRecord(
    system="Linux",
    versions=dict.fromkeys(("python", "mot-lora", "torch", "transformers", "peft", "bitsandbytes"), "1")
    | {"accelerate": "1", "datasets": "1"},
    driver="580.65.06",
    cuda="13.0",
    gpus=(CARD,),
    bitsandbytes_cuda=True,
    host_free=30 * GIB,
    host_limit=32 * GIB,
    disk={"/work": 100 * GIB, "/cache": 100 * GIB},
)


def of(**changes: Any) -> tuple[list[str], list[str]]:
    machine = GOOD.model_copy(update=changes)
    return machine.stops, machine.remarks


def test_a_good_machine_has_nothing_to_be_told() -> None:
    assert of() == ([], [])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": (), "driver": "535.104.05"}, "driver 535.104.05 cannot run torch's CUDA 13.0: update it to 580"),
        (
            {"gpus": (), "cuda": None},
            "torch is built without CUDA, but there is a GPU (driver 580.65.06): install torch",
        ),
        ({"gpus": ()}, "torch (CUDA 13.0) finds no GPU, although the NVIDIA driver 580.65.06 is installed"),
        ({"gpus": (), "broken": "CUDA error: unknown error"}, "CUDA does not start (CUDA error: unknown error)"),
        ({"bitsandbytes_cuda": False}, "bitsandbytes has no library for CUDA 13.0"),
        ({"disk": {"/work": 2**20, "/cache": 100 * GIB}}, "/work has 1 MiB free"),
        ({"versions": {**GOOD.versions, "peft": None}}, "peft is not installed: pip install peft"),
    ],
)
def test_what_stops_a_run_is_said_with_what_to_do(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (stop,), remarks = of(**changes)
    assert words in stop
    assert remarks == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": (CARD.model_copy(update={"name": "Tesla T4", "bf16": False}),)}, "Tesla T4 has no bf16"),
        ({"gpus": (CARD.model_copy(update={"free": 6 * GIB}),)}, "other programs use 18.00 GiB of 24.00 GiB"),
        ({"gpus": (), "hidden": True}, "CUDA_VISIBLE_DEVICES hides the GPUs"),
        ({"gpus": (), "driver": None, "cuda": None, "bitsandbytes_cuda": False}, "there is no GPU"),
        ({"gpus": (), "driver": None}, "there is no GPU"),
        ({"host_free": 3 * GIB, "host_limit": 4 * GIB}, "3.00 GiB of 4.00 GiB of host memory are free"),
        ({"disk": {"/work": 100 * GIB, "/cache": 9 * GIB}}, "/cache has 9.00 GiB free"),
    ],
)
def test_what_a_run_can_live_with_is_no_stop(changes: dict[str, Any], words: str) -> None:
    stops, (remark,) = of(**changes)
    assert words in remark
    assert stops == []


def test_the_command_says_it_as_json_and_as_a_table(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = call("doctor", "--json")
    said = json.loads(out)
    assert (status, err) == (bool(said["stops"]), "")
    assert said["versions"]["torch"] == torch.__version__
    assert said["versions"]["triton"] is None or said["versions"]["triton"]
    assert 0 < said["host_free"] <= said["host_limit"]
    assert str(Path.cwd()) in said["disk"]
    monkeypatch.setattr("mot_lora.planning.machine.PACKAGES", ("mot-lora", "torch", "no-such-package"))
    status, out, err = call("doctor")
    assert (status, err) == (1, "")
    assert "stops a run: no-such-package is not installed: pip install no-such-package" in out


def test_the_limit_of_a_container_and_its_driver_are_seen(tmp_path: Path) -> None:
    for name, text in {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "1073741824\n",
        "sys/fs/cgroup/memory.current": "268435456\n",
        "sys/fs/cgroup/memory.stat": "inactive_file 0\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1.2  Mon\n",
        "dev/nvidia0": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = doctor(tmp_path)
    assert machine.host_limit == GIB
    assert machine.host_free <= 3 * GIB // 4
    assert machine.driver == "570.1.2"


@false_gpu(name="Tesla T4", gib=16, capability="7.5")
def test_a_card_is_read_from_torch() -> None:
    held = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    machine = doctor()
    (card,) = machine.gpus
    assert (card.name, card.capability, card.bf16, card.total) == ("Tesla T4", "7.5", False, 16 * GIB)
    assert card.total - card.free == held.nbytes
    assert "Tesla T4 has no bf16: it computes in fp16" in machine.remarks
    assert any("bitsandbytes has no library for CUDA" in s for s in machine.stops)  # this is its build for CPUs
