"""One adapter minus another: negative weights are factors of a sum, and a negative scale turns a merge round."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refused, stored, true_updates
from wild import far, llama, lora

from mot_lora import UserError, fold_checkpoint, merge_adapters
from mot_lora.merging.methods import ELECTS, linear


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters a and b, of a base beside them."""
    folder = tmp_path_factory.mktemp("arithmetic")
    base = llama(folder / "base")
    lora(base, folder / "a", base=folder / "base")
    lora(base, folder / "b", base=folder / "base", seed=2, r=3, target_modules=["q_proj", "o_proj"])
    return folder


SUMS: dict[str, tuple[tuple[str, ...], tuple[str, ...], float, float]] = {
    "a - b": (("a", "b"), ("--weights", "1,-1"), 1, -1),
    "b - a": (("a", "b"), ("--weights", "-1,1"), -1, 1),
    "b - a, written with =": (("a", "b"), ("--weights=-1,1",), -1, 1),
    "with a space": (("a", "b"), ("--weights", "1, -1"), 1, -1),
    "2 a - b / 2": (("a", "b"), ("--weights", "2,-.5"), 2, -0.5),
    "-a - b": (("a", "b"), ("--weights", "-1,-1"), -1, -1),
    "half of a - b": (("a", "b"), ("--weights", "1,-1", "--scale", "0.5"), 0.5, -0.5),
    "-a by its weight": (("a",), ("--weights", "-1"), -1, 0),
    "-a by the scale": (("a",), ("--scale", "-1"), -1, 0),
    "-a, scale written with =": (("a",), ("--scale=-1",), -1, 0),
    "minus the mean": (("a", "b"), ("--scale", "-1"), -0.5, -0.5),
    "in a common space": (("a", "b"), ("--weights", "1,-1", "--space", "core"), 1, -1),
    "a whole of zeros": (("a", "b"), ("--weights", "0,-1"), 0, -1),
}


@pytest.mark.parametrize("kind", SUMS)
def test_negative_weights_are_factors_of_a_sum(adapters: Path, tmp_path: Path, call: Any, kind: str) -> None:
    """huggingface/peft#1907, #2796."""
    names, options, of_a, of_b = SUMS[kind]
    status, _, error = call("merge", *(adapters / n for n in names), *options, "--out", tmp_path / "m")
    assert status == 0, error
    a, b = (true_updates(adapters / n) for n in "ab")
    want = {m: of_a * a.get(m, 0) + of_b * b.get(m, 0) for m in (a | b if len(names) == 2 else a)}
    assert far(true_updates(tmp_path / "m"), want) < 1e-6


def test_a_fold_subtracts(adapters: Path, tmp_path: Path) -> None:
    one = merge_adapters([adapters / "a", adapters / "b"], weights=[1, -1])
    other = merge_adapters([adapters / "b", adapters / "a"], weights=[-1, 1])
    folded = [stored(fold_checkpoint(adapters / "base", m, tmp_path / n)) for m, n in ((one, "one"), (other, "other"))]
    assert far(*folded) == 0
    a, b = (true_updates(adapters / n) for n in "ab")
    base = stored(adapters / "base")
    for module, delta in {m: a.get(m, 0) - b.get(m, 0) for m in a | b}.items():
        change = folded[0][f"{module}.weight"].double() - base[f"{module}.weight"].double()
        torch.testing.assert_close(change, delta, rtol=1e-4, atol=1e-6)


def test_dare_linear_subtracts_and_its_draws_stay(adapters: Path) -> None:
    folders = [adapters / "a", adapters / "b"]
    one, other = (merge_adapters(folders, "dare_linear", w, 0.5) for w in ([1, -1], [-1, 1]))
    assert all(torch.equal(one.delta(m), -other.delta(m)) for m in one.shapes)


@pytest.mark.parametrize("method", sorted(ELECTS))
def test_where_a_sign_is_elected_nothing_is_subtracted(adapters: Path, tmp_path: Path, call: Any, method: str) -> None:
    options = ("--method", method, "--density", "0.5", "--rank", "4", "--out", tmp_path / "m")
    message = refused(call("merge", adapters / "a", adapters / "b", "--weights", "1,-1", *options))
    assert "negative where a sign is elected" in message
    assert "linear" in message


def test_a_functions_own_weights_may_be_negative(adapters: Path) -> None:
    def plain_sum(deltas: torch.Tensor, weights: Any) -> torch.Tensor:
        return sum(w * d for w, d in zip(weights, deltas, strict=True))  # pyright: ignore

    folders = [adapters / "a", adapters / "b"]
    own, ours = (merge_adapters(folders, m, [1, -1]) for m in (plain_sum, "linear"))
    assert all(torch.allclose(own.delta(m), ours.delta(m), atol=1e-6) for m in own.shapes)


def test_weights_that_are_not_negative_stay_shares_of_a_mean() -> None:
    deltas = torch.tensor([[[4.0]], [[2.0]]])
    assert linear(deltas, (2, 0)) == 4
    assert linear(deltas, (2, -0.0)) == 4
    assert linear(deltas, (2, -1)) == 6
    with pytest.raises(UserError, match="not all 0"):
        linear(deltas, (0, -0.0))
