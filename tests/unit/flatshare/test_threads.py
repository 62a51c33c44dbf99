"""Work that outlives its task: somebody knows of it until its thread has ended, and an erasure waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import save

from flatshare.device.cpu import CpuDevice
from flatshare.models.architecture import architecture
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.threads import ThreadWork
from flatshare.weights.device_loader import DeviceLoader
from flatshare.weights.fetch import TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.stores.base import ByteRange
from flatshare_registry.stores.memory import MemoryStore

NETWORK = architecture("mnist-cnn")


async def test_a_cancelled_task_leaves_its_thread_counted() -> None:
    work, go, began = ThreadWork(), threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        go.wait(10)

    with ThreadPoolExecutor(1) as threads:
        task = asyncio.create_task(work.run(threads, "acme", slow))
        await asyncio.to_thread(began.wait, 10)
        queued = asyncio.create_task(work.run(threads, "globex", lambda: None))
        await asyncio.sleep(0)
        for one in (task, queued):
            one.cancel()
        await asyncio.gather(task, queued, return_exceptions=True)
        assert await work.ended("globex", 0.01), "it was cancelled before it began"
        assert not await work.ended("acme", 0.01)
        waiting = asyncio.create_task(work.ended("acme", 10))
        await asyncio.sleep(0)
        go.set()
        assert await waiting
        assert await work.ended("acme", 0)


async def test_who_stopped_stays_stopped() -> None:
    work = ThreadWork()
    assert not work.is_stopped("acme")
    work.stop("acme")
    assert work.is_stopped("acme")
    assert not work.is_stopped("globex")


class SlowStore(MemoryStore):
    """A store whose answer has begun, and whose bytes come when the test lets them."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = threading.Event(), threading.Event()

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        pieces = list(super().chunks(key, byte_range))
        self.asked.set()
        assert self.go.wait(20)
        return iter(pieces)


async def test_an_erasure_waits_for_the_thread_of_a_load_that_was_given_up(tmp_path: Path) -> None:
    """The load's task has timed out and is forgotten; its thread goes on, and would publish the tenant's tensors."""
    store = SlowStore()
    registry = Registry(store)
    registry.create_tenant(TenantId("acme"))
    record = registry.register(
        TenantId("acme"), save(dict(NETWORK.build().state_dict())), NETWORK.name, NETWORK.tensors
    ).version
    tier = HostTier(tmp_path, 10**9)
    with ThreadPoolExecutor(1) as threads, ThreadPoolExecutor(1) as local:
        cache = ModelCache(
            ledger=Ledger(4, None),
            loader=DeviceLoader(TensorSource(store, tier), CpuDevice(), threads, local),
            fetch_timeout_s=0.05,
        )
        with pytest.raises(Unavailable):
            await cache.lease(record, 10)
        assert store.asked.is_set()
        assert cache.loading == []
        cache.erase("acme")
        assert not await cache.erased("acme", 0.05), "its thread still has the weights in its hands"
        store.go.set()
        assert await cache.erased("acme", 10)
        assert not any(tier.has(one.sha256) for one in record.tensors)
