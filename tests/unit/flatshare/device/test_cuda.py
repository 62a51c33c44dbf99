"""``device/cuda.py`` on a simulated CUDA: what it takes, what it leaves behind, and what it says when it fails."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from flatshare.device.cpu import CpuDevice
from flatshare.device.cuda import CHUNK_BYTES, SLABS, CudaDevice
from flatshare.device.faults import fault_of
from flatshare.device.memory import DeviceMemory
from flatshare.device.opening import CONTEXT_BYTES, device_budget, most_bytes, open_device
from flatshare.device.testing.allocator import CachingAllocator
from flatshare.device.testing.simulated_cuda import SimulatedCuda
from flatshare.device.torch_cuda import allocator_settings, without_tf32
from flatshare.errors import DeviceBroken, SettingsError, Wedged
from flatshare_registry.testing.faults import ManualClock

MIB = 1024**2
PATTERN = b"\x5a\xa5customer\x5a\xa5weights"


@pytest.fixture
def flags() -> Iterator[None]:
    """torch's switches as they were, afterwards."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def pattern(size: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(PATTERN * (size // len(PATTERN))), dtype=torch.uint8)


# -- 1: TF32


@pytest.mark.usefixtures("flags")
def test_a_card_that_computes_in_tf32_is_found_at_the_start() -> None:
    torch.backends.cudnn.allow_tf32 = True
    with pytest.raises(SettingsError, match="other numbers than the CPU"):
        CudaDevice(SimulatedCuda(tf32=True))
    without_tf32()
    CudaDevice(SimulatedCuda(tf32=True))
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (False, False)


# -- 2: what memory takes


@pytest.mark.parametrize("mib", [0.0001, 0.4, 1, 1.01, 1.6, 3.4, 5.1, 6.7, 7, 9.99, 10, 10.01, 12.5, 14.1])
def test_tensors_of_one_size_take_no_more_than_they_are_counted_as(mib: float) -> None:
    device = CudaDevice(SimulatedCuda())
    allocator = CachingAllocator(100 * 1024 * MIB)
    size, count = int(mib * MIB), 400
    for _ in range(count):
        allocator.allocate(size, 1)
    assert allocator.reserved <= count * device.footprint(size) + 20 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_many_tenants_models_take_what_they_are_counted_as(expandable: bool) -> None:
    """A mix that comes and goes: what is left over between blocks is 4 % of the budget, and 2 with segments that grow.
    The headroom has it; where it has not, somebody goes (test_device_room.py).
    """
    sizes = [3_211_264 // 4, 4_718_592, 9_437_184 // 4, 64, 2_359_296, 40_960]
    device = CudaDevice(SimulatedCuda(expandable_segments=expandable))
    allocator = CachingAllocator(10**12, expandable_segments=expandable)
    chosen, live, held = random.Random(1), [], 0
    budget = 4 * 1024 * MIB
    for _ in range(3000):
        tensors = chosen.sample(sizes, 4)
        taken = sum(map(device.footprint, tensors))
        while held + taken > budget:
            blocks, size = live.pop(chosen.randrange(len(live)))
            for block in blocks:
                allocator.free(block)
            held -= size
        live.append(([allocator.allocate(size, 1) for size in tensors], taken))
        held += taken
    assert allocator.reserved < (1.02 if expandable else 1.05) * budget


def test_an_allocation_that_fails_leaves_nothing_behind() -> None:
    runtime = SimulatedCuda(64 * MIB)
    device = CudaDevice(runtime)
    before = runtime.allocator.allocated
    with pytest.raises(torch.OutOfMemoryError) as caught:
        device.place({number: torch.ones(6 * MIB, dtype=torch.uint8) for number in range(20)})
    assert device.judge(caught.value) == "memory"
    del caught
    gc.collect()
    assert runtime.allocator.allocated == before
    device.check(1)


# -- 3: failures


def test_what_errors_say() -> None:
    assert fault_of(torch.OutOfMemoryError("CUDA out of memory")) == "memory"
    assert fault_of(torch.AcceleratorError("CUDA error: out of memory")) == "memory"
    assert (
        fault_of(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")) == "memory"
    )
    assert fault_of(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")) == "memory"
    assert (
        fault_of(torch.AcceleratorError("CUDA error: an illegal memory access was encountered")) == "broken"
    )
    assert fault_of(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")) == "broken"
    assert fault_of(RuntimeError("shape '[3]' is invalid")) == "other"
    assert fault_of(ValueError("CUDA")) == "other"


def test_a_device_that_failed_once_is_broken_whoever_asks() -> None:
    """It is told at a later call, of whoever makes it, and from then on at each."""
    runtime = SimulatedCuda()
    device = CudaDevice(runtime)
    device.check(1)
    runtime.break_down()
    launched = device.launch([np.ones((1, 3), np.float32)], lambda rows: [rows[0] + 1])
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        launched.wait()
    with pytest.raises(DeviceBroken, match=r"device-side assert.*replaced, retry"):
        device.check(1)
    for call in (
        lambda: device.place({"a": torch.ones(3)}),
        lambda: device.launch([np.ones((1, 3), np.float32)], lambda rows: rows),
        lambda: device.scrub([torch.ones(3)]),
        device.memory,
    ):
        with pytest.raises(torch.AcceleratorError):
            call()


async def test_a_device_that_never_answers_is_wedged() -> None:
    clock = ManualClock(0.0)
    runtime = SimulatedCuda()
    device = CudaDevice(runtime, clock=clock)
    runtime.hang()
    loading = threading.Thread(target=device.place, args=({"a": torch.ones(3)},))
    loading.start()
    while not device._since:  # until it waits: the test's own time-out says where it never does
        await asyncio.sleep(0)
    clock.advance(30)
    device.check(30)
    clock.advance(1)
    with pytest.raises(Wedged, match="not answered for 30 s"):
        device.check(30)
    runtime.go_on()
    loading.join()
    device.check(0)


@pytest.mark.parametrize(
    "text",
    [
        "GET was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    ],
)
def test_what_cudnn_does_not_say_clearly_is_judged_by_the_memory_that_is_left(text: str) -> None:
    """By what this process may have: a quarter of a card is full while the card has a lot free."""
    runtime = SimulatedCuda(1 << 34)
    device = CudaDevice(runtime)
    plenty = device.judge(RuntimeError(text))
    assert plenty in ("other", "broken")
    runtime = SimulatedCuda(1 << 34)
    device = CudaDevice(runtime)
    runtime.most_bytes = runtime.memory().reserved + 100 * MIB
    assert device.judge(RuntimeError(text)) == "memory"
    device.check(1)


def test_a_card_whose_context_can_not_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> tuple[int, int]:
        raise torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    with pytest.raises(SettingsError, match=r"can't use it .*busy or unavailable.*nvidia-smi"):
        open_device("auto", 0.25)


# -- 4: what is left of weights


async def test_nothing_of_a_model_that_went_is_left_in_any_memory() -> None:
    """Not in what it lay in, nor in the pinned memory that it came through, nor where it was placed in part."""
    runtime = SimulatedCuda(96 * MIB)
    device = CudaDevice(runtime, chunk_bytes=MIB)
    placed = device.place({"large": pattern(5 * MIB), "small": pattern(4096)})
    assert runtime.contents().count(PATTERN) > 200_000, "the test finds what is there"
    with pytest.raises(torch.OutOfMemoryError):
        device.place({number: pattern(9 * MIB) for number in range(12)})
    assert device.scrub(placed.values()) == sum(one.nbytes for one in placed.values())
    del placed
    await device.settle()
    assert PATTERN not in runtime.contents()


# -- 5, 7, 15: opening


def test_a_gpu_that_is_reserved_and_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(open_device("auto"), CpuDevice)
    assert isinstance(open_device("cpu", 0.0), CpuDevice)
    for wanted, share, says in (("auto", 0.25, r"gpus_per_replica=0\.25"), ("cuda", 0.0, "device=cuda")):
        with pytest.raises(SettingsError, match=rf"{says}, but .* finds no CUDA device.*nvidia-smi"):
            open_device(wanted, share)


def test_a_card_without_kernels_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimulatedCuda()
    runtime.break_down()
    monkeypatch.setattr(runtime, "describe", lambda: "Tesla V100, compute capability 7.0")
    with pytest.raises(SettingsError, match=r"Tesla V100.*does not compute.*nvidia-smi"):
        CudaDevice(runtime)


def test_a_share_of_a_device_is_a_bound_of_its_allocator() -> None:
    total = 24 * 1024 * MIB
    assert most_bytes(total, 0.25) == total // 4 - CONTEXT_BYTES
    assert [most_bytes(total, share) for share in (0, 1)] == [0, 0]
    assert most_bytes(CONTEXT_BYTES, 0.1) == 1, "a bound all the same"


def test_more_bytes_than_are_free_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Gpu(CpuDevice):
        def memory(self) -> DeviceMemory:
            return DeviceMemory(allocated=0, free=60, total=100)

    assert device_budget(Gpu(), 50, 10, 1.0) == 50
    assert not caplog.records
    assert device_budget(Gpu(), 70, 10, 1.0) == 70
    assert "device_bytes=70, and the device has 60 bytes free" in caplog.text


def test_what_the_environment_tells_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True, max_split_size_mb:20")
    assert allocator_settings() == {"expandable_segments": "True", "max_split_size_mb": "20"}
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    assert allocator_settings() == {}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    assert allocator_settings() == {"expandable_segments": "False"}


# -- 10: pinned memory


def test_pinned_memory_is_taken_once_whatever_is_loaded() -> None:
    runtime = SimulatedCuda()
    device = CudaDevice(runtime)
    pinned = runtime.pinned_bytes
    for size in (10, 3 * MIB, 40 * MIB):
        device.place({"a": torch.ones(size, dtype=torch.uint8)})
    assert runtime.pinned_bytes == pinned == 2 * SLABS * CHUNK_BYTES + 4 * MIB


# -- 11: the event loop


async def test_the_event_loop_never_waits_for_the_device() -> None:
    """Overwriting, and asking what memory there is, come back while the device hangs."""
    runtime = SimulatedCuda()
    device = CudaDevice(runtime)
    placed = device.place({"a": torch.ones(3)})
    runtime.hang()
    assert device.scrub(placed.values()) == 12
    settling = asyncio.create_task(device.settle())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not settling.done()
    runtime.go_on()
    await settling


# -- 12: one copy each way


def test_a_pass_of_many_models_is_one_copy_in_and_one_out() -> None:
    runtime = SimulatedCuda()
    device = CudaDevice(runtime)
    rows = [np.ones((number + 1, 5), np.float32) for number in range(16)]
    before = runtime.copies
    found = device.launch(rows, lambda given: [one * 2 for one in given]).wait()
    assert runtime.copies - before == 2
    assert [one.shape for one in found] == [one.shape for one in rows]
