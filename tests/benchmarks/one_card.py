"""A training step on long traces: its memory and speed, beside plain PEFT + Trainer, trl and what the plan says.

    python tests/benchmarks/one_card.py --shape 8b --cap-gb 24              # 4k to 64k tokens on a GPU
    python tests/benchmarks/one_card.py --shape 14b --cap-gb 24 --peers plain,trl,unsloth --longest
    python tests/benchmarks/one_card.py --device cpu --shape small --lengths 512,1024 --variants --loss-chunk 256
    python tests/benchmarks/one_card.py --traffic --lengths 8192       # counted without a device: see traffic.py

The student has the true shapes and random weights, which are quantized to NF4 a layer at a time, on the device. Each
measurement is a fresh process that takes two optimizer steps on one trace, all of it trained. Measured is the second,
in which Adam has its state: `tokens_per_second` of its forward and backward pass, and the `cpu_seconds` of it, which
other work on the machine hardly changes; `peak_bytes`, the most that was held
from its beginning to the end, on a GPU by torch's tensors (`reserved_bytes` is with what its allocator kept,
`card_bytes` with CUDA itself), on a CPU resident; `step_bytes`, how much more that is than just before. `plan_bytes`
and `plan_step_bytes` are what the plan says of the same, and `plan_card_bytes` what it compares with the card.
--cap-gb (GiB) is all that a process may take, CUDA's own part as the plan counts it included.

A round is a run of `--round-steps` steps for each of two teachers, their merge and its fold, on disk, but without
questions to answer; `overhead` is the share of its time that is neither a step's forward nor its backward pass.

plain: prepare_model_for_kbit_training as in PEFT's guide to QLoRA (embeddings, head and norms in fp32), get_peft_model,
transformers' Trainer with activation checkpointing, in bf16, or in fp16 where the GPU has no bf16. plain_lean: the same
without prepare_model_for_kbit_training. trl: SFTTrainer and what it has by default, except max_length, and except bf16
on a CPU. unsloth: its own checkpointing, and SFTTrainer; where it is installed, from a checkpoint on disk.
"""

import argparse
import contextlib
import ctypes
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# torch and the like are imported in the steps: a child's resident memory starts small

Row = dict[str, Any]
PYTHON = shlex.split(os.environ.get("BENCH_PYTHON", "")) or [sys.executable]  # what runs the steps
WIDE = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 131072}


def shape(hidden: int, layers: int, heads: int, inner: int, tied: bool, **other: int) -> Row:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**WIDE, **sizes, "intermediate_size": inner, "tie_word_embeddings": tied, **other}


SHAPES = {
    "0.6b": shape(1024, 28, 16, 3072, True),
    "4b": shape(2560, 36, 32, 9728, True),
    "8b": shape(4096, 36, 32, 12288, False),
    "14b": shape(5120, 40, 40, 17408, False),
    "small": shape(256, 8, 4, 768, True, num_key_value_heads=2, head_dim=64),
    "tiny": shape(64, 2, 2, 128, True, num_key_value_heads=1, head_dim=32, vocab_size=4096),
}
STEPS, MEASURED = 2, 1
WORDS = 900  # ids that the tokenizer has which the package carries; of the student's vocabulary the logits are whole
BASE, TEACHERS, TRACES, PROMPT = Path("base"), ("a", "b"), 16, 16
OUT_OF_MEMORY = "out of memory"
GOALS = {("8b", 24.0): 65536, ("14b", 24.0): 32768}  # tokens, by shape and cap


# --- the student and its trace: what follows runs in a process of its own -------------------------------------


def device(asked: Row) -> Any:
    import torch

    return torch.device("cuda", 0) if asked["device"] == "cuda" else torch.device("cpu")


def dtype(asked: Row) -> Any:
    """What a student computes in there."""
    from mot_lora.training.student import dtype_of

    return dtype_of(device(asked))


def architecture(asked: Row) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**SHAPES[asked["shape"]], architectures=["Qwen3ForCausalLM"], dtype="bfloat16")


def student(asked: Row) -> Any:
    """What `base.load_model` makes of a checkpoint, from random numbers; never more than one layer unquantized."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert

    at, kind = device(asked), dtype(asked)
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=kind,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(asked), dtype=kind)
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), how)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, old in [*module.named_parameters(recurse=False)]:
                if name == "weight" and old.ndim == 1:
                    value = torch.ones(old.shape, dtype=kind, device=at)
                else:
                    value = torch.randn(old.shape, dtype=kind, device=at) * 0.02
                if isinstance(module, Linear4bit):
                    kept = {"compress_statistics": True, "quant_type": "nf4", "module": module}
                    module.weight = Params4bit(value, requires_grad=False, **kept).to(at)
                    module.support_avx512bf16_for_cpu = False
                else:
                    setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(at)  # its buffers are no parameters
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type != at.type]
    assert not left, f"{left} have no values"
    model.is_loaded_in_4bit = model.is_quantized = True
    model.hf_quantizer = AutoHfQuantizer.from_config(how, pre_quantized=False)
    model.config.use_cache = True
    return model


def trace(tokens: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(WORDS, (tokens,), generator=generator).tolist()


def tokenizer() -> Any:
    from mot_lora.data.tokenizer import load_tokenizer
    from mot_lora.reader import demo_path

    return load_tokenizer(demo_path("student"))


# --- measuring -------------------------------------------------------------------------------------------------


class Meter:
    """Times each forward and backward pass, and measures memory from the second step on."""

    def __init__(self, asked: Row) -> None:
        import torch

        self.cuda = torch.cuda if asked["device"] == "cuda" else None
        if self.cuda:
            self.cuda.empty_cache()  # what making the student took
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.before = 0

    def on(self, trainer: type) -> type:
        """A Trainer whose steps are measured."""
        meter = self

        class Measured(trainer):
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                if len(meter.seconds) == MEASURED:
                    meter.begin()
                meter.wait()
                start, of_cpu = time.perf_counter(), time.process_time()
                loss = super().training_step(*args, **kwargs)
                meter.wait()
                meter.seconds.append(time.perf_counter() - start)
                meter.cpu_seconds.append(time.process_time() - of_cpu)
                return loss

        return Measured

    def wait(self) -> None:
        if self.cuda:
            self.cuda.synchronize()

    def begin(self) -> None:
        if self.cuda:
            self.wait()
            self.cuda.reset_peak_memory_stats()
            self.before = self.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed and is still resident
            Path("/proc/self/clear_refs").write_text("5")  # the most so far is what it is now
            self.before = resident("VmRSS")

    def row(self, tokens: int) -> Row:
        assert len(self.seconds) == STEPS, f"{len(self.seconds)} steps were taken, not {STEPS}"
        peak = self.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        row = {"seconds": self.seconds[MEASURED], "tokens_per_second": tokens / self.seconds[MEASURED]}
        row |= {"cpu_seconds": self.cpu_seconds[MEASURED]}
        row |= {"peak_bytes": peak, "before_bytes": self.before, "step_bytes": peak - self.before}
        if self.cuda:
            free, total = self.cuda.mem_get_info()
            outside = total - free - self.cuda.memory_reserved()  # of this process, where no other is on the card
            most = self.cuda.max_memory_reserved()
            row |= {
                "reserved_bytes": most,
                "card_bytes": most + outside,
                "retries": self.cuda.memory_stats()["num_alloc_retries"],
            }
        return row


def resident(key: str) -> int:
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(said[key].split()[0]) * 1024


def cap(asked: Row) -> None:
    """Let this process have no more than was asked."""
    import torch

    from mot_lora.planning.cards import CONTEXT

    if not asked["cap_gb"]:
        return
    most = int(asked["cap_gb"] * 2**30)
    if asked["device"] == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min((most - CONTEXT) / total, 1.0))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


# --- who trains ------------------------------------------------------------------------------------------------


def settings(asked: Row, tokens: int, chunked: bool = True, checkpointing: bool = True) -> Any:
    from mot_lora.config import BranchConfig

    return BranchConfig(
        steps=STEPS,
        batch_size=1,
        gradient_accumulation=1,
        warmup=0,
        max_length=tokens,
        loss_chunk=asked["loss_chunk"] if chunked else tokens,
        activation_checkpointing=checkpointing,
        liger=asked["liger"],
    )


def us(asked: Row, tokens: int, chunked: bool = True, checkpointing: bool = True) -> Row:
    """`branch.train`, and what the plan says of it."""
    import torch

    from mot_lora.config import LoraConfig
    from mot_lora.data.traces import Example
    from mot_lora.training import adapter, branch
    from mot_lora.training.attention import needs_repeating, repeat_shared_heads

    base = student(asked)
    if asked["device"] == "cuda" and needs_repeating(torch.cuda.get_device_capability()):
        repeat_shared_heads(base)  # as `base.load_model` does
    model, meter = adapter.add_adapter(base, LoraConfig()), Meter(asked)
    adapter.reset_adapter(model, 0)
    branch.BranchTrainer = meter.on(branch.BranchTrainer)
    ids = tuple(trace(tokens))
    branch.train(model, tokenizer(), [Example(ids, ids)], settings(asked, tokens, chunked, checkpointing), seed=0)
    return meter.row(tokens)


def plans(asked: Row, cells: list[tuple[str, int]]) -> Row:
    """What the plan says of our steps; in a process of its own, so that its memory is not measured."""
    return {"rows": [planned(asked, tokens, **WHO[who][1]) for who, tokens in cells]}


def planned(asked: Row, tokens: int, chunked: bool = True, checkpointing: bool = True) -> Row:
    from dataclasses import replace

    from mot_lora.config import Config
    from mot_lora.planning.cards import this_card
    from mot_lora.planning.need import Need, peak_of

    card = this_card(device(asked))
    if asked["cap_gb"]:
        card = replace(card, gib=asked["cap_gb"])
    branch = settings(asked, tokens, chunked, checkpointing)
    config = Config(student=asked["shape"], teachers=({"name": "a", "data": "a"},), branch=branch, rounds=1)
    need = Need(config, architecture(asked).to_json_string(use_diff=False), card)
    start = time.perf_counter()
    w, s = need.student.weights(), need.step(tokens)
    held = w.layers + w.others + 3 * w.adapter  # before a step, with Adam's state
    return {
        "plan_bytes": held + s.peak + w.adapter,
        "plan_step_bytes": s.peak + w.adapter,  # and gradients
        "plan_before_bytes": held,
        "plan_card_bytes": peak_of(need.parts(tokens)),
        "plan_fits": need.fits(tokens),
        "planned_in": time.perf_counter() - start,
        "offload": need.offload(tokens),
        "plan_flops": s.flops,
    }


def arguments(asked: Row) -> Row:
    """What every Trainer is told."""
    import torch

    return {
        "output_dir": "trained",
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": asked["device"] == "cpu",
        "bf16": dtype(asked) == torch.bfloat16,
        "fp16": dtype(asked) == torch.float16,
    }


def lora() -> Any:
    from peft import LoraConfig as PeftLoraConfig

    from mot_lora.config import LoraConfig

    ours = LoraConfig()
    said = {"lora_dropout": ours.dropout, "target_modules": ours.target_modules, "task_type": "CAUSAL_LM"}
    return PeftLoraConfig(r=ours.r, lora_alpha=ours.alpha, **said)


def plain(asked: Row, tokens: int, prepare: bool = True) -> Row:
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments

    model = student(asked)
    model = get_peft_model(prepare_model_for_kbit_training(model) if prepare else model, lora())
    ids, meter = trace(tokens), Meter(asked)

    def collate(rows: list[Row]) -> Row:
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    args = TrainingArguments(**arguments(asked), activation_checkpointing=True)
    rows = [{"input_ids": ids, "labels": ids}]
    meter.on(Trainer)(model=model, args=args, train_dataset=rows, data_collator=collate).train()
    return meter.row(tokens)


def trl(asked: Row, tokens: int) -> Row:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, ids = student(asked), trace(tokens)
    meter, rows = Meter(asked), Dataset.from_list([{"input_ids": ids, "labels": ids}])
    args = SFTConfig(**arguments(asked), max_length=tokens)
    own = {"processing_class": tokenizer(), "peft_config": lora()}
    meter.on(SFTTrainer)(model=model, args=args, train_dataset=rows, **own).train()
    return meter.row(tokens)


def unsloth(asked: Row, tokens: int) -> Row:
    FastLanguageModel = importlib.import_module("unsloth").FastLanguageModel  # first, as it changes the others
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, own = FastLanguageModel.from_pretrained(str(BASE), max_seq_length=tokens, load_in_4bit=True)
    said = lora()
    model = FastLanguageModel.get_peft_model(
        model,
        r=said.r,
        lora_alpha=said.lora_alpha,
        lora_dropout=said.lora_dropout,
        target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
        use_gradient_checkpointing="unsloth",
    )
    ids = trace(tokens)
    meter, rows = Meter(asked), Dataset.from_list([{"input_ids": ids, "labels": ids}])
    args = SFTConfig(**arguments(asked), max_length=tokens)
    meter.on(SFTTrainer)(model=model, args=args, train_dataset=rows, processing_class=own).train()
    return meter.row(tokens)


WHO: dict[str, tuple[Callable[..., Row], Row]] = {
    "us": (us, {}),
    "us, loss in one": (us, {"chunked": False}),
    "us, no checkpoints": (us, {"checkpointing": False}),
    "us, neither": (us, {"chunked": False, "checkpointing": False}),
    "plain": (plain, {}),
    "plain_lean": (plain, {"prepare": False}),
    "trl": (trl, {}),
    "unsloth": (unsloth, {}),
}


# --- a round ---------------------------------------------------------------------------------------------------


def build(asked: Row) -> Row:
    """A checkpoint of random weights in bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    from mot_lora.checkpoints.tensorfile import write_tensors

    config = architecture(asked)
    config.save_pretrained(BASE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}  # what is tied, once
    files: dict[str, list[str]] = {}
    for name in sorted(shapes):
        parts = name.split(".")
        files.setdefault(parts[2] if "layers" in parts else "rest", []).append(name)
    where: dict[str, str] = {}
    for part, names in files.items():
        file = f"model-{part}.safetensors"
        values = ((n, (torch.randn(shapes[n], device=device(asked)) * 0.02).bfloat16().cpu()) for n in names)
        write_tensors(BASE / file, {n: (torch.bfloat16, shapes[n]) for n in names}, values)
        where |= dict.fromkeys(names, file)
    (BASE / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    tokenizer().save_pretrained(BASE)
    return {}


def one_round(asked: Row) -> Row:
    """A run of one round, and where its time went."""
    from mot_lora import run
    from mot_lora.config import Config
    from mot_lora.records import EvaluationRecord
    from mot_lora.training import branch

    tokens, steps, meter, ready = asked["round_tokens"], asked["round_steps"], Meter(asked), 0.0
    branch.BranchTrainer = meter.on(branch.BranchTrainer)
    for i, name in enumerate(TEACHERS):
        ids = [trace(tokens + len(TEACHERS) * k + i)[:tokens] for k in range(TRACES)]
        rows = [{"input_ids": x, "labels": [-100] * PROMPT + x[PROMPT:]} for x in ids]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        student=str(BASE),
        teachers=tuple({"name": name, "data": f"{name}.jsonl"} for name in TEACHERS),
        rounds=1,
        branch=settings(asked, tokens).model_copy(update={"steps": steps}),
        eval={"holdout": 0.25},
        device=asked["device"],
        output="run",
    )

    def watch(stage: str, done: int, total: int, **_: Any) -> None:
        nonlocal ready
        if stage == "load the student" and done == total:
            ready = time.perf_counter()

    start = time.perf_counter()
    record = run(
        config, evaluate=lambda *_, **__: (EvaluationRecord(losses=dict.fromkeys(TEACHERS, 0.0)), []), progress=watch
    )
    end = time.perf_counter()
    whole, inside = end - ready, sum(meter.seconds)
    assert len(meter.seconds) == steps * len(TEACHERS)
    return {
        "teachers": len(TEACHERS),
        "steps": steps,
        "tokens": tokens,
        "load_seconds": ready - start,
        "round_seconds": whole,
        "forward_backward_seconds": inside,
        "training_seconds": sum(b.train.seconds for b in record.branches),
        "fold_seconds": record.rounds[0].fold_seconds,
        "overhead": 1 - inside / whole,
    }


def machine(asked: Row) -> Row:
    """What the steps ran on."""
    import torch

    gpu = asked["device"] == "cuda"
    name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    own = {"gpu_bytes": torch.cuda.get_device_properties(0).total_memory, "cuda": torch.version.cuda} if gpu else {}
    return {"device": name, "threads": torch.get_num_threads(), "dtype": str(dtype(asked)), **own}


# --- the driver ------------------------------------------------------------------------------------------------


def child(function: str, given: Row) -> None:
    """Run a step in this process; the last line that it prints is what it found."""
    from mot_lora.errors import is_out_of_memory

    try:
        if function in ("us", "plain", "trl", "unsloth"):
            cap(given["asked"])
        found = globals()[function](**given)
    except Exception as e:
        if not (is_out_of_memory(e) or isinstance(e, MemoryError) or (e.__cause__ and is_out_of_memory(e.__cause__))):
            raise
        found = {"failed": OUT_OF_MEMORY}
    print("\n" + json.dumps(found))


def run_step(function: Callable[..., Row], **given: Any) -> Row:
    """One step in a fresh process."""
    command = [*PYTHON, __file__, "--step", json.dumps([function.__name__, given])]
    # so that glibc gives back at once what is freed, and what is resident is what is held
    tidy = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    settings |= tidy if given["asked"]["device"] == "cpu" else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    if done.returncode == -9:
        return {"failed": f"{OUT_OF_MEMORY}: killed"}
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [""]
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]  # a message may have lines
        return {"failed": f"exit status {done.returncode}: {(named or lines)[-1][:300]}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(who: str, tokens: int, asked: Row, plan: Row) -> Row:
    """One row: who trains on how many tokens, what it took, and what the plan says."""
    function, given = WHO[who]
    row = {"who": who, "tokens": tokens, **run_step(function, asked=asked, tokens=tokens, **given)}
    row |= plan
    if plan and "failed" not in row:
        whole = asked["device"] == "cuda"  # on a CPU, what Python and its libraries hold is in the peak
        said, got = ("plan_bytes", "peak_bytes") if whole else ("plan_step_bytes", "step_bytes")
        row["plan_over_measured"] = row[said] / row[got] - 1
        row["tflops"] = row["plan_flops"] / row["seconds"] / 1e12
    print(told(row), file=sys.stderr, flush=True)
    return row


def plans_of(cells: list[tuple[str, int]], asked: Row) -> list[Row]:
    """What the plan says of each; nothing of what is not ours."""
    ours = [cell for cell in cells if WHO[cell[0]][0] is us]
    found = run_step(plans, asked=asked, cells=ours) if ours else {"rows": []}
    if "failed" in found:
        sys.exit(found["failed"])
    said = iter(found["rows"])
    return [next(said) if cell in ours else {} for cell in cells]


def told(row: Row) -> str:
    if "failed" in row:
        return f"{row['who']:20}{row['tokens']:7} tokens  {row['failed']}"
    plan = f"  plan {row['plan_over_measured']:+.1%}" if "plan_over_measured" in row else ""
    memory = f"{gib(row['peak_bytes'])} GiB, the step {gib(row['step_bytes'])}"
    return f"{row['who']:20}{row['tokens']:7} tokens  {memory}  {row['tokens_per_second']:.0f} tokens/s{plan}"


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def longest(who: str, rows: list[Row], asked: Row) -> Iterator[Row]:
    """Lengths between the longest that went and the next that did not, until they are within a sixteenth."""
    mine = [row for row in rows if row["who"] == who]
    low = max((row["tokens"] for row in mine if "failed" not in row), default=0)
    high = min((row["tokens"] for row in mine if row.get("failed", "").startswith(OUT_OF_MEMORY)), default=0)
    while high - low > max(high // 16, 64):
        middle = (low + high) // 2 // 64 * 64
        yield (row := measure(who, middle, asked, *plans_of([(who, middle)], asked)))
        low, high = (low, middle) if "failed" in row else (middle, high)


def targets(rows: list[Row], whole: Row | None, asked: Row) -> Iterator[Row]:
    """The issue's figures, as far as these rows have them."""

    def most(who: str) -> int:
        return max((r["tokens"] for r in rows if r["who"] == who and "failed" not in r), default=0)

    def speed(who: str, tokens: int) -> float:
        return next(
            (r["tokens_per_second"] for r in rows if (r["who"], r["tokens"]) == (who, tokens) and "failed" not in r),
            math.nan,
        )

    def target(what: str, wanted: str, got: float, met: bool) -> Row:
        known = not math.isnan(got)
        return {"what": what, "wanted": wanted, "got": got if known else None, "met": met if known else None}

    failed = any(r["who"] == "plain" and r.get("failed", "").startswith(OUT_OF_MEMORY) for r in rows)
    ratio = most("us") / most("plain") if most("plain") and failed else math.nan
    yield target("longest trace, us / plain", ">= 10", ratio, ratio >= 10)
    if wanted := GOALS.get((asked["shape"], asked["cap_gb"])):
        yield target(f"tokens of the longest trace, {asked['shape']}", f">= {wanted}", most("us"), most("us") >= wanted)
    ratio = speed("us", 8192) / speed("trl", 8192)
    yield target("tokens a second at 8k, us / trl", ">= 1", ratio, ratio >= 1)
    off = [r["plan_over_measured"] for r in rows if "plan_over_measured" in r]
    low, high = min(off, default=math.nan), max(off, default=math.nan)
    yield target("plan / measured - 1, the least", ">= -0.03", low, low >= -0.03)
    yield target("plan / measured - 1, the most", "<= 0.10", high, high <= 0.10)
    if whole and "failed" not in whole:
        yield target("share of a round outside the passes", "< 0.05", whole["overhead"], whole["overhead"] < 0.05)


def show(report: Row) -> None:
    """The table at the end."""
    rows, names = report["rows"], [*dict.fromkeys(row["who"] for row in report["rows"])]
    found = {(row["who"], row["tokens"]): row for row in rows}
    key = "peak_bytes" if report["asked"]["device"] == "cuda" else "step_bytes"
    print(f"\n{report['where']['device']}, {report['asked']['shape']}; {key} in GiB, tokens a second")
    print(f"{'tokens':>8}" + "".join(f"{name:>22}" for name in names) + f"{'plain / us':>12}{'plan':>8}")
    for tokens in sorted({row["tokens"] for row in rows}):
        line = f"{tokens:8}"
        for name in names:
            row = found.get((name, tokens), {"failed": ""})
            cell = row["failed"][:20] if "failed" in row else f"{gib(row[key])} {row['tokens_per_second']:7.0f}"
            line += f"{cell:>22}"
        ours, theirs = (found.get((who, tokens), {}) for who in ("us", "plain"))
        line += f"{theirs[key] / ours[key]:12.2f}" if key in ours and key in theirs else " " * 12
        print(line + (f"{ours['plan_over_measured']:+8.1%}" if "plan_over_measured" in ours else ""))
    if whole := report["round"]:
        if "failed" in whole:
            print(f"a round: {whole['failed']}")
        else:
            print(
                f"a round of {whole['teachers']} x {whole['steps']} steps of {whole['tokens']} tokens: "
                f"{whole['round_seconds']:.1f} s, of it the fold {whole['fold_seconds']:.2f} s; "
                f"{whole['overhead']:.1%} is neither forward nor backward"
            )
    for t in report["targets"]:
        said = {True: "met", False: "NOT MET", None: "not measured"}[t["met"]]
        print(f"{t['what']:45}{t['wanted']:>10}{'' if t['got'] is None else format(t['got'], '10.3g'):>12}  {said}")


def count(given: argparse.Namespace) -> None:
    """The traffic and launches of a step, by length and by who trains, as a table and as JSON."""
    import traffic

    rows, layers = {}, SHAPES[given.shape]["num_hidden_layers"]
    for tokens in (int(n) for n in given.lengths.split(",")):
        rows[tokens] = traffic.measure(architecture({"shape": given.shape}), tokens)
        print(f"{given.shape}, {layers} layers, {tokens} tokens: GB of elementwise work, and launches")
        print(f"{'':12}{'in all':>10}{'a layer':>10}{'launches':>10}{'a layer':>10}  the largest")
        for who, row in rows[tokens].items():
            sizes = f"{row['bytes'] / 1e9:10.0f}{row['layer_bytes'] / 1e9:10.2f}"
            launches = f"{sum(row['launches'].values()):10}{sum(row['layer_launches'].values()):10}"
            largest = [f"{name} {n / 1e9:.0f}" for name, n in row["bytes_by_operation"].items()][:6]
            print(f"{who:12}{sizes}{launches}  {', '.join(largest)}")
    said = {"command": command_line(), "versions": versions(), "architecture": SHAPES[given.shape], "tokens": rows}
    given.out.write_text(json.dumps(said, indent=1) + "\n")


def command_line() -> str:
    return shlex.join(["python", "tests/benchmarks/one_card.py", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Those of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "unsloth", "liger-kernel"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "mot-lora": version("mot-lora")}


def draw(report: Row, path: Path) -> None:
    """Peak memory against length, and the plan's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    whole = report["asked"]["device"] == "cuda"
    key, plan = ("peak_bytes", "plan_bytes") if whole else ("step_bytes", "plan_step_bytes")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, who in enumerate(dict.fromkeys(row["who"] for row in report["rows"])):
        mine = sorted((r for r in report["rows"] if r["who"] == who), key=lambda r: r["tokens"])
        for name, style, label in ((key, "o-", who), (plan, ":", None)):
            points = [(r["tokens"], r[name] / 2**30) for r in mine if name in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="GiB" if whole else "GiB that a step adds")
    axes.set_xticks(sorted({row["tokens"] for row in report["rows"]}))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_title("dotted, under the lines: the plan", fontsize="small", loc="right")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536", metavar="N[,N]", help="tokens")
    parser.add_argument("--cap-gb", type=float, metavar="GIB", help="memory that a process may take")
    parser.add_argument("--peers", default="plain,trl", metavar="WHO[,WHO]", help="of plain, plain_lean, trl, unsloth")
    parser.add_argument("--variants", action="store_true", help="also without the chunked loss, and checkpointing")
    parser.add_argument("--longest", action="store_true", help="search for the longest trace of each, to a sixteenth")
    parser.add_argument("--loss-chunk", type=int, default=1024, metavar="N", help="branch.loss_chunk")
    parser.add_argument("--liger", choices=("auto", "on", "off"), default="auto", help="branch.liger")
    parser.add_argument("--round-steps", type=int, default=50, metavar="N", help="of a teacher; 0: no round")
    parser.add_argument("--round-tokens", type=int, default=4096, metavar="N", help="of a trace")
    parser.add_argument("--out", type=Path, default=Path("one_card.json"), metavar="FILE", help="for the figures")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="peak memory against length, .svg or .png")
    parser.add_argument("--traffic", action="store_true", help="count what a step reads and writes, instead")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        child(*json.loads(given.step))
        return
    if given.traffic:
        count(given)
        return
    lengths, peers = [int(n) for n in given.lengths.split(",")], [p for p in given.peers.split(",") if p]
    if unknown := {*peers} - {"plain", "plain_lean", "trl", "unsloth"}:
        parser.error(f"no peer {', '.join(sorted(unknown))}")
    keys = ("device", "shape", "cap_gb", "loss_chunk", "liger", "round_steps", "round_tokens")
    asked = {key: getattr(given, key) for key in keys}
    target, picture, load = given.out.resolve(), given.picture and given.picture.resolve(), os.getloadavg()[0]
    names = [name for name in WHO if name == "us" or name in peers or (given.variants and name.startswith("us,"))]
    left_out = {}
    if "unsloth" in names and importlib.util.find_spec("unsloth") is None:
        names.remove("unsloth")
        left_out["unsloth"] = "not installed"
    with tempfile.TemporaryDirectory(prefix="bench-card-") as temporary, contextlib.chdir(temporary):
        where = run_step(machine, asked=asked)
        if "failed" in where:
            sys.exit(where["failed"])
        rows: list[Row] = []
        if "unsloth" in names or given.round_steps:
            built = run_step(build, asked=asked)
            if "failed" in built:
                sys.exit(built["failed"])
        cells = [(who, tokens) for tokens in lengths for who in names]
        for (who, tokens), plan in zip(cells, plans_of(cells, asked), strict=True):
            shorter = [r for r in rows if r["who"] == who and r.get("failed", "").startswith(OUT_OF_MEMORY)]
            if shorter:  # nor does a longer one
                failed = f"{OUT_OF_MEMORY} at {shorter[0]['tokens']}"
                rows.append({"who": who, "tokens": tokens, "failed": failed, **plan})
            else:
                rows.append(measure(who, tokens, asked, plan))
        if given.longest:
            for who in names:
                rows += [*longest(who, rows, asked)]
        whole = run_step(one_round, asked=asked) if given.round_steps else None
    report = {
        "command": command_line(),
        "where": {**where, "cores": os.cpu_count(), "load_before": load, "system": platform.platform()},
        "versions": versions(),
        "asked": asked,
        "architecture": SHAPES[given.shape],
        "left_out": left_out,
        "rows": rows,
        "round": whole,
        "targets": [*targets(rows, whole, asked)],
    }
    target.write_text(json.dumps(report, indent=1) + "\n")
    if picture:
        draw(report, picture)
    show(report)
    sys.exit(int(any("exit status" in row.get("failed", "") for row in [*rows, whole or {}])))


if __name__ == "__main__":
    main()
