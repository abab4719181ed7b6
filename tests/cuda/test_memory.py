"""A student's memory is free when the work is over, however it ended."""

import gc
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import falsecuda
import pytest
import torch
import yaml
from conftest import small_update
from false_gpu import false_gpu
from test_harness import tasks  # noqa: F401

from mot_lora import UserError, evaluate_run
from mot_lora.analysis.consensus import consensus
from mot_lora.analysis.experiment import borrow, compare
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import Config, LoraConfig
from mot_lora.reader import load_config
from mot_lora.reports.publish import write_page
from mot_lora.runs.distillation import run
from mot_lora.runs.rundir import RunDir
from mot_lora.training.adapter import add_adapter
from mot_lora.training.student import fold, load_model

MakeConfig = Callable[..., Config]
# bitsandbytes keeps four small tables for as long as the process lives
TABLES = 2048
SMALL = {"steps": 2, "batch_size": 2, "gradient_accumulation": 2, "max_length": 128, "offload": "on"}


def is_free() -> bool:
    return falsecuda.held() <= TABLES and falsecuda.pinned() == 0


@false_gpu()
@pytest.mark.parametrize("quantization", ["nf4", *(pytest.param(q, marks=pytest.mark.slow) for q in ("int8", "none"))])
def test_a_run_leaves_nothing_on_the_card(make_config: MakeConfig, tmp_path: Path, quantization: str) -> None:
    gc.disable()  # cycles are collected when they must be, not by luck
    made = {"device": "cuda", "quantization": quantization, "branch": SMALL}
    config = make_config(**made)
    run(config)
    assert falsecuda.peak() > 100 * TABLES
    assert is_free()
    consensus(config.output, traces=1)
    assert is_free()

    raised: list[BaseException] = []  # held, as a notebook holds the last one
    for place in ("before, answer", "round 1, a, train", "round 1, b, answer", "round 1, fold", "round 2, answer"):

        def stop(stage: str, done: int, total: int, *_: Any, place: str = place, **__: Any) -> None:
            if stage == place and done == total:
                assert not is_free()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as e:
            run(make_config(**made, output=str(tmp_path / "stopped")), progress=stop)
        raised.append(e.value)
        assert is_free()

    models: list[Any] = []  # also where somebody holds the student itself

    def keep(model: Any, *_: Any, **__: Any) -> Any:
        models.append(model)
        raise UserError("lost")

    with pytest.raises(UserError, match="lost"):
        run(make_config(**made, output=str(tmp_path / "kept")), evaluate=keep)
    assert models
    assert is_free()


@false_gpu()
def test_arms_of_a_comparison_have_the_card_to_themselves(make_config: MakeConfig, tmp_path: Path) -> None:
    gc.disable()
    begun: list[int] = []

    def watch(stage: str, done: int, *_: Any, **__: Any) -> None:
        if stage.endswith("load the student") and done == 0:
            begun.append(falsecuda.held())

    config = make_config(device="cuda", rounds=1, branch=SMALL)
    compare(config, [0], tmp_path / "compared", ["std", "linear"], ["steps"], progress=watch)
    assert len(begun) == 3
    assert all(held <= TABLES for held in begun)
    assert is_free()


@false_gpu()
def test_a_benchmark_has_one_student_on_the_card_at_a_time(make_config: MakeConfig, tasks: Path) -> None:  # noqa: F811
    config = make_config(device="cuda", rounds=1, branch=SMALL)
    run(config)
    gc.disable()
    held: dict[str, int] = {}

    def evaluate(progress: Any, **settings: Any) -> None:
        evaluate_run(
            config.output,
            ["choices"],
            round=1,
            base=True,
            include_path=tasks,
            limit=2,
            progress=progress,
            **settings,
        )

    def watch(stage: str, done: int, *_: Any, **__: Any) -> None:
        if done == 0:
            held[stage] = falsecuda.held()

    for quantized in (True, False):
        evaluate(watch, quantized=quantized)
        assert held["base, likelihood"] == held["student, likelihood"] > 50 * TABLES
        assert is_free()

    def stop(stage: str, *_: Any, **__: Any) -> None:
        if stage == "base, likelihood":
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="out of memory") as e:
        evaluate(stop)
    assert e.value.__cause__
    assert is_free()


# --- where it ends -------------------------------------------------------------------------------


@false_gpu()
def test_out_of_memory_is_one_line_in_whatever_form_it_comes_and_the_run_goes_on(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = {**SMALL, "offload": "off", "activation_checkpointing": False, "save_steps": 1, "steps": 3}
    config = make_config(device="cuda", rounds=1, branch=asked)

    def full(stage: str, *_: Any, **__: Any) -> None:
        if stage == "load the student":
            falsecuda.fail("CUDA out of memory. Tried to allocate 2.00 GiB", after=12)

    capfd.readouterr()
    with pytest.raises(
        UserError, match=r"^out of memory loading \S+ in nf4 \(.*CUDA out of memory\. .*\); stop other programs .*"
    ):
        run(config, progress=full)
    assert is_free()
    assert "REPORT" not in caplog.text + "".join(capfd.readouterr())

    ends = [
        (
            "round 1, a, train",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `f`",
            False,
            "round 1, teacher `a`: out of",
        ),
        ("round 1, fold", "CUDA error: out of memory", True, "out of memory"),
    ]
    for place, message, accelerator, begin in ends:
        failures = {place: lambda said=(message, accelerator): falsecuda.fail(*said)}

        def watch(stage: str, done: int, *_: Any, failures: dict[str, Any] = failures, **__: Any) -> None:
            if done == (2 if "train" in stage else 1):
                failures.pop(stage, bool)()

        with pytest.raises(UserError, match=message) as e:
            run(config, progress=watch)
        assert str(e.value).startswith(begin)
        assert "; " in str(e.value).partition(message)[2]  # what to do
        assert is_free()
        if place == "round 1, a, train":  # it is done to the letter, from the state that was saved after the first step
            file = Path(config.output) / "asked.yaml"
            file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
            overrides = re.findall(r"\S+=[^\s,]+", str(e.value).partition("resume with ")[2])
            config = load_config(file, overrides)
            assert config.branch.traces == 4
            less = (config.branch.batch_size, config.branch.activation_checkpointing, config.branch.loss_chunk)
            assert less == (1, True, 512)
            assert list(Path(config.output).glob("round-001/.a.training/checkpoint-1/sealed.json"))
    record = run(config)
    assert record.stopped == "all rounds are done"
    assert [b.train.steps for b in record.branches] == [3, 3]


@false_gpu()
def test_a_fold_that_finds_no_memory_names_the_module(qwen3: Path) -> None:
    checkpoint = Checkpoint.open(qwen3)
    model = add_adapter(load_model(checkpoint, "nf4", torch.device("cuda", 0)), LoraConfig(r=4))
    falsecuda.fail("CUDA out of memory. Tried to allocate 2.00 GiB", after=3)
    with pytest.raises(
        UserError,
        match=r"^out of memory folding model\.layers\.\d\.\S+ \(CUDA out .*; stop other programs that use cuda:0",
    ):
        list(fold(model, checkpoint, [small_update(qwen3, 0.01, 0)]))


# --- and where the device is another ---------------------------------------------------------------------


@false_gpu()
def test_a_run_does_not_go_on_on_another_device_unless_told_to(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"rounds": 2, "branch": SMALL | {"offload": "off"}}
    run(make_config(**{**short, "rounds": 1}, device="auto"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # after a reconnect
    said = r"started on cuda \(NVIDIA GeForce RTX 4090\), but here device `auto` is cpu; .* continue with device=cpu$"
    with pytest.raises(UserError, match=said):
        run(make_config(**short, device="auto"))
    record = run(make_config(**short, device="cpu"), finished=write_page)
    on = [r.device.text for r in record.rounds if r.device]
    assert on == ["NVIDIA GeForce RTX 4090 in bfloat16", f"{platform.processor() or 'cpu'} in float32"]
    assert [b.device and b.device.kind for b in record.branches] == ["cuda", "cuda", "cpu", "cpu"]
    assert ", then ".join(on) in (tmp_path / "run" / "report.html").read_text()

    # what was made on the GPU is not borrowed for an arm on the CPU
    other = make_config(**short, device="cpu", output=str(tmp_path / "other"))
    run(other, started=lambda _: borrow(other, [RunDir(tmp_path / "run")]))
    for name in ("a", "b"):
        made, taken = (RunDir(tmp_path / run).branch_record(1, name) for run in ("run", "other"))
        assert made
        assert taken
        assert taken.device
        assert (taken.device.kind, taken.files != made.files) == ("cpu", True)


@false_gpu(name="Tesla T4", gib=16, capability="7.5")
def test_a_benchmark_is_computed_in_fp16_where_there_is_no_bf16(
    make_config: MakeConfig,
    tasks: Path,  # noqa: F811
) -> None:
    config = make_config(device="cuda", rounds=1, branch=SMALL)
    run(config)
    record = evaluate_run(config.output, ["choices"], round=1, include_path=tasks, limit=2)
    assert [r.weights for r in record.results] == ["float16"]
