"""Requantizing a base from its shards, beside reading them once: its time, and the memory that it takes.

    python tests/benchmarks/fold_memory.py                     # Qwen3-0.6B's shape, random weights; 1.5 GB of disk
    python tests/benchmarks/fold_memory.py --layers 6 --rounds 5

Builds a checkpoint in bf16 shards and four rank-16 all-linear adapters, and folds their mean into the base in NF4: on
CUDA where there is a GPU. Each measurement is a fresh process that does it `--repeat` times. `seconds` is the least of
these; for a fold the whole of `for _ in fold(...)`. `peak_mb` is the most memory that the process had resident during a
fold, over what it had before the first; `gpu_mb` the same of what torch has allocated on the GPU. glibc keeps what is
freed in blocks below 32 MB: "freed at once" tells it not to, and so shows what was in use. `warm` is with the shards in
the page cache; before `cold` the kernel was asked to forget them, which a virtual machine's host may not have done.
A round is a ledger's entry: here, the same four adapters again.
"""

import argparse
import ctypes
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

PYTHON = shlex.split(os.environ.get("BENCH_PYTHON", "")) or [sys.executable]  # what runs the steps
# the driver and its steps all work in one folder, which has these
BASE, ADAPTERS, ASKED = Path("base"), [Path(f"adapter{i}") for i in range(4)], Path("asked.json")
RANK, ALPHA = 16, 32
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def shape() -> dict[str, Any]:
    return json.loads(ASKED.read_text())["shape"]


def checkpoint() -> Any:
    from mot_lora.checkpoints.checkpoint import Checkpoint

    return Checkpoint.open(BASE)


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- steps: each runs in a process of its own ------------------------------------------------------------


def build() -> dict[str, Any]:
    """The checkpoint, shard by shard, and adapters with updates of about 1 % of its weights."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3Config

    from mot_lora.checkpoints.tensorfile import write_tensors

    config = Qwen3Config(**shape(), architectures=["Qwen3ForCausalLM"], dtype="bfloat16")
    config.save_pretrained(BASE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}  # what is tied, once
    shards = json.loads(ASKED.read_text())["shards"]
    share, before, where = sum(s.numel() for s in shapes.values()) / shards, 0, {}
    for name in sorted(shapes):  # the order in which transformers writes
        where[name] = f"model-{int(before / share) + 1:05}-of-{shards:05}.safetensors"
        before += shapes[name].numel()
    for file in sorted(set(where.values())):
        names = [name for name in where if where[name] == file]
        weights = ((n, torch.randn(shapes[n], dtype=torch.bfloat16) * 0.02) for n in names)
        write_tensors(BASE / file, {n: (torch.bfloat16, shapes[n]) for n in names}, weights)
    (BASE / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

    linear = {n.removesuffix(".weight"): s for n, s in shapes.items() if "_proj" in n}
    names = sorted({m.rpartition(".")[2] for m in linear})
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM", inference_mode=True)
    size = (0.01 * 0.02 * RANK / ALPHA / RANK**0.5) ** 0.5
    for path in ADAPTERS:
        tensors = {}
        for module, (out, width) in linear.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, width) * size
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, RANK) * size
        lora.save_pretrained(str(path))
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return {"entries": sum(s.numel() for s in linear.values())}


def read(cold: bool) -> dict[str, Any]:
    """Every byte of the shards once, 16 MiB at a time into the same memory."""
    into = memoryview(bytearray(2**24))

    def work() -> None:
        for file in sorted(BASE.glob("*.safetensors")):
            with file.open("rb", buffering=0) as f:
                while f.readinto(into):
                    pass

    return measured(work, cold)


def fold(ahead: int, cold: bool) -> dict[str, Any]:
    """The fold of a ledger, with so many modules read ahead."""
    import mot_lora.training.student as room
    from mot_lora import merge_adapters
    from mot_lora.config import LoraConfig
    from mot_lora.training.adapter import add_adapter

    room.AHEAD = ahead
    base = checkpoint()
    model = add_adapter(room.load_model(base, "nf4", device()), LoraConfig(r=RANK, alpha=ALPHA))
    ledger = [merge_adapters(ADAPTERS) for _ in range(json.loads(ASKED.read_text())["rounds"])]

    def work() -> None:
        for _ in room.fold(model, base, ledger):
            pass

    next(room.fold(model, base, ledger))  # libraries load more of themselves at their first use
    ctypes.CDLL(None).malloc_trim(0)
    return measured(work, cold)


def measured(work: Callable[[], None], cold: bool) -> dict[str, Any]:
    """The least time and the most memory of some runs."""
    import torch

    gpu = device().type == "cuda"
    before, seconds, peaks, on_gpu = resident_mb("VmRSS"), [], [], []
    for _ in range(json.loads(ASKED.read_text())["repeat"]):
        if cold:
            forget()
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is what it is now
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
            on_gpu.append((torch.cuda.max_memory_allocated() - held) / 1e6)
        seconds.append(time.perf_counter() - start)
        peaks.append(resident_mb("VmHWM") - before)
    return {"seconds": min(seconds), "peak_mb": max(peaks), "runs": seconds} | ({"gpu_mb": max(on_gpu)} if gpu else {})


def resident_mb(key: str) -> float:
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(said[key].split()[0]) * 1024 / 1e6


def forget() -> None:
    for file in BASE.glob("*.safetensors"):
        with file.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine() -> dict[str, Any]:
    """What the steps ran on."""
    import torch

    at = device()
    name = torch.cuda.get_device_name(at) if at.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads()}


# --- the driver --------------------------------------------------------------------------------------------


def run_step(function: Callable[..., Any], settings: dict[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    """One step in a fresh process; the last line that it prints is what it found."""
    subprocess.run(["cat", os.devnull, *BASE.glob("*.safetensors")], stdout=subprocess.DEVNULL, check=True)
    os.sync()
    command = [*PYTHON, __file__, "--step", json.dumps([function.__name__, arguments])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(settings or {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{function.__name__} {arguments}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def steps(most: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for cold in (False, True):
        how = "cold" if cold else "warm"
        yield f"read, {how}", run_step(read, cold=cold)
        for n in (0, most):
            yield f"fold, {how}, {n} ahead", run_step(fold, ahead=n, cold=cold)
    for n in (0, most):
        yield f"fold, warm, {n} ahead, freed at once", run_step(fold, FREED_AT_ONCE, ahead=n, cold=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("fold_memory.json"), metavar="FILE", help="for the figures")
    numbers = {"layers": 28, "hidden": 1024, "heads": 16, "kv-heads": 8, "head-dim": 128, "intermediate": 3072}
    numbers |= {"vocab": 151936, "shards": 4, "rounds": 1, "ahead": 2, "repeat": 3}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{default}")
    parser.add_argument("--untied", action="store_true", help="with a head of its own")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        function, arguments = json.loads(asked.step)
        print("\n" + json.dumps(globals()[function](**arguments)))
        return
    target, load = asked.json.resolve(), os.getloadavg()[0]
    said = {
        "shards": asked.shards,
        "rounds": asked.rounds,
        "repeat": asked.repeat,
        "shape": {
            "num_hidden_layers": asked.layers,
            "hidden_size": asked.hidden,
            "num_attention_heads": asked.heads,
            "num_key_value_heads": asked.kv_heads,
            "head_dim": asked.head_dim,
            "intermediate_size": asked.intermediate,
            "vocab_size": asked.vocab,
            "tie_word_embeddings": not asked.untied,
        },
    }
    with tempfile.TemporaryDirectory(prefix="bench-fold-") as temporary:
        os.chdir(temporary)
        ASKED.write_text(json.dumps(said))
        built = run_step(build)
        shards_mb = sum(file.stat().st_size for file in BASE.glob("*.safetensors")) / 1e6
        found = dict(steps(asked.ahead))
        where = run_step(machine)
        os.chdir(target.parent)
    for name, row in found.items():
        if name.startswith("fold"):
            row["of_reading"] = row["seconds"] / found[f"read, {name.split(', ')[1]}"]["seconds"]
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "mot-lora")}
    report = {
        "command": shlex.join(["python", "tests/benchmarks/fold_memory.py", *sys.argv[1:]]),
        "where": {**where, "cores": os.cpu_count(), "load_before": load, "system": platform.platform()},
        "versions": {"python": platform.python_version(), **packages},
        **said,
        "shards_mb": shards_mb,
        # of the largest linear layer, what one copy in fp32 takes
        "module_mb": 4 * asked.hidden * max(asked.intermediate, asked.heads * asked.head_dim) / 1e6,
        **built,
        "measured": found,
    }
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{where['device']}; shards {shards_mb:.0f} MB, the largest module {report['module_mb']:.0f} MB in fp32")
    for name, row in found.items():
        ratio = f"{row['of_reading']:8.1f} x reading" if "of_reading" in row else " " * 18
        print(f"{name:36}{row['seconds']:8.2f} s{ratio}{row['peak_mb']:8.0f} MB", end="")
        print(f"{row['gpu_mb']:8.0f} MB on the GPU" if "gpu_mb" in row else "")


if __name__ == "__main__":
    main()
