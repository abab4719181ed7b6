"""The count of what a training step reads and writes: by hand for single operations, and what ours may be at most."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    monkeypatch.syspath_prepend(str(request.config.rootpath / "tests" / "benchmarks"))
    import traffic

    return traffic


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_operations_are_counted_as_by_hand(traffic: Any) -> None:
    x, y, wide = new(4, 8), new(4, 8), new(4, 8, dtype=torch.float32)  # 64 bytes each, and 128
    rows, row = torch.empty(3, dtype=torch.int64, device="meta"), new(8)
    cases = {
        "views": (lambda: x.t().view(8, 4).unsqueeze(0)[:, 1:].expand(5, 7, 4).detach(), 0, 0),
        "allocation": (lambda: torch.empty_like(x), 0, 0),
        "sum of two": (lambda: x + y, 3 * 64, 1),
        "with itself": (lambda: x * x, 2 * 64, 1),
        "a row": (lambda: x + row.expand(4, 8), 64 + 16 + 64, 1),
        "in place": (lambda: x.mul_(2), 2 * 64, 1),
        "into another format": (lambda: x.float(), 64 + 128, 1),
        "copied into": (lambda: wide.copy_(x), 64 + 128, 1),
        "filled": (lambda: x.zero_(), 64, 1),
        "reduced": (lambda: wide.sum(1), 128 + 16, 1),
        "rows picked": (lambda: x.index_select(0, rows), 2 * 48 + 24, 1),
        "a table looked up": (lambda: F.embedding(rows, x), 2 * 48 + 24, 1),
        "transposed and copied": (lambda: x.t().contiguous(), 2 * 64, 1),
        "a product": (lambda: x @ y.t(), 0, 1),
        "added to in place": (lambda: torch.addmm(x, x[:, :4], y, out=x), 0, 1),
        "added to a copy": (lambda: torch.addmm(x, x[:, :4], y), 2 * 64, 2),
        "a bias": (lambda: torch.addmm(row, x[:, :4], y), 0, 1),
    }
    for name, (work, count, launches) in cases.items():
        with traffic.Traffic() as counted:
            work()
        got = sum(counted.bytes.values()), sum(counted.launches.values())
        assert got == (count, launches), f"{name}: {counted.bytes}"


def test_ours_passes_least_over_memory(traffic: Any) -> None:
    """Qwen3-8B's shape, 8,192 tokens."""
    import one_card

    rows = traffic.measure(one_card.architecture({"shape": "8b"}), 8192)
    total = {who: row["bytes"] / 1e9 for who, row in rows.items()}
    assert total["us, Liger"] < 320
    assert total["us"] < 0.75 * total["trl"] < 0.75 * total["peft"]
    trace, inner, kv = 8192 * 4096 * 2, 8192 * 12288 * 2, 8192 * 1024 * 2
    layer = rows["us, Liger"]["layer_bytes_by_operation"]
    assert layer["Liger's swiglu"] == 2 * 3 * inner  # and once more, from its checkpoint
    assert layer["Liger's swiglu, backward"] == 5 * inner
    norms = 2 * trace + trace + kv  # of the layer's two, of queries and of keys
    scales = 4 * 8192 * (2 + 32 + 8)
    assert layer["Liger's norm"] == 2 * (2 * norms + scales)
    assert layer["Liger's norm, backward"] == 3 * norms + scales
    assert "copy for addmm" not in layer  # updates are added where the product is
    assert rows["us"]["layer_launches"]["product"] >= 7 * 8
