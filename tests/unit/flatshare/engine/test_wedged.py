"""A pass that never ends: told, counted and replaced; nobody waits for it, and nobody gets its memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from flatshare.api.error_table import describe_error
from flatshare.device.cpu import CpuDevice
from flatshare.engine.inference import Inference
from flatshare.errors import Wedged
from flatshare_registry.testing.faults import ManualClock

from .one_model import Gate, cache_of, record_of

RECORD = record_of("x")
ROWS = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(0.0)


@pytest.fixture
async def inference(clock: ManualClock) -> AsyncIterator[Inference]:
    made = Inference(CpuDevice(), pass_limit_s=30, clock=clock)
    yield made
    await asyncio.to_thread(made.close)


async def test_a_pass_is_healthy_while_it_may_run(inference: Inference, clock: ManualClock) -> None:
    module = Gate()
    inference.check_alive()
    with await cache_of(module).lease(RECORD, 5) as lease:
        running = asyncio.create_task(inference.run(lease, ROWS))
        await asyncio.to_thread(module.entered.wait, 5)
        clock.advance(30)
        inference.check_alive()
        clock.advance(1)
        with pytest.raises(Wedged, match="not ended within 30 s"):
            inference.check_alive()
        module.go.set()
        await running
    inference.check_alive()
    clock.advance(10**6)
    inference.check_alive()  # idle is no pass


async def test_who_comes_to_a_replica_that_is_stuck_is_told_at_once(
    inference: Inference, clock: ManualClock
) -> None:
    module = Gate()
    with await cache_of(module).lease(RECORD, 5) as lease:
        running = asyncio.create_task(inference.run(lease, ROWS))
        await asyncio.to_thread(module.entered.wait, 5)
        clock.advance(31)
        with pytest.raises(Wedged) as caught:
            await inference.run(lease, ROWS)
        told = describe_error(caught.value)
        assert (told.status, told.code, told.retry_after_s) == (503, "replica_wedged", 1)
        module.go.set()
        await running


async def test_a_request_under_way_ends_when_its_pass_never_does(
    inference: Inference, clock: ManualClock
) -> None:
    """Its time is over, and it can't let go of a model that the thread still uses: it ends, the model stays."""
    module = Gate()
    cache = cache_of(module)
    with await cache.lease(RECORD, 5) as lease:
        running = asyncio.create_task(inference.run(lease, ROWS))
        await asyncio.to_thread(module.entered.wait, 5)
        running.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not running.done(), "its pass may still end"
        clock.advance(31)
        running.cancel()  # what wakes it is the next look, here that of a second cancellation
        with pytest.raises(Wedged):
            await running
        cache.quarantine(lease)
    assert cache.occupied == 1, "its bytes are in use"
    module.go.set()
