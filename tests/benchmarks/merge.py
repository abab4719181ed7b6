"""Merge and fold beside cp, PEFT and mergekit: one run, one machine, one table.

    python tests/benchmarks/merge.py                    # Qwen3-0.6B's shape, random weights; about 15 GB of disk
    python tests/benchmarks/merge.py --quick            # the same on a toy, to try the script
    python tests/benchmarks/merge.py --only machine,cp,linear_checkpoint --keep /tmp/bench

Each measurement is a fresh process on two threads, its inputs in the page cache, nothing left to be written back.
`seconds` is the work from files to files, after the imports (of PEFT's svd only the call: not loading nor saving).
`peak_mb` is the most memory that the process had resident; this counts its imports (`import_mb`) and the pages of
files that it has mapped. `scratch_mb` is what it wrote to disk beyond its output. Shown are the least time and the
most memory of the repeats; the JSON keeps all.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# torch and the like are imported in the steps: a child's ru_maxrss starts at its parent's size, so this stays small

THREADS, RANK, ALPHA, DENSITY, FEW, MANY = 2, 16, 32, 0.5, 4, (4, 8, 16, 32)
FULL = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
FULL |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
QUICK = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
QUICK |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000}

# the driver and its steps all work in one folder, which has these
BASE, ADAPTERS = Path("base"), [Path(f"adapter{i:02}") for i in range(MANY[-1])]
MADE, OUT, SCRATCH, KEPT = Path("made"), Path("made/out"), Path("scratch"), Path("kept")
SHAPE = Path("shape.json")


def modules() -> dict[str, tuple[int, int]]:
    """Every linear layer, and its [out, in]."""
    s = json.loads(SHAPE.read_text())
    h, up = s["hidden_size"], s["intermediate_size"]
    q, kv = (s[f"num_{heads}_heads"] * s["head_dim"] for heads in ("attention", "key_value"))
    layer = {f"self_attn.{x}_proj": shape for x, shape in zip("qkvo", [(q, h), (kv, h), (kv, h), (h, q)], strict=True)}
    layer |= {"mlp.gate_proj": (up, h), "mlp.up_proj": (up, h), "mlp.down_proj": (h, up)}
    return {f"model.layers.{i}.{m}": shape for i in range(s["num_hidden_layers"]) for m, shape in layer.items()}


def sample() -> list[str]:
    """Six modules of the second layer, of all the shapes: those whose numbers are compared."""
    return [m for m in modules() if ".layers.1." in m and not m.endswith("v_proj")]


# --- steps: each runs in a process of its own ------------------------------------------------------------


def timed(work: Callable[[], Any]) -> dict[str, float]:
    before, start = peak_mb(), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - start, "import_mb": before}


def peak_mb() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in who) * 1024 / 1e6


def build() -> dict[str, float]:
    """A Qwen3 with random weights, and adapters with updates of 1 % of them, as PEFT writes them."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(**json.loads(SHAPE.read_text()), tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(BASE, max_shard_size="99GB")
    linear = sorted({m.rpartition(".")[2] for m in modules()})
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=linear, task_type="CAUSAL_LM", inference_mode=True)
    lora.base_model_name_or_path = str(BASE.resolve())
    size = (0.01 * 0.02 * RANK / ALPHA / RANK**0.5) ** 0.5  # entries of W are .02 in size, those of D 1 % of that
    for path in ADAPTERS:
        tensors = {}
        for module, (out, width) in modules().items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, width) * size
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, RANK) * size
        lora.save_pretrained(str(path))
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(model, str(path)))  # the last one
    assert loaded.keys() == tensors.keys(), "PEFT finds other modules in an adapter"
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors), "PEFT reads other values from an adapter"
    ratio = float(read_update(path, sample()[0]).norm() / read_weight(BASE, sample()[0]).double().norm())
    assert 0.008 < ratio < 0.012, f"updates are {ratio:.4f} of the weights"
    return {"update_of_weight": ratio}


def machine() -> dict[str, float]:
    """fp32 products [3072, k] x [k, 1024] in GFLOP/s, and a memory copy, read and written, in GB/s."""
    import torch

    def rate(work: Callable[[], Any], amount: float) -> float:
        least, end = math.inf, time.perf_counter() + 0.5
        while time.perf_counter() < end:
            start = time.perf_counter()
            work()
            least = min(least, time.perf_counter() - start)
        return amount / least / 1e9

    found = {}
    for k in (RANK, *(RANK * n for n in MANY)):
        b, a, into = torch.randn(3072, k), torch.randn(k, 1024), torch.empty(3072, 1024)
        found[f"gflops_{k}"] = rate(lambda b=b, a=a, into=into: torch.mm(b, a, out=into), 2 * 3072 * k * 1024)
    one, two = torch.ones(2**26), torch.zeros(2**26)
    return {**found, "memory_gb_s": rate(lambda: two.copy_(one), 2 * one.nbytes)}


def cp() -> dict[str, float]:
    OUT.mkdir()
    return timed(lambda: [shutil.copyfile(file, OUT / file.name) for file in BASE.iterdir()])


def peft_model(paths: list[Path]) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, str(paths[0]), adapter_name=paths[0].name)
    for path in paths[1:]:
        model.load_adapter(str(path), adapter_name=path.name)
    return model


def peft_svd(full: bool) -> dict[str, float]:
    model, names = peft_model(ADAPTERS[:FEW]), [path.name for path in ADAPTERS[:FEW]]
    settings = {"combination_type": "svd", "svd_rank": RANK, "svd_full_matrices": full}
    found = timed(lambda: model.add_weighted_adapter(names, [1 / FEW] * FEW, "mean", **settings))
    model.save_pretrained(OUT, selected_adapters=["mean"])
    return {"seconds": found["seconds"]}


def peft_fold_one() -> dict[str, float]:
    import peft  # noqa: F401 - imported here, so that it is not timed
    from transformers import AutoModelForCausalLM  # noqa: F401

    return timed(lambda: peft_model(ADAPTERS[:1]).merge_and_unload().save_pretrained(OUT))


def mergekit_ties() -> dict[str, float]:
    """As mergekit comes, but told to compute in fp32, and with neither a model card nor a tokenizer to write."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    base, each = BASE.resolve(), {"weight": 1.0, "density": DENSITY}
    models = [{"model": f"{base}+{path.resolve()}", "parameters": each} for path in ADAPTERS[:FEW]]
    config = {"merge_method": "ties", "base_model": str(base), "models": models, "parameters": {"normalize": True}}
    config |= {"dtype": "float32", "out_dtype": "bfloat16"}
    folders = {"lora_merge_cache": str(SCRATCH / "lora"), "transformers_cache": str(SCRATCH / "hub")}
    options = MergeOptions(**folders, copy_tokenizer=False, write_model_card=False, quiet=True)
    return timed(lambda: run_merge(MergeConfiguration.model_validate(config), str(OUT), options))


def our_fold(method: str, n: int) -> dict[str, float]:
    from mot_lora import fold_checkpoint, merge_adapters

    settings = {"density": DENSITY} if method == "ties" else {}
    return timed(lambda: fold_checkpoint(BASE, merge_adapters(ADAPTERS[:n], method=method, **settings), OUT))


def our_mean() -> dict[str, float]:
    from mot_lora import merge_adapters, save_adapter

    return timed(lambda: save_adapter(merge_adapters(ADAPTERS[:FEW]), OUT, rank=RANK))


# --- steps that compare what was kept, by plain fp64 arithmetic ----------------------------------------------


def read_update(folder: Path, module: str) -> Any:
    """alpha/r * B @ A in fp64."""
    from safetensors import safe_open

    file = next(folder.rglob("adapter_config.json"))  # PEFT writes a named adapter into a folder of that name
    config = json.loads(file.read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}, f"{file} has more than one rank"
    with safe_open(file.with_name("adapter_model.safetensors"), "pt") as f:
        a, b = (f.get_tensor(f"base_model.model.{module}.lora_{x}.weight").double() for x in "AB")
    return config["lora_alpha"] / config["r"] * (b @ a)


def read_weight(folder: Path, module: str) -> Any:
    from safetensors import safe_open

    (shard,) = folder.glob("*.safetensors")
    with safe_open(shard, "pt") as f:
        return f.get_tensor(f"{module}.weight")


def compare_mean() -> dict[str, dict[str, float]]:
    """The error |D_r - D| / |D| of each result over the sample, and of the best that there can be."""
    import torch

    size, missed = 0.0, {"the optimum": 0.0}
    for module in sample():
        mean = torch.stack([read_update(path, module) for path in ADAPTERS[:FEW]]).mean(0)
        size += float(mean.norm() ** 2)
        missed["the optimum"] += float(torch.linalg.svdvals(mean)[RANK:].norm() ** 2)
        for folder in KEPT.iterdir():
            missed[folder.name] = missed.get(folder.name, 0.0) + float((read_update(folder, module) - mean).norm() ** 2)
    errors = {who: math.sqrt(x / size) for who, x in missed.items()}
    return {who: {"error": x, "over_optimum": x / errors["the optimum"] - 1} for who, x in errors.items()}


def compare_ties() -> dict[str, dict[str, float]]:
    """Each two results, and exact TIES in fp64 rounded once: the bf16 entries that are the same over the sample, and
    the most steps of bf16 between two (steps are tiny near 0). And the error |W' - W - D| / |D| of each.
    """
    import torch

    def steps(x: Any) -> Any:
        """bf16 numbers counted in their order, so that neighbours differ by 1."""
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    size, distances, missed = 0.0, {}, {}
    for module in sample():
        base, updates = read_weight(BASE, module), [read_update(path, module) for path in ADAPTERS[:FEW]]
        dropped = base.numel() - max(1, int(DENSITY * base.numel()))
        kept = torch.stack([u.masked_fill(u.abs() <= u.abs().flatten().kthvalue(dropped).values, 0.0) for u in updates])
        agree = kept.sign() == torch.where(kept.sum(0) >= 0, 1.0, -1.0)
        update = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
        size += float(update.norm() ** 2)
        found = {folder.name: read_weight(folder, module) for folder in sorted(KEPT.iterdir(), reverse=True)}
        found["exact"] = (base + update).bfloat16()
        for i, (one, x) in enumerate(found.items()):
            missed[one] = missed.get(one, 0.0) + float((x.double() - base.double() - update).norm() ** 2)
            for two, y in [*found.items()][i + 1 :]:
                distances.setdefault(f"{one} - {two}", []).append((steps(x) - steps(y)).abs().flatten())
    joined = {pair: torch.cat(parts) for pair, parts in distances.items()}
    pairs = {pair: {"equal": float((d == 0).double().mean()), "most_ulps": int(d.max())} for pair, d in joined.items()}
    return pairs | {who: {"error": math.sqrt(x / size)} for who, x in missed.items()}


# --- the driver --------------------------------------------------------------------------------------------

# job -> who does it -> the step and its arguments
FOLDS = {f"{method} {n}": (our_fold, {"method": method, "n": n}) for method in ("linear", "ties") for n in MANY}
SVD, MERGEKIT = "PEFT svd", "mergekit"
JOBS: dict[str, dict[str, tuple[Callable[..., dict[str, float]], dict[str, Any]]]] = {
    "machine": {"machine": (machine, {})},
    "cp": {"cp": (cp, {})},
    "mean_rank16": {
        "ours": (our_mean, {}),
        SVD: (peft_svd, {"full": True}),
        f"{SVD}, not full_matrices": (peft_svd, {"full": False}),
    },
    "ties_checkpoint": {"ours": FOLDS[f"ties {FEW}"], MERGEKIT: (mergekit_ties, {})},
    "linear_checkpoint": {"ours": FOLDS[f"linear {FEW}"], "PEFT, one adapter": (peft_fold_one, {})},
    "many": FOLDS,
}
COMPARE = {"mean_rank16": compare_mean, "ties_checkpoint": compare_ties}


def folder_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def run_step(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """One step in a fresh process. What it makes stays in OUT until the next."""
    for folder in (MADE, SCRATCH):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    settings = {**threads, "HF_HUB_OFFLINE": "1", "TMPDIR": str(SCRATCH.resolve()), "CUDA_VISIBLE_DEVICES": ""}
    inputs = [file for folder in (BASE, *ADAPTERS) for file in folder.glob("*")]
    subprocess.run(["cat", os.devnull, *inputs], stdout=subprocess.DEVNULL, check=True)  # into the page cache
    os.sync()
    command = [sys.executable, __file__, "--step", json.dumps([function.__name__, arguments])]
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        return {"failed": f"{function.__name__} {arguments}: exit status {done.returncode}: " + " / ".join(said)}
    found = {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": seconds}
    return {**found, "scratch_mb": max(found.pop("written_mb") - folder_mb(OUT), folder_mb(SCRATCH))}


def child(function: str, arguments: dict[str, Any]) -> None:
    """Run a step in this process; the last line that it prints is what it found."""
    found = globals()[function](**arguments)
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    print("\n" + json.dumps({**found, "peak_mb": peak_mb(), "written_mb": int(io["write_bytes"]) / 1e6}))


def run_job(job: str, repeat: int, peer_repeat: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir()
    for who, (function, arguments) in JOBS[job].items():
        times = peer_repeat if function in (peft_svd, mergekit_ties) else 1 if function is machine else repeat
        runs: list[dict[str, Any]] = []
        while len(runs) < times and "failed" not in (runs or [{}])[-1]:
            runs.append(run_step(function, arguments))
            shown = ", ".join(f"{k} {x if isinstance(x, str) else f'{x:.4g}'}" for k, x in runs[-1].items())
            print(f"{job}: {who}: {shown}", flush=True)
        least = {key: (min if key.endswith("seconds") else max)(run.get(key, 0) for run in runs) for key in runs[-1]}
        rows[who] = {**({"failed": runs[-1]["failed"]} if "failed" in runs[-1] else least), "runs": runs}
        if job in COMPARE and OUT.exists():
            OUT.rename(KEPT / who)
    if job in COMPARE:
        compared = run_step(COMPARE[job], {})
        print(f"{job}: compared: {compared}", flush=True)
        for who, found in ({"compared": compared} if "failed" in compared else compared).items():
            if isinstance(found, dict):
                rows.setdefault(who, {}).update(found)
    for folder in (KEPT, MADE):
        shutil.rmtree(folder)
    return rows


# --- what the machine allows, and what was wanted --------------------------------------------------------------


def floors(jobs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds that the machine needs for our rows: the SUM of files, products and passes.

    Files go at the speed of cp (bytes read and written), products at the GEMM rate of their inner size, entries at
    that of a memory copy, 8 bytes a pass: one for each product that has to be made, one to add it to W and round. A
    yardstick, not a law: who keeps a tile in the cache, or does two of these at once, can go below.
    """
    speed = {**jobs.get("machine", {}).get("machine", {}), **jobs.get("cp", {}).get("cp", {})}
    if "memory_gb_s" not in speed or "seconds" not in speed:
        return {}
    base, adapter = folder_mb(BASE), folder_mb(ADAPTERS[0])
    entries, edges = sum(a * b for a, b in modules().values()), sum(a + b for a, b in modules().values())

    def floor(moved_mb: float, flops: float, inner: int, passes: int) -> dict[str, float]:
        parts = {"files": moved_mb / (2 * base / speed["seconds"]), "products": flops / speed[f"gflops_{inner}"] / 1e9}
        parts["passes"] = 8 * entries * passes / speed["memory_gb_s"] / 1e9
        return {**parts, "sum": sum(parts.values())}

    k = RANK * FEW  # the rank-16 mean: Gram matrices of the stacked factors, and these times a small matrix
    found = {"mean_rank16: ours": floor((FEW + 1) * adapter, 2 * edges * k * (k + RANK), k, 0)}
    for n in MANY:
        moved, flops = 2 * base + n * adapter, 2 * entries * RANK * n
        found[f"many: ties {n}"] = floor(moved, flops, RANK, n + 1)
        found[f"many: linear {n}"] = floor(moved, flops, RANK * n, 2)
    return found | {f"{method}_checkpoint: ours": found[f"many: {method} {FEW}"] for method in ("ties", "linear")}


def targets(jobs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was wanted of the jobs that ran, and what was measured of it (NaN where something failed)."""

    def of(job: str, who: str, key: str = "seconds") -> float:
        return jobs.get(job, {}).get(who, {}).get(key, math.nan)

    def ratio(job: str, one: str, two: str, key: str = "seconds", other: str = "") -> float:
        below = of(other or job, two, key)
        return of(job, one, key) / below if below else math.nan

    mean, ties, linear = "mean_rank16", "ties_checkpoint", "linear_checkpoint"
    wanted = [
        (f"{mean}: times as fast as PEFT svd", ">=", 100, ratio(mean, SVD, "ours")),
        (f"{mean}: error over the optimum's", "<=", 1e-4, of(mean, "ours", "over_optimum")),
        (f"{ties}: times as fast as mergekit", ">=", 15, ratio(ties, MERGEKIT, "ours")),
        (f"{ties}: share of mergekit's peak memory", "<=", 0.1, ratio(ties, "ours", MERGEKIT, "peak_mb")),
        (f"{ties}: MB of scratch files", "<=", 1, of(ties, "ours", "scratch_mb")),
        (f"{linear}: times the time of cp", "<=", 4, ratio(linear, "ours", "cp", other="cp")),
        (f"{linear}: MB of peak memory", "<=", 1000, of(linear, "ours", "peak_mb")),
    ]
    few, lot = MANY[0], MANY[-1]
    for method in ("linear", "ties"):
        what, pair = f"many: {method}, {lot} adapters beside {few}", (f"{method} {lot}", f"{method} {few}")
        wanted.append((f"{what}, peak memory", "<=", 1.25, ratio("many", *pair, "peak_mb")))
        wanted.append((f"{what}, seconds an adapter", "<=", 1.25, ratio("many", *pair) * few / lot))
    for what, sign, limit, got in wanted:
        if what.split(":")[0] in jobs:
            met = None if math.isnan(got) else got >= limit if sign == ">=" else got <= limit
            yield {"what": what, "wanted": f"{sign} {limit:g}", "got": got, "met": met}


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)

    def table(title: str, columns: str, rows: list[list[str]]) -> None:
        made = Table(title=title, title_justify="left")
        for i, column in enumerate(columns.split("|")):
            made.add_column(column, justify="right" if i else "left")
        for row in rows:
            made.add_row(*row)
        if rows:
            console.print(made)

    rows, compared = [], []
    for name, row in ((f"{job}: {who}", row) for job, found in report["jobs"].items() for who, row in found.items()):
        if "failed" in row:
            rows.append([name, "FAILED"])
        elif "seconds" in row:
            keys = ("seconds", "process_seconds", "peak_mb", "import_mb", "scratch_mb")
            cells = [f"{row[k]:.{0 if k.endswith('mb') else 3}f}" if k in row else "" for k in keys]
            floor = report["floors"].get(name, {}).get("sum", math.nan)
            rows.append([name, *cells, "" if math.isnan(floor) else f"{row['seconds'] / floor:.2f}"])
        if compares := [key for key in ("error", "over_optimum", "equal", "most_ulps") if key in row]:
            compared.append([name, ", ".join(f"{key} {row[key]:.7g}" for key in compares)])
    size = "a toy, so that the figures mean nothing" if report["quick"] else "Qwen3-0.6B's shape"
    table(f"{size}; {THREADS} threads", "job|seconds|process|peak MB|imports MB|scratch MB|/ floor", rows)
    table("results compared, six modules", "results|", compared)
    said = {True: "met", False: "NOT MET", None: "not measured"}
    goals = [[t["what"], t["wanted"], f"{t['got']:.3g}", said[t["met"]]] for t in report["targets"]]
    table("targets", "what|wanted|got|", goals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("merge.json"), metavar="FILE", help="where the figures go")
    parser.add_argument("--quick", action="store_true", help="two small layers")
    parser.add_argument("--only", default=",".join(JOBS), metavar="JOB[,JOB]", help=f"of {', '.join(JOBS)}")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work here, and use its base and adapters again")
    parser.add_argument("--repeat", type=int, default=3, help="runs of ours, of cp and of PEFT's fold")
    parser.add_argument("--peer-repeat", type=int, default=1, help="runs of PEFT's svd and of mergekit")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        child(*json.loads(asked.step))
        return
    chosen, target, load = asked.only.split(","), asked.json.resolve(), os.getloadavg()[0]
    if unknown := set(chosen) - set(JOBS):
        parser.error(f"no job {', '.join(unknown)}: use some of {', '.join(JOBS)}")
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as temporary:
        space, shape = (asked.keep or Path(temporary)).resolve(), json.dumps(QUICK if asked.quick else FULL)
        space.mkdir(parents=True, exist_ok=True)
        os.chdir(space)
        if not SHAPE.exists() or SHAPE.read_text() != shape:
            SHAPE.write_text(shape)
            if "failed" in (built := run_step(build, {})):
                SHAPE.unlink()
                sys.exit(built["failed"])
        jobs = {job: run_job(job, asked.repeat, asked.peer_repeat) for job in JOBS if job in chosen}
        packages = {name: version(name) for name in ("torch", "transformers", "peft", "mergekit", "mot-lora")}
        report = {
            "quick": asked.quick,
            "where": {"threads": THREADS, "cores": os.cpu_count(), "load_before": load, "system": platform.platform()},
            "versions": {"python": platform.python_version(), **packages},
            "shape": json.loads(shape),
            "jobs": jobs,
            "floors": floors(jobs),
            "targets": [*targets(jobs)],
        }
    target.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    sys.exit(int('"failed"' in json.dumps(jobs)))


if __name__ == "__main__":
    main()
