"""When a key was used last: one small write a key and hour, and a store that is down costs a note only."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from flatshare.replica.key_use import KeyUse
from flatshare_registry import Registry, TenantId
from flatshare_registry.errors import Unavailable
from flatshare_registry.records import utc
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import FaultyStore, ManualClock

ACME = TenantId("acme")


def test_one_note_an_hour_whatever_the_store_says() -> None:
    clock = ManualClock(1_700_000_000.0)
    puts: list[str] = []
    down = True

    def before(operation: str, key: str) -> None:
        if operation == "put" and "/used/" in key:
            puts.append(key)
            if down:
                raise Unavailable("down")

    registry = Registry(MemoryStore())
    registry.create_tenant(ACME)
    made = registry.tenancy.create_key(ACME)
    key = registry.head(ACME).keys[made.id]
    with ThreadPoolExecutor(1) as threads:
        use = KeyUse(FaultyStore(registry.store, before=before), threads, clock)

        def done() -> int:
            threads.submit(lambda: None).result()
            return len(puts)

        use(ACME, key)
        assert done() == 1
        assert registry.tenancy.last_used(ACME) == {}
        for _ in range(100):
            use(ACME, key)
        assert done() == 1, "a lost note is written in the next hour"
        down = False
        clock.advance(3600)
        for _ in range(100):
            use(ACME, key)
        assert done() == 2
        assert registry.tenancy.last_used(ACME) == {made.id: utc((1_700_000_000 + 3600) // 3600 * 3600)}


def test_when_the_store_is_slow_notes_are_left_out_and_come_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flatshare.replica.key_use.MAX_WAITING", 3)
    go_on = threading.Event()
    puts: list[str] = []

    def before(operation: str, key: str) -> None:
        if operation == "put" and "/used/" in key:
            go_on.wait(10)
            puts.append(key)

    registry = Registry(MemoryStore())
    registry.create_tenant(ACME)
    made = [registry.tenancy.create_key(ACME) for _ in range(10)]
    keys = registry.head(ACME).keys
    with ThreadPoolExecutor(1) as threads:
        use = KeyUse(FaultyStore(registry.store, before=before), threads, ManualClock())
        for one in made:
            use(ACME, keys[one.id])
        go_on.set()
        for _ in range(20):
            threads.submit(lambda: None).result()
            for one in made:
                use(ACME, keys[one.id])
        threads.submit(lambda: None).result()
    assert len(puts) == 10, "each key once, in the end"


async def test_nothing_is_written_of_a_tenant_that_is_erased() -> None:
    """A note that waits for its thread is dropped, one that is being written is waited for."""
    registry = Registry(MemoryStore())
    tenant = TenantId("acme")
    registry.create_tenant(tenant)
    keys = [registry.tenancy.create_key(tenant) for _ in range(2)]
    found = list(registry.head(tenant).keys.values())
    writing, go = threading.Event(), threading.Event()

    def before(operation: str, key: str) -> None:
        writing.set()
        assert go.wait(10)

    with ThreadPoolExecutor(1) as threads:
        use = KeyUse(FaultyStore(registry.store, before=before), threads, ManualClock())
        for key in found:
            use(tenant, key)
        await asyncio.to_thread(writing.wait, 10)
        assert not await use.stop(tenant, 0.01)
        go.set()
        assert await use.stop(tenant, 10)
    assert len(registry.tenancy.last_used(tenant)) == 1 < len(keys)
