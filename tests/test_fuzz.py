"""Mutated inputs, thousands a reader: whatever a file holds, only a UserError of one line comes out, soon, in little
memory. Seeded, so that a failure comes back; the slow forms take more seeds.
"""

import copy
import gzip
import json
import math
import random
import re
import resource
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from conftest import peft_adapter
from pyarrow import parquet

from mot_lora.adapters.load import load_adapter
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.data.rows import read_rows
from mot_lora.data.traces import read_question, read_trace
from mot_lora.durable import hashes, write_record
from mot_lora.errors import UserError
from mot_lora.reader import load_config
from mot_lora.records import BranchRecord, EvaluationRecord, FoldRecord, RoundRecord, TrainRecord
from mot_lora.runs.ledger import read_run
from mot_lora.runs.rundir import RunDir

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        1.5,
        -0.0,
        1e308,
        math.nan,
        math.inf,
        2**31,
        2**63,
        2**64,
        10**400,
        -(10**400),
    ),
    *(
        "",
        " ",
        "a",
        "\0",
        "\ud800",
        "a\nb",
        "\u2028",
        "(",
        "a)(b",
        "a{99999999999}",
        "~nobody-here/x",
        "..",
        "/",
        "1e999",
    ),
    *(
        "x" * 300,
        "x" * 70_000,
        "<think>",
        "</think>",
        "user",
        "assistant",
        [],
        {},
        [[]],
        [None],
        ["a"],
        [1],
        [1, 1],
        {"a": 1},
    ),
    *(
        {"a": None},
        {"": ""},
        {"a\nb": "c"},
        {"\ud800": "\ud800"},
        [{"role": "user"}],
        [{"role": [], "content": {}}],
        DEEP,
    ),
]
BYTES = [b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\r", b"\n", b'"', b"'", b",", b"\\", b"[", b"}"]
BYTES += [
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"[" * 2000,
    b"\\ud800",
    b": ",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!int ",
    b"- ",
    b"|\n",
]
BYTES += [b"2026-13-45", b"0x_", b"\t", b"\xef\xbb\xbf", b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**40)]
MEMORY = 2 * 2**30  # bytes of addresses beyond what the process had
SECONDS = 10.0  # for one input: what is quadratic, or waits for a network, takes longer


@contextmanager
def little_memory() -> Iterator[None]:
    """A length that was mutated must not be believed: more than this cannot be had."""
    have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (have + MEMORY, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def tried(label: str, seen: Counter[str], read: Callable[..., object], *asked: object) -> None:
    """Read once: the only error there is is a UserError, of one line that says something."""
    began = time.monotonic()
    said = "read"
    try:
        read(*asked)
        seen["read"] += 1
    except UserError as e:
        said = str(e)
        seen["refused"] += 1
    except BaseException as e:
        raise AssertionError(f"{label}: {type(e).__name__}: {str(e)[:500]}") from e
    assert not re.search(r"[\r\n]", said), (label, said)
    assert time.monotonic() - began < SECONDS, label


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [p for k, v in list(items) for p in ((tree, k), *places(v))]


def mutated(tree: Any, r: random.Random) -> Any:
    """A tree with one to three of its parts replaced, removed, added to, wrapped, or taken from elsewhere in it."""
    tree = copy.deepcopy(tree)
    for _ in range(r.randint(1, 3)):
        here = places(tree)
        if not here:
            return copy.deepcopy(r.choice(ODD))
        node, key = r.choice(here)
        match r.randrange(7):
            case 0 | 1 | 2:
                node[key] = copy.deepcopy(r.choice(ODD))
            case 3:
                del node[key]
            case 4:
                node[key] = r.choice(([node[key]], {"a": node[key]}, str(node[key]), [node[key]] * 3))
            case 5:
                other, name = r.choice(here)
                with suppress(LookupError):  # it may be gone by now
                    node[key] = copy.deepcopy(other[name])
            case _ if isinstance(node, dict):
                name = r.choice(["", "a\nb", "answer", "messages", "input_ids", "columns", "\ud800", "Question "])
                node[name] = copy.deepcopy(r.choice(ODD))
            case _:
                node.insert(r.randint(0, len(node)), copy.deepcopy(r.choice(ODD)))
    return tree


def damaged(data: bytes, r: random.Random) -> bytes:
    """Bytes with one to four of them flipped, runs of them cut, doubled, zeroed or replaced."""
    out = bytearray(data)
    for _ in range(r.randint(1, 4)):
        i = r.randint(0, len(out))
        j = min(len(out), i + r.choice([1, 2, 8, 64, 1000]))
        match r.randrange(8):
            case 0 | 1 if i < len(out):
                out[i] ^= 1 << r.randrange(8)
            case 2 if i < len(out):
                out[i] = r.randrange(256)
            case 3:
                del out[i:]
            case 4:
                del out[i:j]
            case 5:
                out[i:i] = out[i:j]
            case 6:
                out[i:j] = bytes(j - i)
            case _:
                out[i : i + r.choice([0, 1, 8])] = r.choice(BYTES)
    return bytes(out)


def dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


few_and_many = pytest.mark.parametrize(
    ("seed", "times"), [(0, 1), *(pytest.param(s, 10, marks=pytest.mark.slow) for s in range(1, 3))]
)


# --- configs -------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "student": "Qwen/Qwen3-0.6B",
    "teachers": [
        {"name": "a", "data": "a.jsonl", "samples": 5, "seed": 1, "verified_only": True, "learning_rate": 1e-4},
        {
            "name": "b",
            "data": ["b.jsonl", "owner/name"],
            "split": "train",
            "columns": {"question": "problem", "gold": "x"},
        },
    ],
    "rounds": 3,
    "branch": {"steps": 20, "learning_rate": 2e-4, "schedule": "linear", "save_steps": 5, "report_to": ["wandb"]},
    "lora": {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"], "rslora": True},
    "quantization": "none",
    "merge": {"method": "ties", "density": {"mlp.*": 0.5, ".*": 0.3}, "weights": [1, {"q_proj": 2.5}], "scale": 0.9},
    "eval": {"data": "test.jsonl", "samples": 4, "temperature": 0.6, "overlap": 13, "limit": 3, "subset": "main"},
    "stop": {"metric": "accuracy", "patience": 2},
    "trust_remote_code": False,
    "seed": 7,
    "output": "out",
}


@few_and_many
def test_no_config_brings_anything_but_a_user_error(tmp_path: Path, seed: int, times: int) -> None:
    r, seen, file = random.Random(seed), Counter[str](), tmp_path / "c.yaml"
    plain = yaml.safe_dump(CONFIG).encode()
    with little_memory():
        for n in range(400 * times):
            data = damaged(plain, r) if n % 2 else dumped(mutated(CONFIG, r))  # JSON is YAML
            file.write_bytes(data)
            tried(f"seed {seed}, {n}: {data[:3000]!r}", seen, load_config, file)
    assert min(seen["read"], seen["refused"]) > 10 * times


@few_and_many
def test_no_override_brings_anything_but_a_user_error(tmp_path: Path, seed: int, times: int) -> None:
    r, seen, file = random.Random(seed), Counter[str](), tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"student": "s", "teachers": [{"name": "a", "data": "a.jsonl"}]}))
    keys = [
        "rounds",
        "branch.steps",
        "merge.density",
        "teachers",
        "teachers.0",
        "teachers.0.data",
        "teachers.0.columns.gold",
    ]
    keys += ["eval.data", "eval", "lora.r", "student", "a.b", "stop."]
    for n in range(500 * times):
        value = damaged(dumped(r.choice([*ODD, CONFIG["teachers"], CONFIG["eval"], 3])), r).decode(
            "utf-8", "surrogateescape"
        )
        key = r.choice(keys) if r.random() < 0.9 else damaged(r.choice(keys).encode(), r).decode("latin-1")
        tried(f"seed {seed}, {n}: {key}={value[:2000]!r}", seen, load_config, file, [f"{key}={value}"])
    assert min(seen["read"], seen["refused"]) > 10 * times


# --- data ----------------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
]
ROWS: list[dict[str, Any]] = [
    {"question": "1 + 1?", "reasoning": "one and one", "answer": "2"},
    {
        "problem": "1 + 2?",
        "thinking": "<think>so</think>",
        "solution": "It is 3. #### 3",
        "answer": 3,
        "system": "Be brief.",
    },
    {"messages": TALK, "answer": "4"},
    {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "<think>x</think>5"}]},
    {"prompt": TALK[:2], "completion": TALK[2:], "gold": 4.0},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "ho"},
        ]
    },
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
]
FLAT = [{"question": f"{i} + 1?", "reasoning": f'{i}, \n"so"', "answer": str(i + 1), "gold": i + 1.0} for i in range(9)]


def as_table(rows: list[dict[str, Any]], sep: str) -> bytes:
    def cell(x: Any) -> str:
        return '"' + str(x).replace('"', '""') + '"'

    lines = [[*rows[0]], *([cell(v) for v in row.values()] for row in rows)]
    return "".join(sep.join(line) + "\r\n" for line in lines).encode()


def as_parquet(rows: list[dict[str, Any]], path: Path, compression: str) -> bytes:
    parquet.write_table(pa.Table.from_pylist(rows), path, compression=compression)
    return path.read_bytes()


def read_all(file: Path, columns: dict[Any, str]) -> None:
    rows = read_rows(file)
    complaints: set[str] = set()
    for where, row in rows:
        for read in (read_trace, read_question):
            try:
                read(row, where, columns)
            except UserError as e:
                complaints.add(str(e))
    if complaints:
        assert not any(re.search(r"[\r\n]", c) for c in complaints), complaints
        raise UserError(complaints.pop())


@few_and_many
def test_no_data_file_brings_anything_but_a_user_error(tmp_path: Path, seed: int, times: int) -> None:
    r, seen = random.Random(seed), Counter[str]()
    lines = b"".join(dumped(row) + b"\n" for row in ROWS)
    whole = {
        ".jsonl": lines,
        ".json": dumped(ROWS),
        ".csv": as_table(FLAT, ","),
        ".tsv": as_table(FLAT, "\t"),
        ".jsonl.gz": gzip.compress(lines),
        ".csv.gz": gzip.compress(as_table(FLAT, ",")),
        ".parquet": as_parquet(FLAT, tmp_path / "flat.parquet", "none"),
        "2.parquet": as_parquet([ROWS[2]] * 5, tmp_path / "nested.parquet", "snappy"),
    }
    named: list[dict[Any, str]] = [
        {},
        {"question": "answer"},
        {"messages": "question"},
        {"reasoning": "gold", "gold": "answer"},
    ]
    with little_memory():
        for n in range(120 * times):
            for suffix, data in whole.items():
                file = tmp_path / f"x{suffix}"
                bad = damaged(data, r)
                file.write_bytes(
                    gzip.compress(damaged(gzip.decompress(data), r), 1) if suffix.endswith("gz") and n % 2 else bad
                )
                tried(f"seed {seed}, {n}: {suffix} {bad[:3000]!r}", seen, read_all, file, r.choice(named))
        for n in range(1200 * times):
            suffix = r.choice([".jsonl", ".json"])
            tree = mutated(ROWS, r)
            file = tmp_path / f"x{suffix}"
            file.write_bytes(
                b"\n".join(map(dumped, tree)) if suffix == ".jsonl" and isinstance(tree, list) else dumped(tree)
            )
            tried(f"seed {seed}, {n}: {tree!r:.3000}", seen, read_all, file, r.choice(named))
    assert min(seen["read"], seen["refused"]) > 10 * times


@few_and_many
def test_no_row_brings_anything_but_a_user_error(seed: int, times: int) -> None:
    # as datasets and parquet give them: also with bytes, dates and numbers of other kinds, which JSON has not
    import datetime
    import decimal

    import numpy as np

    r, seen = random.Random(seed), Counter[str]()
    ODD_TYPES = [
        b"bytes",
        datetime.date(2026, 1, 1),
        decimal.Decimal("1.5"),
        np.arange(3),
        np.float32(2),
        (1, 2),
        {1, 2},
    ]
    roles = ["messages", "question", "reasoning", "answer", "gold", "system", "input_ids", "labels"]
    for n in range(3000 * times):
        row = mutated(r.choice(ROWS), r)
        if not isinstance(row, dict):
            continue
        if r.random() < 0.2 and row:
            row[r.choice(list(row))] = r.choice(ODD_TYPES)
        columns: Any = {r.choice(roles): r.choice([*row, "answer"]) for _ in range(r.choice([0, 0, 1, 2]))}
        for read in (read_trace, read_question):
            tried(f"seed {seed}, {n}: {row!r:.3000} {columns}", seen, read, row, "row", columns)
    assert min(seen["read"], seen["refused"]) > 10 * times


# --- adapters ------------------------------------------------------------------------------------------


def split(file: bytes) -> tuple[Any, bytes]:
    """The header of a safetensors file, and the numbers."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def joined(header: Any, numbers: bytes) -> bytes:
    text = dumped(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + numbers


def damaged_tensors(file: bytes, r: random.Random) -> bytes:
    """A safetensors file with its bytes, its header's bytes, or what the header says changed."""
    if r.random() < 0.3:
        return damaged(file, r)
    header, numbers = split(file)
    if r.random() < 0.2:
        header = mutated(header, r)
        return joined(header, numbers)
    for _ in range(r.randint(1, 2)):
        name = r.choice([*header])
        entry = header[name]
        if name == "__metadata__" or "dtype" not in entry:
            header[name] = mutated(entry, r)
            continue
        match r.randrange(8):
            case 0:
                entry["dtype"] = r.choice(
                    ["F64", "F32", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "?"]
                )
            case 1:
                entry["shape"] = r.choice(
                    [[], [0], [1], [-1], [2**32, 2**32], [0, 2**64 - 1], [0, 2**63], entry["shape"][::-1]]
                )
            case 2:
                entry["shape"] = [math.prod(entry["shape"])]
            case 3:
                entry["data_offsets"] = [x + r.choice([-4, 4, 2**40, 2**63]) for x in entry["data_offsets"]]
            case 4:
                entry["data_offsets"][1] += r.choice([-4, 4, 2**33])
            case 5:  # of no size, and as wide as a number can say
                entry |= {
                    "shape": r.choice([[4, 0], [0, 4], [0, 2**62, 2]]),
                    "data_offsets": [entry["data_offsets"][0]] * 2,
                }
            case 6:
                header[r.choice([name + ".x", name.replace("lora_A", "lora_B"), "", "base_model.model.", "\0"])] = (
                    header.pop(name)
                )
            case _:
                i = r.randrange(max(1, len(numbers) - 4)) & ~3
                numbers = numbers[:i] + struct.pack("<f", r.choice([math.nan, math.inf, 1e38])) + numbers[i + 4 :]
    return joined(header, numbers)


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}},
    "bias": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
}


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Adapters of every kind that PEFT saved, with the base of each."""
    folder = tmp_path_factory.mktemp("adapters")
    which = {name: bases["moe" if name == "experts" else "qwen2" if name == "bias" else "untied"] for name in ADAPTERS}
    for name, asked in ADAPTERS.items():
        peft_adapter(which[name], folder / name, seed=1, **asked)
    return {name: (folder / name, base) for name, base in which.items()}


def read_adapter(folder: Path, base: Path | None) -> None:
    adapter = load_adapter(folder, base=base)
    sizes = {name: update.shape for name, update in adapter.meta_updates.items()}
    for name, update in adapter.updates.items():
        assert math.prod(sizes[name]) < 2**30
        assert update.delta().shape == sizes[name]


@few_and_many
@pytest.mark.parametrize("kind", ADAPTERS)
def test_no_adapter_brings_anything_but_a_user_error(
    tmp_path: Path, adapters: dict[str, tuple[Path, Path]], kind: str, seed: int, times: int
) -> None:
    r, seen = random.Random(f"{seed} {kind}"), Counter[str]()
    whole, base = adapters[kind]
    read_adapter(whole, base)
    config = json.loads((whole / "adapter_config.json").read_text())
    used = {
        "r",
        "lora_alpha",
        "use_rslora",
        "bias",
        "base_model_name_or_path",
        "peft_type",
        *ADAPTERS[kind],
        "rank_pattern",
    }
    used |= {
        "alpha_pattern",
        "modules_to_save",
        "target_parameters",
        "trainable_token_indices",
        "target_modules",
        "use_dora",
    }
    tensors = (whole / "adapter_model.safetensors").read_bytes()
    folder = tmp_path / "adapter"
    folder.mkdir()
    with little_memory():
        for n in range(60 * times):
            asked = config
            if n % 3 == 0:
                asked = {**config, **mutated({k: config.get(k) for k in sorted(used)}, r)}
            (folder / "adapter_config.json").write_bytes(damaged(dumped(config), r) if n % 12 == 1 else dumped(asked))
            (folder / "adapter_model.safetensors").write_bytes(tensors if n % 3 == 0 else damaged_tensors(tensors, r))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                changed = {k: v for k, v in asked.items() if config.get(k) != v}
                tried(
                    f"seed {seed} {kind}, {n}: {changed!r:.2000}", seen, read_adapter, folder, base if n % 4 else None
                )
    assert min(seen["read"], seen["refused"]) >= times


# --- checkpoints ---------------------------------------------------------------------------------------


@few_and_many
def test_no_checkpoint_brings_anything_but_a_user_error(tmp_path: Path, qwen3: Path, seed: int, times: int) -> None:
    r, seen = random.Random(seed), Counter[str]()
    folder = tmp_path / "model"
    folder.mkdir()
    shards = sorted(qwen3.glob("*.safetensors"))
    whole = {
        f.name: f.read_bytes() for f in (*shards[:3], qwen3 / "config.json", qwen3 / "model.safetensors.index.json")
    }
    index = json.loads(whole["model.safetensors.index.json"])
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v in whole}
    whole["model.safetensors.index.json"] = dumped(index)

    def read() -> None:
        checkpoint = Checkpoint.open(folder)
        assert all(checkpoint.tensor(name).numel() < 2**28 for name in checkpoint.files)
        checkpoint.fingerprint()

    with little_memory():
        for n in range(300 * times):
            for name, data in whole.items():
                (folder / name).write_bytes(data)
            name = r.choice([*whole])
            if name.endswith("safetensors"):
                bad = damaged_tensors(whole[name], r)
            else:
                bad = dumped(mutated(json.loads(whole[name]), r)) if n % 2 else damaged(whole[name], r)
            (folder / name).write_bytes(bad)
            tried(f"seed {seed}, {n}: {name} {bad[:3000]!r}", seen, read)
    assert min(seen["read"], seen["refused"]) > 10 * times


# --- runs ----------------------------------------------------------------------------------------------


def a_run(folder: Path) -> None:
    """A run of two teachers and one of two rounds, as it lies on disk."""
    run = RunDir(folder)
    evaluation = EvaluationRecord(questions=2, accuracy=0.5, interval=(0.1, 0.9), losses={"a": 0.2, "b": 0.3})
    fold = FoldRecord(
        relative_norm=0.1, survived=1.0, sign_conflict=0.2, cosine=((1, 0), (0, 1)), opposition=((0, 0), (0, 0))
    )
    write_record(folder / "before.json", evaluation)
    for teacher in ("a", "b"):
        run.branch(1, teacher).mkdir(parents=True)
        (run.branch(1, teacher) / "adapter_config.json").write_text("{}")
        record = BranchRecord(
            round=1,
            teacher=teacher,
            learning_rate=1e-4,
            train=TrainRecord(steps=2, tokens=3, loss=0.4, losses=(0.5, 0.4)),
            evaluation=evaluation,
            files=hashes(run.branch(1, teacher)),
        )
        write_record(run.branch(1, teacher) / "branch.json", record)
    record = RoundRecord(
        round=1,
        teachers=("a", "b"),
        method="linear",
        weights=(1.0, 1.0),
        seed=3,
        fold=fold,
        layers={"0": fold},
        modules={"q": fold},
        fold_seconds=0.1,
        evaluation=evaluation,
    )
    write_record(run.round(1) / "round.json", record)
    environment = {"format": 1, "versions": {"mot-lora": "0.1.0"}, "inputs": {}}
    (folder / "environment.json").write_text(json.dumps(environment))
    teachers = [{"name": "a", "data": "a.jsonl"}, {"name": "b", "data": "b.jsonl"}]
    (folder / "config.yaml").write_text(yaml.safe_dump({"student": "s", "teachers": teachers, "rounds": 2}))


def signed(tree: Any) -> bytes:
    """A record with a checksum that fits: what a newer program, or a hand, would have written."""
    import hashlib

    if not isinstance(tree, dict):
        return dumped(tree)
    tree = {k: v for k, v in tree.items() if k != "sha256"}
    return dumped({**tree, "sha256": hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()})


@few_and_many
def test_no_run_folder_brings_anything_but_a_user_error(tmp_path: Path, seed: int, times: int) -> None:
    r, seen = random.Random(seed), Counter[str]()
    a_run(tmp_path)
    run = RunDir(tmp_path)
    files = [p for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    whole = {p: p.read_bytes() for p in files}

    def read() -> None:
        try:
            run.check(run.config())
        finally:
            read_run(run)

    tried("as it was written", seen, read)
    assert seen == {"read": 1}
    with little_memory():
        for n in range(500 * times):
            path = r.choice(files)
            if n % 2 or path.name == "config.yaml":
                bad = damaged(whole[path], r)
            else:
                bad = signed(mutated(json.loads(whole[path]), r))
            path.write_bytes(bad)
            tried(f"seed {seed}, {n}: {path.relative_to(tmp_path)} {bad[:3000]!r}", seen, read)
            path.write_bytes(whole[path])
    assert min(seen["read"], seen["refused"]) > 10 * times
