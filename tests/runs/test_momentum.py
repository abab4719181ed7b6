"""Momentum over the rounds' updates: its weights, and the students that come of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_update, stored, true_updates
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distillation import MakeConfig, Spied, records
from test_student import requantized

from mot_lora import export
from mot_lora.config import Config
from mot_lora.merging.averages import nesterov
from mot_lora.runs.distillation import run
from mot_lora.runs.rundir import RunDir

pytestmark = pytest.mark.timeout(300)  # seconds, for whole runs on a slow machine


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 12), st.floats(0, 0.99), st.integers(0, 9))
def test_the_weights_are_those_of_torchs_nesterov(n: int, momentum: float, seed: int) -> None:
    updates = torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0, momentum=momentum, nesterov=momentum > 0)
    for t, update in enumerate(updates, 1):
        x.grad = -update
        optimizer.step()
        weights = torch.tensor(nesterov(t, momentum), dtype=torch.float64)
        torch.testing.assert_close(weights @ updates[:t], x.detach(), rtol=1e-9, atol=1e-9)


def test_without_momentum_every_round_counts_once() -> None:
    assert nesterov(4, 0.0) == [1.0] * 4
    assert nesterov(0, 0.9) == []


@pytest.mark.parametrize(
    "scale",
    [1.5, {"q_proj": 2.0}, {"q_proj": 2.0, ".*": 3.0, "mlp.*": 4.0}, {".*": 0.5}, {"mlp.*": 2.0, ".*_proj": 0.25}],
    ids=str,
)
def test_a_scaled_merge_is_so_many_times_as_large_in_every_module(qwen3: Path, scale: Any) -> None:
    merged = replace(small_update(qwen3, 0.01, 0), scale=scale)
    assert merged.scaled(1) is merged
    for factor in (1.75, 0.5, 0.0):
        scaled = merged.scaled(factor)
        for (name, want), (other, got) in zip(merged, scaled, strict=True):
            assert name == other
            torch.testing.assert_close(got.double(), factor * want.double(), rtol=1e-5, atol=1e-9)


@pytest.fixture
def small(make_config: MakeConfig) -> Callable[..., Config]:
    def make(**settings: Any) -> Config:
        plain = {"data": make_config().eval.data, "branches": False, "limit": 1, "max_new_tokens": 1, "holdout": 0.1}
        steps = {"steps": 2, "batch_size": 1, "gradient_accumulation": 1, "learning_rate": 1e-2, "max_length": 128}
        return make_config(**{"branch": {**steps, "activation_checkpointing": False}, "eval": plain, **settings})

    return make


def test_the_student_is_w0_plus_the_steps_of_nesterov(
    small: Callable[..., Config], qwen3: Path, tmp_path: Path
) -> None:
    config = small(merge={"momentum": 0.5, "scale": {"mlp.*": 2.0}})
    spied = Spied()
    rounds = run(config, train=spied.train, evaluate=spied.evaluate).rounds
    base = {n: w.double() for n, w in stored(qwen3).items()}
    d = []
    for number in (1, 2):
        a, b = (true_updates(Path(config.output) / f"round-{number:03d}" / t) for t in "ab")
        d.append({n: (a[n] + b[n]) / 2 * (2 if ".mlp." in n else 1) for n in a})
    # x_1 = D_1 + .5 D_1; v_2 = .5 D_1 + D_2, and its step is D_2 + .5 v_2
    steps = [{n: 1.5 * d[0][n] for n in d[0]}, {n: 0.25 * d[0][n] + 1.5 * d[1][n] for n in d[0]}]
    total = {n: base[f"{n}.weight"].clone() for n in d[0]}
    for number, step in enumerate(steps):
        total = {n: total[n] + step[n] for n in total}
        got = spied.measured[number + 1]
        off = sum(int(((got[n] - requantized(w, "nf4")).abs() > 1e-6).sum()) for n, w in total.items())
        assert off <= sum(w.numel() for w in total.values()) // 1000
        fold = rounds[number].fold
        size = torch.cat([step[n].flatten() for n in step]).norm()
        whole = torch.cat([base[f"{n}.weight"].flatten() for n in step]).norm()
        assert fold.relative_norm == pytest.approx(float(size / whole), rel=1e-4)
        assert 0.6 < fold.survived < 1.4
        assert rounds[number].momentum == 0.5
    export(RunDir(Path(config.output)).path, tmp_path / "out", round=2)
    exported = stored(tmp_path / "out")
    for n, w in total.items():
        assert (
            torch.equal(exported[f"{n}.weight"], w.float().to(torch.bfloat16))
            or float((exported[f"{n}.weight"].double() - w).abs().max() / w.abs().max()) < 2**-8
        )


def test_momentum_of_zero_changes_nothing(small: Callable[..., Config], tmp_path: Path) -> None:
    run(small(output=str(tmp_path / "plain")))
    run(small(output=str(tmp_path / "zero"), merge={"momentum": 0.0, "weights": "uniform"}))
    assert records(tmp_path / "plain") == records(tmp_path / "zero")
