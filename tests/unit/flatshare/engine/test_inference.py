"""The forward pass: right logits, receipts, and leases that outlive a caller who goes away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from flatshare.cache.loading import Fetched, Placed
from flatshare.cache.model_cache import ModelCache
from flatshare.cache.tiers import Receipt, Tier
from flatshare.engine.inference import Inference
from flatshare.errors import IsolationBroken, ModelFailed
from flatshare_registry.records import VersionRecord


class Gate(nn.Module):
    """Waits inside the forward pass until it is let on."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.go.wait(10)
        return rows.flatten(1)


class Broken(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes do not match")


class OneModule:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    async def fetch(self, record: VersionRecord) -> Fetched:
        return Fetched(b"", Tier.STORE)

    def check(self, record: VersionRecord) -> None:
        pass

    async def prepare(self, record: VersionRecord, fetched: Fetched) -> nn.Module:
        return self.module

    async def place(self, record: VersionRecord, module: nn.Module) -> Placed:
        return Placed(module, 0)


def cache_of(module: nn.Module) -> ModelCache:
    loader = OneModule(module)
    return ModelCache(slots=1, source=loader, placer=loader)


RECORD = VersionRecord.model_validate(
    {"tenant": "acme", "version": 1, "architecture": "x", "digest": "0" * 64, "size_bytes": 0, "tensors": [],
     "created_at": "2026-01-01T00:00:00Z", "created_by": "test"}
)  # fmt: skip
ROWS = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)


@pytest.fixture
def inference() -> Iterator[Inference]:
    inference = Inference(torch.device("cpu"))
    yield inference
    inference.close()


async def test_rows_come_back_as_logits(inference: Inference) -> None:
    with await cache_of(nn.Flatten()).lease(RECORD, 5) as lease:
        logits = await inference.run(lease, ROWS)
    np.testing.assert_array_equal(logits, ROWS.reshape(2, 4))


async def test_a_pass_that_raises_is_a_failed_model(inference: Inference) -> None:
    with await cache_of(Broken()).lease(RECORD, 5) as lease, pytest.raises(ModelFailed, match="acme@1"):
        await inference.run(lease, ROWS)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_promise_1_a_slot_that_changed_fails_the_request(inference: Inference, when: str) -> None:
    module = Gate()
    with await cache_of(module).lease(RECORD, 5) as lease:
        assert lease._resident is not None
        other = Receipt("globex", 1, "1" * 64, 99)
        if when == "before":
            lease._resident.receipt = other
            module.go.set()
        running = asyncio.create_task(inference.run(lease, ROWS))
        if when == "after":
            await asyncio.to_thread(module.entered.wait, 5)
            lease._resident.receipt = other
            module.go.set()
        with pytest.raises(IsolationBroken, match=when):
            await running


async def test_promise_3_a_caller_that_goes_away_keeps_its_lease_while_the_pass_runs(
    inference: Inference,
) -> None:
    module = Gate()
    cache = cache_of(module)

    async def request() -> None:
        with await cache.lease(RECORD, 5) as lease:
            await inference.run(lease, ROWS)

    running = asyncio.create_task(request())
    await asyncio.to_thread(module.entered.wait, 5)
    running.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert cache.snapshot()[0].leases == 1, "the lease ended while its model was running"
    module.go.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert cache.snapshot()[0].leases == 0


async def test_the_event_loop_goes_on_while_a_pass_runs(inference: Inference) -> None:
    module = Gate()
    with await cache_of(module).lease(RECORD, 5) as lease:
        running = asyncio.create_task(inference.run(lease, ROWS))
        await asyncio.to_thread(module.entered.wait, 5)
        assert not running.done()
        module.go.set()
        await running
