"""What a replica counts, and writes: nothing twice, nothing lost but what it had not written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flatshare.replica import usage
from flatshare.replica.usage import UsageCounter
from flatshare.weights.tiers import Tier
from flatshare_registry import layout
from flatshare_registry.errors import Corrupt, Unavailable
from flatshare_registry.records import VersionRecord
from flatshare_registry.stores.base import BlobMeta, Overwrite, PutMode
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.usage import KEPT, OTHERS, Used, UsedVersion, old_usage, read_usage

NOON = datetime(2026, 11, 27, 12, 30, tzinfo=UTC)


def version(tenant: str, number: int = 1) -> VersionRecord:
    return cast("VersionRecord", SimpleNamespace(tenant=tenant, version=number))


class FlakyStore(MemoryStore):
    """Refuses what is put while it is down."""

    down = False
    puts = 0

    def put(self, key: str, data: bytes | memoryview, mode: PutMode) -> BlobMeta:
        if self.down:
            raise Unavailable("down")
        self.puts += 1
        return super().put(key, data, mode)


class World:
    """A store, replicas that count, and a clock."""

    def __init__(self) -> None:
        self.store = FlakyStore()
        self.now = NOON
        self.threads = ThreadPoolExecutor(1)

    def counter(self, name: str, interval_s: float = 60) -> UsageCounter:
        return UsageCounter(self.store, name, self.threads, interval_s, clock=lambda: self.now.timestamp())

    def read(self, hours: int = 0) -> dict[UsedVersion, Used]:
        return read_usage(self.store, self.now - timedelta(hours=hours), self.now)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.threads.shutdown()


def answer(counter: UsageCounter, record: VersionRecord, tier: Tier = Tier.DEVICE, *labels: int) -> None:
    counter.answered(record, tier, 0.25, labels or (3,), 100, 10)


async def test_what_is_written_again_counts_once_and_replicas_add_up(world: World) -> None:
    one, two = world.counter("one"), world.counter("two")
    answer(one, version("acme"), Tier.STORE, 1, 1, 9)
    one.failed(version("acme"))
    await one.write()
    await one.write()
    assert world.store.puts == 1, "nothing changed"
    answer(one, version("acme"))
    answer(two, version("acme"))
    answer(two, version("acme", 2))
    await one.write()
    await two.write()
    assert world.read() == {
        UsedVersion("acme", 1): Used(3, 1, 5, 1, 300, 0.75, [0, 2, 0, 2, 0, 0, 0, 0, 0, 1]),
        UsedVersion("acme", 2): Used(1, 0, 1, 0, 100, 0.25, [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]),
    }


async def test_an_hour_that_ends_is_written_and_a_store_that_is_down_gets_it_later(world: World) -> None:
    counter = world.counter("one")
    answer(counter, version("acme"))
    world.store.down = True
    await counter.write()
    world.now += timedelta(hours=1)
    answer(counter, version("acme"))  # counted before the look at the clock: this is the last hour's yet
    await counter.write()
    answer(counter, version("acme"))
    world.now += timedelta(hours=1)
    await counter.write()
    world.store.down = False
    await counter.write()
    hours = [one.key.split("/")[1] for one in world.store.list(layout.USAGE)]
    assert hours == ["2026-11-27T12", "2026-11-27T13"]
    assert world.read(2)[UsedVersion("acme", 1)].requests == 3
    assert world.read(1)[UsedVersion("acme", 1)].requests == 1, "of whole hours since"
    assert world.read() == {}
    assert old_usage(world.store, NOON + KEPT) == []
    old = old_usage(world.store, NOON + KEPT + timedelta(hours=1))
    assert [key.split("/")[1] for key in old] == ["2026-11-27T12"]


async def test_the_last_minute_is_written_at_the_end_and_nothing_where_it_is_off(world: World) -> None:
    counter, off = world.counter("one"), world.counter("off", 0)
    for each in (counter, off):
        each.start()
        answer(each, version("acme"))
        await each.close()
    assert world.read() == {
        UsedVersion("acme", 1): Used(1, 0, 1, 0, 100, 0.25, [0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    }


async def test_a_write_that_is_cut_off_is_made_at_the_end(world: World) -> None:
    counter = world.counter("one", 0.001)
    going, go = threading.Event(), threading.Event()
    world.threads.submit(lambda: (going.set(), go.wait(10)))
    going.wait(10)
    counter.start()
    answer(counter, version("acme"))
    while counter._changed:  # until a write is under way, behind what the thread does
        await asyncio.sleep(0.001)
    closing = asyncio.create_task(counter.close())
    await asyncio.sleep(0)
    go.set()
    await closing
    assert world.read()[UsedVersion("acme", 1)].requests == 1


async def test_a_clock_that_is_set_back_overwrites_nothing(world: World) -> None:
    counter = world.counter("one")
    answer(counter, version("acme"))
    answer(counter, version("acme"))
    await counter.write()
    world.now += timedelta(hours=1)
    await counter.write()
    world.now -= timedelta(hours=1)
    answer(counter, version("acme"))
    await counter.write()
    world.now += timedelta(hours=1)
    assert world.read(1)[UsedVersion("acme", 1)].requests == 3


async def test_stores_list_in_any_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = world.counter("one")
    for _ in range(3):
        answer(counter, version("acme"))
        await counter.write()
        world.now += timedelta(hours=1)
        await counter.write()
    listed = world.store.list
    monkeypatch.setattr(
        world.store,
        "list",
        lambda prefix, after="": iter(
            sorted(listed(prefix, after=after), key=lambda one: one.key, reverse=True)
        ),
    )
    world.now -= timedelta(hours=2)
    assert world.read(1)[UsedVersion("acme", 1)].requests == 2


async def test_memory_is_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_VERSIONS", 2)
    counter = world.counter("one")
    for name in ("a", "b", "c", "d", "a"):
        counter.answered(version(name), Tier.DEVICE, 0.25, (5, 400, 5), 100, usage.MAX_LABELS + 1)
    await counter.write()
    found = {key.tenant: used.requests for key, used in world.read().items()}
    assert found == {"a": 2, "b": 1, OTHERS: 2}
    assert world.read()[UsedVersion("a", 1)].labels == [], "all of them or none"


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"format":2,"tenants":{}}', b'{"format":1,"tenants":{"a":{"1":[1]}}}'])  # fmt: skip
def test_what_no_replica_wrote_is_said(world: World, data: bytes) -> None:
    world.store.put(layout.usage_key(NOON, "odd"), data, Overwrite())
    if b'"1":[1]' in data:
        assert world.read()[UsedVersion("a", 1)].requests == 1, "fields that a release does not know are 0"
        return
    with pytest.raises(Corrupt, match="odd"):
        world.read()


def test_statuses_are_counted(world: World) -> None:
    counter = world.counter("one")
    for status in (200, 200, 429):
        counter.replied(status)
    assert counter.stats.statuses == {200: 2, 429: 1}
    assert cast("Any", counter.stats.durations)[Tier.DEVICE].seconds == 0
