"""Everything once on the GPU that is here, what one wants to know first at first; the results go to one file a card.

    make gpu                                             # writes tests/benchmarks/gpu_rtx_4090.json, to be committed
    python tests/benchmarks/gpu.py --only nf4,pytest     # some stages alone
    python tests/benchmarks/gpu.py --again               # also those that are done

The first minute has small checks: what the machine is, NF4 and int8 forward and backward, the attention kernels that
there are, a training step and a fold of each quantization, offloading, an answer. Then pytest -m gpu, the quickstart,
fold_memory.py, and one_card.py with the largest student that fits 24 GB (or the card, if it is smaller).

Each stage's result, its seconds and, where it failed, its error are written when it ends, so that the same command goes
on after an interruption: what succeeded with this code on this card is not done again. Exit status 1: a stage failed;
2: there is no GPU.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# torch and the like are imported in the checks, which run in processes of their own

Row = dict[str, Any]
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
PYTHON = shlex.split(os.environ.get("BENCH_PYTHON", "")) or [sys.executable]  # what runs the stages
FOUND = "found: "  # begins the line that says what a check found
MOST = 24  # GiB that one_card.py may take of a larger card
TOKENS = 512  # of a trace of the checks
MOVED = 2048  # of one whose layers' inputs are large enough to be moved to host memory


# --- the first minute: each check runs in a process that has one GPU -------------------------------------------


def machine() -> Row:
    """What the machine is."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True).stdout if shutil.which("nvidia-smi") else ""
    return {
        "card": properties.name,
        "gib": properties.total_memory / 2**30,
        "free_gib": torch.cuda.mem_get_info(0)[0] / 2**30,
        "capability": f"{properties.major}.{properties.minor}",
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "driver": driver.strip().partition("\n")[0],
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "host_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "liger-kernel", "unsloth"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def nf4() -> Row:
    """A product with NF4 weights and its gradient, beside those with the weights that the codes stand for."""
    from bitsandbytes.nn import Linear4bit

    kind = dtype()
    return _linear(Linear4bit(256, 512, bias=False, compute_dtype=kind, quant_type="nf4"), 0.02)


def int8() -> Row:
    """The same with int8 weights, as bitsandbytes multiplies: with rows of the input in int8 too."""
    from bitsandbytes.nn import Linear8bitLt

    return _linear(Linear8bitLt(256, 512, bias=False, has_fp16_weights=False), 0.05)


def _linear(layer: Any, most: float) -> Row:
    import torch

    from mot_lora.checkpoints.weights import read_weight

    torch.manual_seed(0)
    layer, kind = layer.cuda(), dtype()
    x = torch.randn(64, 256, device="cuda", dtype=kind, requires_grad=True)
    y = layer(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    weight = read_weight(layer)
    off = {
        "forward": _apart(y, x.float() @ weight.T),
        "backward": _apart(x.grad, gradient.float() @ weight),
    }
    assert max(off.values()) < most, f"it is off by {off}"
    return {"off_by": off, "dtype": str(kind)}


def _apart(got: Any, want: Any) -> float:
    """|got - want| / |want|."""
    return float((got.float() - want).norm() / want.norm())


def dtype() -> Any:
    """What a student computes in here."""
    import torch
    from one_card import dtype as of

    return of({"device": "cuda"}) if torch.cuda.is_available() else torch.float32


def attention() -> Row:
    """Which kernel causal attention without a mask takes, and how long each takes that there is, in milliseconds."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    heads, shared, tokens, width = 16, 8, 8 * TOKENS, 128
    kind, found = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16, {}
    q = torch.randn(1, heads, tokens, width, device="cuda", dtype=kind)
    few = torch.randn(1, shared, tokens, width, device="cuda", dtype=kind)
    for name, k in (("keys shared by heads", few), ("keys repeated", few.repeat_interleave(heads // shared, 1))):
        gqa = {"is_causal": True, "enable_gqa": k.shape[1] != heads}
        chosen = SDPBackend(torch._fused_sdp_choice(q, k, k, **gqa)).name
        found[name] = {"chosen": chosen.lower(), "milliseconds": {}}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                with sdpa_kernel(backend):
                    work = partial(scaled_dot_product_attention, q, k, k, **gqa)
                    found[name]["milliseconds"][backend.name.lower()] = _milliseconds(work)
            except RuntimeError:
                continue  # there is no such kernel for this card, dtype or shape
    return {"dtype": str(kind), "tokens": tokens, **found}


def _milliseconds(work: Callable[[], Any], times: int = 5) -> float:
    import torch

    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / times


def nf4_step() -> Row:
    """Two training steps of a tiny student in NF4, by the package's own training."""
    return _step("nf4")


def int8_step() -> Row:
    """The same in int8."""
    return _step("int8")


def plain_step() -> Row:
    """The same with weights that are not quantized."""
    return _step("none")


def liger_step() -> Row:
    """The same in NF4 with Liger's kernels, where they are installed."""
    if "liger-kernel" not in versions():
        return {"left_out": "liger-kernel is not installed"}
    return _step("nf4", liger=True)


def _step(quantization: str, **settings: Any) -> Row:
    import torch

    torch.cuda.reset_peak_memory_stats()
    record, _ = _trained(quantization, "cuda", **settings)
    peak = torch.cuda.max_memory_allocated()
    losses, known = record.losses, _on_a_cpu()
    falls = (losses[0] - losses[1]) / (known[0] - known[1])
    alike = abs(losses[0] - known[0]) < 0.01 and 0.5 < falls < 2
    assert alike, f"losses {losses}, on a CPU in fp32 {known}"
    return {"losses": losses, "losses_cpu": known, "seconds": record.seconds, "peak_bytes": peak}


@cache
def _on_a_cpu() -> tuple[float, ...]:
    """The losses that the same student has in fp32 there."""
    return _trained("none", "cpu")[0].losses


def _student(quantization: str, device: str) -> Any:
    """A tiny student with its adapter, as the loop has it."""
    import torch

    from mot_lora.checkpoints.checkpoint import Checkpoint
    from mot_lora.config import LoraConfig
    from mot_lora.training.adapter import add_adapter
    from mot_lora.training.student import load_model

    base = _checkpoint()
    at = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    return add_adapter(load_model(Checkpoint.open(base), quantization, at), LoraConfig(r=8))


def _checkpoint() -> Path:
    """Random weights in bf16, on disk."""
    import one_card

    one_card.SHAPES["here"] = one_card.shape(256, 2, 4, 512, True, num_key_value_heads=2, head_dim=64, vocab_size=1024)
    if not one_card.BASE.exists():
        one_card.build({"shape": "here", "device": "cpu"})
    return one_card.BASE


def _trained(quantization: str, device: str, tokens: int = 0, **settings: Any) -> tuple[Any, Any]:
    """What two steps took, and the adapter after them."""
    import torch
    from one_card import tokenizer, trace

    from mot_lora.config import BranchConfig
    from mot_lora.data.traces import Example
    from mot_lora.training import adapter, branch

    model = _student(quantization, device)
    adapter.reset_adapter(model, 0)
    ids = tuple(trace(tokens or TOKENS))
    said = {"steps": 2, "batch_size": 1, "gradient_accumulation": 1, "warmup": 0, "learning_rate": 0.1}
    asked = BranchConfig(**said, max_length=len(ids), **settings)
    record = branch.train(model, tokenizer(), [Example(ids, ids)], asked, seed=0)
    parts = [p.detach().float().cpu().flatten() for p in model.parameters() if p.requires_grad]
    return record, torch.cat(parts)


def nf4_fold() -> Row:
    """An update folded into NF4 weights."""
    return _fold("nf4")


def int8_fold() -> Row:
    """An update folded into int8 weights."""
    return _fold("int8")


def plain_fold() -> Row:
    """An update folded into weights that are not quantized."""
    return _fold("none")


def _fold(quantization: str) -> Row:
    import torch

    from mot_lora import Adapter, Factors, merge_adapters
    from mot_lora.checkpoints.checkpoint import Checkpoint
    from mot_lora.training.student import fold

    model, base, updates = _student(quantization, "cuda"), Checkpoint.open(_checkpoint()), {}
    for name in (n for n in base.files if "_proj" in n):
        weight = base.tensor(name).float()
        a, b = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
        updates[name.removesuffix(".weight")] = Factors(a, b * (0.01 * weight.norm() / (b @ a).norm()))
    kept = square = 0.0
    for module in fold(model, base, [merge_adapters([Adapter("update", updates)])]):
        kept += float((module.change * module.update).sum())
        square += float(module.update.square().sum())
    assert abs(kept / square - 1) < 0.1, f"{kept / square:.3f} of the update survived"
    return {"survived": kept / square}


def offload() -> Row:
    """Training with layers' inputs in host memory, beside training without, and that beside itself."""
    (_, first), (_, second) = (_trained("nf4", "cuda", MOVED, offload="off") for _ in range(2))
    _, moved = _trained("nf4", "cuda", MOVED, offload="on")
    noise, off = _apart(second, first), _apart(moved, first)
    assert off <= 10 * noise, f"the adapter is off by {off:.2g}, where two runs alike differ by {noise:.2g}"
    return {"off_by": off, "two_alike_differ_by": noise}


def answer() -> Row:
    """An answer of a few tokens, with NF4 weights and an adapter."""
    import torch

    model, ids = _student("nf4", "cuda"), torch.arange(8, device="cuda")[None]
    with torch.no_grad(), torch.autocast("cuda", dtype()):
        start = time.perf_counter()
        said = model.generate(input_ids=ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
    assert said.shape == (1, 24)
    return {"milliseconds_a_token": 1e3 * (time.perf_counter() - start) / 16}


CHECKS = (
    machine,
    nf4,
    nf4_step,
    attention,
    int8,
    int8_step,
    plain_step,
    nf4_fold,
    int8_fold,
    plain_fold,
    offload,
    liger_step,
    answer,
)


def check(names: list[str]) -> None:
    """Do these checks one after the other, and say what each found on a line of its own."""
    import warnings

    warnings.simplefilter("ignore")
    sys.path.insert(0, str(HERE))
    for function in (f for f in CHECKS if f.__name__ in names):
        start = time.monotonic()
        try:
            row = {"ok": True, "result": function()}
        except Exception as e:
            row = {"ok": False, "error": f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"}
        row["seconds"] = time.monotonic() - start
        print(f"\n{FOUND}{json.dumps({'name': function.__name__, **row})}", flush=True)


def checks(names: list[str], tiny: bool) -> Iterator[tuple[str, Row]]:
    """The checks, in as few processes as can be: bitsandbytes ends one on a CUDA error that it sees."""
    left = list(names)
    while left:
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder, tempfile.TemporaryFile("w+") as errors:
            command = [*PYTHON, __file__, "--check", ",".join(left), *(["--tiny"] if tiny else [])]
            begun = time.monotonic()
            with subprocess.Popen(
                command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process:
                assert process.stdout
                for line in process.stdout:
                    if line.startswith(FOUND):
                        row = json.loads(line.removeprefix(FOUND))
                        left.remove(name := row.pop("name"))
                        begun = time.monotonic()
                        yield name, row
            if left:
                errors.seek(0)
                why = f"its process ended with status {process.returncode}: {last_error(errors.read())}"
                yield left.pop(0), {"ok": False, "error": why, "seconds": time.monotonic() - begun}


# --- what takes longer -----------------------------------------------------------------------------------------


def pytest(work: Path, _: Row, tiny: bool) -> Row:
    """The tests that are marked gpu."""
    found = work / "pytest.xml"
    where = [str(HERE.parent / "cuda" / "test_device.py")] if tiny else []
    command = [*PYTHON, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--junitxml", str(found), *where]
    done = run(command)
    if done.returncode not in (0, 1, 5) or not found.exists():
        raise RuntimeError(last_error(done.stderr or done.stdout))
    cases = [*ElementTree.parse(found).getroot().iter("testcase")]
    bad = {
        f"{case.get('classname')}.{case.get('name')}": " ".join((part.get("message") or "").split())[:500]
        for case in cases
        for part in case
        if part.tag in ("failure", "error")
    }
    skipped = sum(part.tag == "skipped" for case in cases for part in case)
    return {"passed": len(cases) - len(bad) - skipped, "skipped": skipped, "failed": bad}


def quickstart(work: Path, _: Row, tiny: bool) -> Row:
    """The recipe that everybody runs first, from end to end."""
    small = ["rounds=1", "branch.steps=2", "eval.limit=2", "eval.max_new_tokens=4", "eval.branches=false"]
    command = [*PYTHON, "-m", "mot_lora.cli", "run", "recipes/quickstart.yaml", "device=cuda"]
    done = run([*command, f"output={work / 'quickstart'}", *(small if tiny else []), "--json"])
    if done.returncode:
        raise RuntimeError(last_error(done.stderr))
    said = json.loads(done.stdout)
    rounds = [
        {
            "accuracy": r["evaluation"]["accuracy"],
            "interval": r["evaluation"]["interval"],
            "losses": r["evaluation"]["losses"],
            "survived": r["fold"]["survived"],
            "fold_seconds": r["fold_seconds"],
            "evaluation_seconds": r["evaluation"]["seconds"],
        }
        for r in said["rounds"]
    ]
    took = [branch["train"] for branch in said["branches"]]
    return {
        "before": {key: said["before"][key] for key in ("accuracy", "interval", "losses", "questions", "seconds")},
        "rounds": rounds,
        "best": said["best"],
        "training_seconds": sum(t["seconds"] for t in took),
        "tokens_per_second": sum(t["tokens"] for t in took) / sum(t["seconds"] for t in took),
    }


def fold_memory(work: Path, _: Row, tiny: bool) -> Row:
    """A fold's time beside reading, and its memory."""
    names = ("layers", "hidden", "heads", "kv-heads", "head-dim", "intermediate", "vocab", "shards", "repeat")
    small = [f"--{name}={size}" for name, size in zip(names, (1, 64, 2, 1, 32, 128, 512, 1, 1), strict=True)]
    return script("fold_memory.py", "--json", work / "fold_memory.json", small if tiny else [])


def one_card(work: Path, card: Row, tiny: bool) -> Row:
    """Long traces with the largest student that fits, beside plain PEFT and trl, and what the plan says of them."""
    gib = min(card["gib"], MOST)
    shape = "8b" if gib > 20 else "4b" if gib > 11 else "0.6b"
    settings = ["--shape", shape, "--round-steps", "10", *(["--cap-gb", str(MOST)] if card["gib"] > MOST else [])]
    small = ["--shape", "tiny", "--lengths", "256", "--peers", "", "--round-steps", "0", "--cap-gb", "4"]
    found = script("one_card.py", "--out", work / "one_card.json", small if tiny else settings)
    if failed := [
        f"{r['who']}, {r['tokens']} tokens: {r['failed']}" for r in found["rows"] if "exit" in r.get("failed", "")
    ]:
        found["failed"] = failed
    return found


def script(name: str, option: str, out: Path, settings: list[str]) -> Row:
    """What another script of this folder writes; its processes are started as this one's."""
    out.unlink(missing_ok=True)
    done = run([sys.executable, f"tests/benchmarks/{name}", option, str(out.relative_to(ROOT)), *settings])
    if not out.exists():
        raise RuntimeError(last_error(done.stderr or done.stdout))
    return json.loads(out.read_text())


STAGES = (pytest, quickstart, fold_memory, one_card)


def stage(function: Callable[[Path, Row, bool], Row], work: Path, card: Row, tiny: bool) -> Row:
    """One of the stages: what it found, or why it failed."""
    start = time.monotonic()
    try:
        result = function(work, card, tiny)
        row: Row = {"ok": not result.get("failed"), "result": result}
        if not row["ok"]:
            row["error"] = f"failed: {', '.join(result['failed'])}"
    except Exception as e:
        row = {"ok": False, "error": f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"}
    return {**row, "seconds": time.monotonic() - start}


# --- the driver ------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


def last_error(said: str) -> str:
    """The line of a traceback, or of a mistake, that says what went wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"([\w.]*(Error|Exception|Interrupt)|error)\b", line)]
    return (named or lines or ["it said nothing"])[-1][:500]


def card_here() -> Row:
    """The card's name and memory. Ends with one line where there is none."""
    done = subprocess.run([*PYTHON, __file__, "--card"], env=environment(), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        print(f"error: {last_error(done.stderr)}", file=sys.stderr)
        sys.exit(2)
    return json.loads(lines[-1])


def say_card() -> None:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda and f"for CUDA {torch.version.cuda}; does nvidia-smi show one?"
        sys.exit(f"torch finds no CUDA GPU here; torch {torch.__version__} is built {built or 'without CUDA'}")
    found = torch.cuda.get_device_properties(0)
    print(json.dumps({"name": found.name, "gib": found.total_memory / 2**30}))


def code() -> str:
    """The commit, and what differs from it, by which a stage is known to be done."""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=False).stdout

    changes = git("diff", "HEAD", "--", ".", ":!tests/benchmarks/*.json", ":!README.md")
    head = git("rev-parse", "--short=10", "HEAD").decode().strip() or "unknown"
    return head + (f"+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")


def file_of(card: str) -> str:
    """`gpu_rtx_4090.json` of `NVIDIA GeForce RTX 4090`."""
    return f"gpu_{'_'.join(re.findall('[a-z0-9]+', re.sub('nvidia|geforce', '', card.lower())))}.json"


def told(name: str, row: Row) -> str:
    return f"{name:12}{'ok' if row['ok'] else 'FAILED':8}{row['seconds']:8.1f} s  {row.get('error', '')}".rstrip()


def main() -> int:
    names = [f.__name__ for f in (*CHECKS, *STAGES)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--only", default="", metavar="STAGE[,STAGE]", help=f"of {', '.join(names)}")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the file goes")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that it runs, and nothing else")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--card", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.check:
        globals()["TOKENS"] //= 8 if asked.tiny else 1
        check(asked.check.split(","))
        return 0
    if asked.card:
        say_card()
        return 0
    wanted = [n for n in asked.only.split(",") if n] or names
    if unknown := {*wanted} - {*names}:
        parser.error(f"no stage {', '.join(sorted(unknown))}")
    card, commit = card_here(), code() + ("+tiny" if asked.tiny else "")
    target = asked.folder.resolve() / file_of(card["name"])
    report: Row = json.loads(target.read_text()) if target.exists() else {"stages": {}}
    report |= {"command": shlex.join(["python", "tests/benchmarks/gpu.py", *sys.argv[1:]]), "card": card}
    stages = report["stages"]
    done = {name for name, row in stages.items() if row["ok"] and row["commit"] == commit and not asked.again}
    work = ROOT / "runs" / f"{target.stem}-{commit}"
    if asked.again and "quickstart" in wanted:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)

    def save(name: str, row: Row) -> None:
        stages[name] = {"commit": commit, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **row}
        report["stages"] = {n: stages[n] for n in names if n in stages}
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(target)
        print(told(name, row), flush=True)

    print(f"{card['name']}, {card['gib']:.1f} GiB, {commit}: {target}", flush=True)
    for name in (n for n in wanted if n in done):
        print(f"{name:12}done", flush=True)
    left = [f.__name__ for f in CHECKS if f.__name__ in wanted and f.__name__ not in done]
    for name, row in checks(left, asked.tiny):
        save(name, row)
    for function in STAGES:
        if function.__name__ in wanted and function.__name__ not in done:
            save(function.__name__, stage(function, work, card, asked.tiny))
    return int(not all(stages[name]["ok"] for name in wanted))


if __name__ == "__main__":
    sys.exit(main())
