"""The false GPU itself: it refuses and counts what a real one would."""

import ctypes

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
