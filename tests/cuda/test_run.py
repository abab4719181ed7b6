"""Whole runs on a false GPU: what they give, what they hold, and that nobody reads what is still being copied."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import falsecuda
import pytest
import torch
from conftest import stored, true_updates
from false_gpu import false_gpu
from test_consensus import check_landscape
from test_distillation import same_run
from test_memory import is_free
from torch import Tensor
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from mot_lora import UserError
from mot_lora.analysis.consensus import consensus
from mot_lora.checkpoints.checkpoint import Checkpoint
from mot_lora.config import BranchConfig, Config, LoraConfig
from mot_lora.data.encoding import encode
from mot_lora.data.tokenizer import load_tokenizer
from mot_lora.data.traces import Trace
from mot_lora.reader import demo_path
from mot_lora.records import RunRecord
from mot_lora.runs.distillation import run
from mot_lora.runs.export import export
from mot_lora.runs.rundir import RunDir
from mot_lora.training import offload
from mot_lora.training.adapter import add_adapter, reset_adapter
from mot_lora.training.branch import train
from mot_lora.training.student import load_model

MakeConfig = Callable[..., Config]
T4 = {"name": "Tesla T4", "gib": 16, "capability": "7.5"}
SLOW = pytest.mark.slow
BRANCH: dict[str, Any] = {
    "steps": 2,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "learning_rate": 1e-2,
    "max_length": 128,
    "activation_checkpointing": True,
    "offload": "on",
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors move to host memory too, and lie over several slabs."""
    monkeypatch.setattr(offload, "WORTH", 1)
    monkeypatch.setattr(offload, "SLAB", 10_000)


def close(got: RunRecord, want: RunRecord, within: float) -> bool:
    """Whether two runs have the same losses, but for rounding."""

    def losses(record: RunRecord) -> list[float]:
        measured = [record.before, *(b.evaluation for b in record.branches), *(r.evaluation for r in record.rounds)]
        held_out = [loss for m in measured if m for _, loss in sorted(m.losses.items())]
        return held_out + [loss for b in record.branches for loss in b.train.losses]

    assert len(losses(want)) == 2 * 7 + 2 * 4
    return losses(got) == pytest.approx(losses(want), abs=within)


def run_on_both(make_config: MakeConfig, tmp_path: Path, quantization: str) -> Config:
    """A run of two rounds on this device and on the CPU; the former's config."""
    settings: dict[str, Any] = {"quantization": quantization, "branch": BRANCH}
    late, folder = falsecuda.late_copies(), tmp_path / quantization
    config = make_config(**settings, device="cuda", output=str(folder))
    record = run(config)
    assert falsecuda.reports() == ""
    assert falsecuda.late_copies() > late + 30
    assert falsecuda.pinned_peak() > 30_000
    assert json.loads((folder / "environment.json").read_text())["device"] == torch.cuda.get_device_name()
    want = run(make_config(**settings, device="cpu", output=str(tmp_path / f"{quantization}-cpu")))
    assert close(record, want, 0.01)
    for r in record.rounds:
        assert 0.5 < r.fold.survived < 1.5
        assert r.evaluation.questions == 4
    for branch in record.branches:
        update = true_updates(folder / f"round-{branch.round:03d}" / branch.teacher)
        assert all(bool(u.any()) for u in update.values())
    return config


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=SLOW), pytest.param("none", marks=SLOW)])
@false_gpu()
def test_a_run_on_a_card_gives_what_it_gives_on_a_cpu_and_so_does_who_looks_at_it(
    make_config: MakeConfig, tmp_path: Path, qwen3: Path, quantization: str
) -> None:
    config = run_on_both(make_config, tmp_path, quantization)
    looked = consensus(config.output, traces=99)
    check_landscape(config, looked, ends=False)
    last = RunDir(Path(config.output)).round_record(2)
    assert last
    log_p = {teacher: -loss for teacher, loss in last.evaluation.losses.items()}
    assert looked.confidence[-1].log_p == pytest.approx(log_p, rel=1e-4)
    out = tmp_path / f"{quantization}-export"
    assert export(config.output, out, round=2).survived > 0.9
    base, made = stored(qwen3), stored(out)
    folders = [Path(config.output) / f"round-{r:03d}" / t for r in (1, 2) for t in "ab"]
    ledger = [true_updates(folder) for folder in folders]
    for module in ledger[0]:
        want = base[f"{module}.weight"].double() + sum(update[module] for update in ledger) / 2
        off = made[f"{module}.weight"] != want.float().to(torch.bfloat16)
        assert off.float().mean() < 1e-3  # sums that lie between two numbers
    assert falsecuda.reports() == ""


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("quantization", ["int8", pytest.param("nf4", marks=SLOW), pytest.param("none", marks=SLOW)])
@false_gpu(**T4, count=2)
def test_a_run_on_the_first_of_two_cards_before_ampere(
    make_config: MakeConfig, tmp_path: Path, quantization: str
) -> None:
    run_on_both(make_config, tmp_path, quantization)


# --- going on ------------------------------------------------------------------------------------


def stops_and_goes_on(make_config: MakeConfig, tmp_path: Path) -> None:
    """A run with dropout and sampled answers, stopped within two branches, ends in the bytes of one that was not."""
    settings: dict[str, Any] = {
        "device": "cuda",
        "branch": {**BRANCH, "steps": 3},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
    }
    whole = make_config(**settings, output=str(tmp_path / "whole"))
    eval_settings = {**whole.eval.model_dump(mode="json"), "temperature": 1.0, "samples": 2}
    run(make_config(**settings, eval=eval_settings, output=str(tmp_path / "whole")))
    stopped = make_config(**settings, eval=eval_settings, output=str(tmp_path / "stopped"))
    for stage, step in (("round 1, b, train", 2), ("round 2, a, train", 1)):

        def stop(at: str, done: int, *_: Any, stage: str = stage, step: int = step, **__: Any) -> None:
            if (at, done) == (stage, step):
                raise KeyboardInterrupt

        torch.cuda.manual_seed(step)  # a process of its own would begin with another state
        with pytest.raises(KeyboardInterrupt):
            run(stopped, progress=stop)
    torch.cuda.manual_seed(3)
    run(stopped)
    assert same_run(tmp_path / "stopped", tmp_path / "whole")
    answers = [json.loads(line) for line in (tmp_path / "whole/round-002/answers.jsonl").read_text().splitlines()]
    assert any(len(set(answer["texts"])) == 2 for answer in answers)
    assert falsecuda.reports() == ""


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@false_gpu()
def test_a_branch_goes_on_to_the_same_bytes(make_config: MakeConfig, tmp_path: Path) -> None:
    stops_and_goes_on(make_config, tmp_path)


@pytest.mark.usefixtures("small")
@false_gpu(**T4)
def test_a_branch_goes_on_to_the_same_bytes_before_ampere(make_config: MakeConfig, tmp_path: Path) -> None:
    stops_and_goes_on(make_config, tmp_path)


# --- offloading ----------------------------------------------------------------------------------


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A Qwen3 of more layers than stay near."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path("student"))
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=6, head_dim=32, **shape)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


@pytest.mark.usefixtures("small")
@false_gpu()
def test_offloading_gives_the_same_bytes_and_not_without_its_waits(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(deep)
    traces = [Trace(({"role": "user", "content": f"{i} + 1 = ?"},), f"{i + 1} " * (i % 5 + 1)) for i in range(8)]
    examples = [encode(tokenizer, trace) for trace in traces]
    lora = LoraConfig(r=4, alpha=8, dropout=0.1)
    model = add_adapter(load_model(Checkpoint.open(str(deep)), "nf4", torch.device("cuda", 0)), lora)

    def trained(offload: str) -> list[Tensor]:
        reset_adapter(model, 0)
        with suppress(UserError):  # nonsense may also end as a loss that is not finite
            train(model, tokenizer, examples, BranchConfig(**{**BRANCH, "offload": offload}), seed=2)
        return [p.detach().cpu() for p in model.parameters() if p.requires_grad]

    def same(x: list[Tensor], y: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))

    plain = trained("off")
    assert falsecuda.late_copies() == 0
    assert same(trained("on"), plain)
    assert falsecuda.late_copies() > 30
    assert falsecuda.reports() == ""

    wait_event = torch.cuda.Stream.wait_event

    def only(waits: Callable[[torch.cuda.Stream], bool]) -> None:
        def wait(self: torch.cuda.Stream, event: torch.cuda.Event) -> None:
            if waits(self):
                wait_event(self, event)

        monkeypatch.setattr(torch.cuda.Stream, "wait_event", wait)

    only(lambda stream: stream.stream_id == 0)  # copies do not wait for who computes
    trained("on")
    assert "reads what the default stream may still be writing" in falsecuda.reports()
    assert "writes where the default stream may still be at work" in falsecuda.reports()
    seen = falsecuda.violations()
    only(lambda stream: stream.stream_id != 0)  # who computes does not wait for copies
    assert not same(trained("on"), plain)
    assert falsecuda.violations() > seen


# --- a card that is too small ----------------------------------------------------------------------


@false_gpu()
def test_a_card_that_is_full_is_one_line_wherever_it_happens_and_the_run_goes_on(make_config: MakeConfig) -> None:
    config = make_config(device="cuda", rounds=1)
    whole = torch.cuda.mem_get_info()[1]
    places = {
        "load the student": 50_000,
        "before, answer": 4096,
        "round 1, a, train": 4096,
        "round 1, b, answer": 4096,
        "round 1, fold": 4096,
    }
    for place, left in places.items():

        def fill(stage: str, *_: Any, place: str = place, left: int = left, **__: Any) -> None:
            if stage == place:
                torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + left) / whole)

        ooms = torch.cuda.memory_stats()["num_ooms"]
        with pytest.raises(UserError, match=r"out of memory.*\(.*CUDA out of memory\. Tried to allocate .*; "):
            run(config, progress=fill)
        assert torch.cuda.memory_stats()["num_ooms"] > ooms
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert is_free()
    assert run(config).stopped == "all rounds are done"
