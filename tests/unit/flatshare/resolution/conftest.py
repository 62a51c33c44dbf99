"""For the tests of the registry view: a view on a store whose reads are counted, held back, or fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from flatshare.resolution.heads import TenantHeads
from flatshare_registry import layout
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Unavailable
from flatshare_registry.ids import PRODUCTION, ModelRef, TenantId
from flatshare_registry.records import TenantHead
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import FaultyStore, ManualClock
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights

ACME = TenantId("acme")
TTL_S = 2.0


class World:
    """A registry with one model behind a store of this kind, and a view on it.

    Attributes
    ----------
    registry
        Reads and writes the store itself, whatever the view's reads do.
    reads
        Keys that the view has asked the store for.
    looks
        Its looks at the change feed.
    down
        Its reads fail.
    gate
        Its reads wait for it.
    told
        Changes that the view told: heads before and after.
    """

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.reads: list[str] = []
        self.looks: list[str] = []
        self.down = False
        self.gate: threading.Event | None = None
        self.clock = ManualClock()
        store = MemoryStore()
        self.registry = Registry(store)
        self.registry.create_tenant(ACME)
        self.publish(1)
        self.told: list[tuple[TenantHead | None, TenantHead | None]] = []
        self.heads = TenantHeads(
            Registry(FaultyStore(store, before=self._before)), threads, ttl_s=TTL_S, clock=self.clock,
            on_change=lambda old, new: self.told.append((old, new)),
        )  # fmt: skip

    def _before(self, operation: str, key: str) -> None:
        (self.looks if key == layout.CHANGES else self.reads).append(key)
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.down:
            raise Unavailable("down")

    def publish(self, value: float, promote: bool = True) -> int:
        done = self.registry.register(
            ACME, tiny_weights(value), "tiny", TINY_SPECS, alias=PRODUCTION if promote else None
        )
        return done.version.version

    async def resolve(self, text: str = "acme") -> int:
        return (await self.heads.resolve(ModelRef.parse(text), 5)).version

    async def reading(self) -> None:
        """Wait until a read is under way that was not before."""
        seen = len(self.reads)
        while len(self.reads) == seen:
            await asyncio.sleep(0.001)

    async def behind(self) -> None:
        """Wait for reads that nobody waits for."""
        while tasks := [*self.heads._reads.tasks, *self.heads._changes._looks.tasks]:
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def world() -> Iterator[World]:
    with ThreadPoolExecutor(4) as threads:
        world = World(threads)
        yield world
        if world.gate is not None:
            world.gate.set()
