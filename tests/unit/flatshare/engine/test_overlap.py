"""Passes that are under way together on one device: each has its own answers, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from flatshare.device.cpu import CpuDevice
from flatshare.device.cuda import CudaDevice
from flatshare.device.protocol import Device
from flatshare.device.testing.simulated_cuda import SimulatedCuda
from flatshare.engine.inference import Inference
from flatshare.errors import ModelFailed, NoRoom
from flatshare.residency.lease import Lease
from flatshare.weights.tiers import ModelKey

from .one_model import Gate, cache_of, record_of

MIB = 1024**2
RECORD = record_of("x")


@pytest.fixture(params=["cpu", "simulated"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "cpu":
        yield CpuDevice()
        return
    runtime = SimulatedCuda(200 * MIB)
    yield CudaDevice(runtime)
    assert runtime.violations == []


@pytest.fixture
def inference(device: Device) -> Iterator[Inference]:
    made = Inference(device)
    yield made
    made.close()


class Add(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.flatten(1) + self.number


class OnlyOne(nn.Module):
    """Fails for several rows: a pass of several jobs is tried again, one by one."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > 1:
            raise ValueError("one at a time")
        return rows.flatten(1) + 5555


async def leased(module: nn.Module, tenant: str) -> Lease:
    return await cache_of(module).lease(RECORD.model_copy(update={"tenant": tenant}), 5)


def row(value: float) -> np.ndarray:
    return np.full((1, 1, 2, 2), value, np.float32)


@pytest.mark.parametrize("several", [2, 3, 4])
async def test_a_pass_that_is_tried_again_leaves_the_next_ones_answers_alone(
    inference: Inference, several: int
) -> None:
    """Retries come while the next pass is under way: its logits must not become theirs."""
    hold = Gate()
    with await leased(hold, "hold") as first, await leased(OnlyOne(), "some") as some:
        others = [await leased(Add(1000 * number), f"t{number}") for number in range(1, 4)]
        running = [asyncio.create_task(inference.run(first, row(0)))]
        await asyncio.to_thread(hold.entered.wait, 5)
        running += [asyncio.create_task(inference.run(some, row(number))) for number in range(several)]
        running += [asyncio.create_task(inference.run(lease, row(7))) for lease in others]
        await asyncio.sleep(0)
        hold.go.set()
        found = await asyncio.gather(*running)
        for lease in others:
            lease.release()
    wanted = [0, *(5555 + number for number in range(several)), 1007, 2007, 3007]
    assert [one.tolist() for one in found] == [[[float(value)] * 4] for value in wanted]


async def test_a_failed_pass_keeps_no_model_alive(inference: Inference) -> None:
    """Not until the cycle collector comes by: an error refers to its frames, and these to the pass."""
    hold, bad = Gate(), OnlyOne()
    gone = weakref.ref(bad)
    cache = cache_of(bad)
    gc.collect()
    gc.disable()
    try:
        with await leased(hold, "hold") as first:
            running = [asyncio.create_task(inference.run(first, row(0)))]
            await asyncio.to_thread(hold.entered.wait, 5)
            leases = [await cache.lease(RECORD, 5) for _ in range(3)]
            running += [
                asyncio.create_task(inference.run(one, np.zeros((2, 1, 2, 2), np.float32))) for one in leases
            ]
            await asyncio.sleep(0)
            hold.go.set()
            found = await asyncio.gather(*running, return_exceptions=True)
            assert [type(one) for one in found[1:]] == [ModelFailed] * 3
            for one in leases:
                one.release()
            cache.unload(ModelKey.of(RECORD))
            cache._loader.model = None  # type: ignore[attr-defined]  # the test's own loader keeps it
            del cache, bad, leases, one
            for _ in range(3):  # the thread lets go of its last batch when it takes the next
                await inference.run(first, row(0))
        assert gone() is None
        assert all(isinstance(one, np.ndarray | Exception) for one in found)
    finally:
        gc.enable()


async def test_what_is_tried_again_has_the_memory_of_what_failed() -> None:
    """Activations of a pass without memory are gone before its halves are launched."""
    device = CudaDevice(SimulatedCuda(200 * MIB))
    inference = Inference(device)

    class Fat(nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            first = rows.new_zeros(len(rows), 2 * MIB // 4)
            second = first + 1
            return (second + first)[:, :4]

    hold = Gate()
    with await leased(hold, "hold") as first, await leased(Fat(), "fat") as fat:
        running = [asyncio.create_task(inference.run(first, row(0)))]
        await asyncio.to_thread(hold.entered.wait, 5)
        running += [asyncio.create_task(inference.run(fat, row(1))) for _ in range(48)]
        await asyncio.sleep(0)
        hold.go.set()
        found = await asyncio.gather(*running, return_exceptions=True)
        assert not any(isinstance(one, NoRoom) for one in found), "48 rows do not fit, 24 do"
        assert inference._runner.rows_now == 24
        # One request of 64 rows runs in parts, too, and in the order of its rows.
        rows = np.arange(64, dtype=np.float32).reshape(64, 1, 1, 1).repeat(4, axis=3)
        assert (await inference.run(fat, rows)).shape == (64, 4)
    inference.close()
