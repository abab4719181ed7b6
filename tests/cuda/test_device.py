"""The false GPU itself: it refuses and counts what a real one would."""

import ctypes
from typing import Any

import falsecuda
import pytest
import torch
from false_gpu import false_gpu
from torch import Tensor


@false_gpu(gib=1)
def test_memory_is_counted_limited_and_poisoned() -> None:
    before = falsecuda.held()
    x = torch.empty(2**20, dtype=torch.uint8, device="cuda")
    x.fill_(1)
    assert falsecuda.held() == before + 2**20 == torch.cuda.memory_allocated()
    assert torch.cuda.mem_get_info() == (2**30 - falsecuda.held(), 2**30)
    place = (ctypes.c_uint8 * 2**20).from_address(x.data_ptr())
    assert set(place) == {1}
    del x
    assert falsecuda.held() == before
    assert set(place) == {0xCB}  # who reads it now reads nonsense
    torch.cuda.reset_peak_memory_stats()
    with pytest.raises(
        torch.cuda.OutOfMemoryError, match=r"Tried to allocate 1\.00 GiB. GPU 0 has a total capacity of"
    ):
        torch.empty(2**30 + 1, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_stats()["num_ooms"] == 1
    torch.cuda.set_per_process_memory_fraction(0.5)
    assert torch.cuda.get_per_process_memory_fraction() == 0.5
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"512\.00 MiB allowed"):
        torch.empty(2**29 + 1, dtype=torch.uint8, device="cuda")
    assert torch.cuda.max_memory_allocated() == falsecuda.peak() == before
    with pytest.raises(ValueError, match="index"):  # as on a real one
        torch.cuda.get_per_process_memory_fraction(torch.device("cuda"))
    falsecuda.fail("CUDA error: out of memory", accelerator=True)
    with pytest.raises(torch.AcceleratorError, match="out of memory"):
        torch.ones(1, device="cuda")
    falsecuda.fail("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", after=1)
    torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="CUBLAS"):
        torch.ones(1, device="cuda")
    torch.ones(1, device="cuda")


@false_gpu(count=2, name="Tesla T4", gib=16, capability="7.5")
def test_torch_sees_the_cards_and_refuses_what_lies_elsewhere() -> None:
    assert (torch.cuda.device_count(), torch.cuda.current_device()) == (2, 0)
    assert torch.cuda.get_device_name(1) == "Tesla T4"
    assert torch.cuda.get_device_capability() == (7, 5)
    assert not torch.cuda.is_bf16_supported(including_emulation=False)
    x = torch.ones(3, 3, device="cuda")
    assert x.device == torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        x @ torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.functional.embedding(torch.tensor([1]), x)
    assert torch.equal((x + torch.tensor(1.0)).cpu(), torch.full((3, 3), 2.0))
    with torch.autocast("cuda", torch.float16):
        assert (x @ x).dtype == torch.float16


@false_gpu()
def test_it_draws_from_generators_of_its_own() -> None:
    def drawn() -> list[Tensor]:
        dropped = torch.nn.functional.dropout(torch.ones(64, device="cuda"))
        return [torch.rand(4, device="cuda"), torch.randperm(9, device="cuda"), dropped]

    def same(x: list[Tensor], y: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))

    torch.manual_seed(3)
    first, host = drawn(), torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), host)  # the device drew none of these
    assert same(drawn(), first)
    assert not same(drawn(), first)
    state = torch.cuda.get_rng_state()
    with torch.random.fork_rng(devices=[torch.device("cuda", 0)]):
        forked = drawn()
    assert same(drawn(), forked)
    torch.cuda.set_rng_state(state)
    assert same(drawn(), forked)
    own = torch.Generator("cuda").manual_seed(1)
    mine = torch.rand(4, device="cuda", generator=own)
    assert torch.equal(torch.rand(4, device="cuda", generator=own.manual_seed(1)), mine)


@false_gpu()
def test_copies_are_late_and_a_missing_wait_is_seen() -> None:
    x = torch.arange(8.0, device="cuda")
    there, back = torch.empty(8, pin_memory=True), torch.empty(8, device="cuda")
    assert falsecuda.pinned() == 32
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()

    def out(wait: bool) -> torch.cuda.Event:
        if wait:
            side.wait_stream(main)
        with torch.cuda.stream(side):
            there.copy_(x, non_blocking=True)
        return side.record_event()

    done = out(wait=True)
    assert not done.query()
    assert not torch.equal(there, x.cpu())  # not there before somebody waits
    done.synchronize()
    assert torch.equal(there, x.cpu())
    assert (falsecuda.violations(), falsecuda.late_copies()) == (0, 1)

    there.zero_()
    there.copy_(x, non_blocking=True)  # also on the default stream, the host has to wait
    assert not there.any()
    assert main.record_event().query()
    assert torch.equal(there, x.cpu())
    there.fill_(7)
    back.copy_(there, non_blocking=True)
    there.fill_(8)  # too early
    assert (back * 1).tolist() == [8] * 8

    x.mul_(2)
    out(wait=False).synchronize()
    assert falsecuda.violations() == 1
    assert "reads what the default stream may still be writing" in falsecuda.reports()

    back.zero_()
    with torch.cuda.stream(side):
        back.copy_(there, non_blocking=True)
    assert falsecuda.violations() == 2
    assert "writes where the default stream may still be at work" in falsecuda.reports()
    back.add_(1)
    assert falsecuda.violations() == 3
    assert "that a copy on stream 1 was not done with" in falsecuda.reports()
    main.wait_stream(side)

    out(wait=True)
    x = torch.empty(0)  # what it held is given back before the copy was waited for
    side.synchronize()
    assert falsecuda.violations() == 4
    assert "a copy found its memory given back" in falsecuda.reports()


# --- attention -----------------------------------------------------------------------------------

FLASH, EFFICIENT, MATH = "ScaledDotProductFlash", "ScaledDotProductEfficient", None
BATCH, HEADS, TOKENS, WIDTH = 2, 4, 256, 32


def attention(dtype: torch.dtype, shared: int = 1, masked: bool = False) -> tuple[str | None, float, float]:
    """The kernel that is chosen, and the bytes that it keeps and that its backward pass takes, by those of q.

    Output and gradients are compared with those of a CPU in fp32.
    """
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(BATCH, TOKENS, h, WIDTH, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
        for h in (HEADS, HEADS // shared, HEADS // shared)
    )
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device="cuda").tril() if masked else None
    settings = {"is_causal": not masked, "enable_gqa": shared > 1}
    before = falsecuda.held()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **settings)
    kept = (falsecuda.held() - before) / q.nbytes
    kernel = next((name for name in (FLASH, EFFICIENT) if name in type(out.grad_fn).__name__), MATH)
    gradient = torch.randn_like(out)
    before = falsecuda.held()
    torch.cuda.reset_peak_memory_stats()
    out.backward(gradient)
    backward = (falsecuda.peak() - before) / q.nbytes

    host = [t.detach().cpu().float().requires_grad_() for t in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*host, is_causal=True, enable_gqa=True)
    want.backward(gradient.cpu().float())
    for got, exact in ((out, want), *((t.grad, h.grad) for t, h in zip((q, k, v), host, strict=True))):
        assert got is not None
        assert exact is not None
        torch.testing.assert_close(got.cpu().float(), exact, atol=0.1, rtol=0.02)
    return kernel, kept, backward


def near(x: float) -> Any:
    return pytest.approx(x, abs=1e-3)  # beside it a kernel keeps the state of its dropout


@false_gpu()
def test_attention_is_chosen_and_takes_memory_as_on_ampere() -> None:
    half = torch.bfloat16
    # the output and its log-sum-exp; going back dq, dk, dv and the fp32 sum of dq, beside a row's number in fp32
    row = 2 / WIDTH  # of fp32 numbers, one for each row of a matrix in 16 bits
    assert attention(half) == (FLASH, near(1 + row), near(5 + row))
    # and those of shared keys and values once for each head
    assert attention(half, shared=2) == (FLASH, near(1 + row), near(6 + row))
    assert attention(half, masked=True)[0] == EFFICIENT
    assert attention(torch.float32) == (EFFICIENT, near(1 + row / 2), near(4 + row / 2))
    assert attention(torch.float32, shared=2)[0] == MATH
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention(half)[0] == MATH
    a, b = torch.randn(2, 5, 64, device="cuda", dtype=half).unbind()
    product = torch.mm(a, b.t(), out_dtype=torch.float32)  # what only CUDA has
    torch.testing.assert_close(product.cpu(), a.cpu().float() @ b.cpu().float().t())
    assert torch.addmm(product, a, b.t(), out_dtype=torch.float32).dtype == torch.float32
    assert falsecuda.violations() == 0


@false_gpu(name="Tesla T4", gib=16, capability="7.5")
def test_attention_is_chosen_and_takes_memory_as_before_ampere() -> None:
    row = 2 / WIDTH
    assert attention(torch.float16) == (EFFICIENT, near(1 + row), near(5 + row))
    assert attention(torch.float16, masked=True)[0] == EFFICIENT
    assert attention(torch.float32)[0] == EFFICIENT
    for dtype in (torch.float16, torch.float32):
        kernel, kept, backward = attention(dtype, shared=2)
        assert kernel == MATH
        assert min(kept, backward) > TOKENS / WIDTH  # whole score matrices
    assert attention(torch.bfloat16)[0] == MATH
    scaler = torch.amp.GradScaler("cuda")
    layer = torch.nn.Linear(4, 4, device="cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    before = layer.weight.detach().clone()
    with torch.autocast("cuda", torch.float16):
        loss = layer(torch.ones(2, 4, device="cuda")).float().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert torch.allclose(layer.weight.grad, torch.full((4, 4), 0.25, device="cuda"), atol=1e-3)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(layer.weight, before)
    layer.weight.grad.fill_(float("inf"))
    before = layer.weight.detach().clone()
    scaler.scale(loss.detach())
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before)
    assert scaler.get_scale() == 2**15
