"""The change feed as a replica follows it: one look for all tenants, and no change that it hides for longer."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from flatshare.resolution import changes, heads
from flatshare.resolution.changes import FAILED_S, GAP_S
from flatshare.resolution.heads import KEYS_AFTER_TTLS, REREAD_TTLS, STALE_AFTER_TTLS, TenantHeads
from flatshare_registry import layout
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import NotFound, Unavailable
from flatshare_registry.feed import ANNOUNCED_S, LATE_S, OVERLAP_S
from flatshare_registry.heads import HeadStore
from flatshare_registry.ids import TenantId
from flatshare_registry.records import Quotas
from flatshare_registry.stores.base import Create, UpdateIf
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import FaultyStore, ManualClock

from .conftest import ACME, TTL_S, World

OTHERS = [TenantId(f"t{number}") for number in range(20)]


async def known(world: World) -> None:
    """The view knows all tenants, and follows the feed."""
    for tenant in OTHERS:
        world.registry.create_tenant(tenant)
    for tenant in [ACME, *OTHERS]:
        await world.heads.head(tenant)
    await world.behind()
    world.reads.clear()
    world.looks.clear()


async def used(world: World) -> None:
    """All heads are asked for once, and what runs behind ends."""
    for tenant in [ACME, *OTHERS]:
        world.heads.head_now(tenant)
    await world.behind()


async def test_one_look_renews_all_heads(world: World) -> None:
    await known(world)
    for _ in range(8):
        world.clock.advance(TTL_S * 1.1)
        await used(world)
    assert (len(world.looks), world.reads) == (8, [])
    assert world.heads.unconfirmed_s(ACME) < TTL_S


async def test_what_is_announced_is_read_and_nothing_else(world: World) -> None:
    await known(world)
    world.registry.tenancy.set_quotas(OTHERS[3], Quotas(burst=7))
    world.clock.advance(TTL_S * 1.1)
    await used(world)
    assert world.reads == [layout.head_key(OTHERS[3])]
    head = world.heads.head_now(OTHERS[3])
    assert head is not None
    assert head.quotas.burst == 7
    world.clock.advance(TTL_S * 1.1)
    await used(world)
    assert len(world.reads) == 1, "its revision is there"


async def test_a_swap_that_comes_after_its_announcement_was_seen_is_seen_too(world: World) -> None:
    """Announce, look, swap: the head is read at every turn until the revision is there."""
    await known(world)
    store = world.registry.store
    heads = HeadStore(store, "somebody", world.clock)
    old = store.get(layout.head_key(ACME))
    heads.feed._clock = world.registry.feed._clock
    head = heads.read(ACME)
    heads.feed.announce(ACME, head.revision + 1)
    for _ in range(3):
        world.clock.advance(TTL_S * 1.1)
        await used(world)
    assert world.reads == [layout.head_key(ACME)] * 3
    later = head.model_copy(update={"revision": head.revision + 1, "quotas": Quotas(burst=9)})
    store.put(layout.head_key(ACME), later.encode(), UpdateIf(old.meta.etag))
    world.clock.advance(TTL_S * 1.1)
    await used(world)
    found = world.heads.head_now(ACME)
    assert found is not None
    assert found.quotas.burst == 9


async def test_a_writer_that_died_is_not_waited_for_for_ever(world: World) -> None:
    await known(world)
    world.registry.feed.announce(ACME, 1_000)
    for _ in range(int(ANNOUNCED_S / TTL_S) + 2):
        world.clock.advance(TTL_S * 1.1)
        await used(world)
    world.reads.clear()
    for _ in range(5):
        world.clock.advance(TTL_S * 1.1)
        await used(world)
    assert len([key for key in world.reads if key == layout.head_key(ACME)]) <= 1, (
        "the read of every REREAD_TTLS"
    )


async def test_a_head_that_comes_between_announcement_and_swap_is_read_again(world: World) -> None:
    """First asked for after the announcement was seen: what was read then is not believed for longer."""
    await known(world)
    late = TenantId("late")
    world.registry.create_tenant(late)
    world.registry.feed.announce(late, 2)
    world.clock.advance(TTL_S * 1.1)
    await used(world)
    assert (await world.heads.head(late)).revision == 1
    world.registry.tenancy.set_quotas(late, Quotas(burst=3))
    for _ in range(2):
        world.clock.advance(TTL_S * 1.1)
        world.heads.head_now(late)
        await world.behind()
    head = world.heads.head_now(late)
    assert head is not None
    assert head.quotas.burst == 3


async def test_an_unknown_tenant_that_is_announced_is_asked_for_again(world: World) -> None:
    await known(world)
    new = TenantId("new")
    world.clock.advance(TTL_S * 0.9)
    with pytest.raises(NotFound):
        await world.heads.head(new)
    world.registry.create_tenant(new)
    world.clock.advance(TTL_S * 0.2)  # the next look, and not the end of its own time
    await used(world)
    assert (await world.heads.head(new)).tenant == "new"


async def test_a_store_without_after_costs_a_read_a_tenant_and_is_told_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A store of an operator's own, written before there was a feed."""
    store = world.heads._registry.feed._store

    class Old(FaultyStore):
        def list(self, prefix: str) -> Iterator[object]:  # type: ignore[override]
            return iter(())

    world.heads._registry.feed._store = Old(store)
    for _ in range(4):
        await world.resolve()
        await world.behind()
        world.clock.advance(TTL_S * 1.5)
    world.publish(2)
    for _ in range(2):
        await world.resolve()
        await world.behind()
    assert await world.resolve() == 2
    assert caplog.text.count("can't be read") == 1


async def test_a_feed_that_cannot_be_listed_costs_a_read_a_tenant(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A role without the right to list, say: as before there was a feed."""
    await known(world)
    before = world.heads._registry.feed._store

    class Deaf(FaultyStore):
        def list(self, prefix: str, *, after: str = "") -> Iterator[object]:  # type: ignore[override]
            raise Unavailable("AccessDenied")

    world.heads._registry.feed._store = Deaf(before)
    for _ in range(3):
        world.clock.advance(TTL_S * 2.2)
        await used(world)
        await used(world)
    assert len(world.reads) >= 3 * len(OTHERS)
    assert caplog.text.count("can't be read") == 1
    world.heads._registry.feed._store = before
    world.clock.advance(TTL_S * 1.1)
    await used(world)
    await used(world)
    world.reads.clear()
    world.clock.advance(TTL_S * 1.1)
    await used(world)
    assert world.reads == [], "and a feed that is back is followed again"


async def test_after_a_gap_no_old_head_is_believed_for_the_feeds_sake(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "GAP_S", TTL_S * 3)  # long before a head is read again in any case
    await known(world)
    world.clock.advance(TTL_S * 3 + 0.1)
    store, key = world.registry.store, layout.head_key(ACME)
    # A change whose announcement is out of sight by now: as after hours in which nobody asked.
    world.publish(2)
    for meta in list(store.list(layout.CHANGES)):
        store.delete(meta.key)
    world.heads.head_now(OTHERS[0])  # somebody else's request follows the feed again
    await world.behind()
    assert key not in world.reads
    await used(world)
    assert key in world.reads
    assert await world.resolve() == 2


async def test_a_writer_whose_clock_is_far_behind_is_seen_after_a_while(world: World) -> None:
    await known(world)
    slow = Registry(world.registry.store, clock=lambda: 1e9)
    slow.tenancy.set_quotas(ACME, Quotas(burst=5))
    for _ in range(REREAD_TTLS + 1):
        world.clock.advance(TTL_S)
        await used(world)
    head = world.heads.head_now(ACME)
    assert head is not None
    assert head.quotas.burst == 5


async def test_a_look_that_is_cancelled_before_it_begins_is_made_again(world: World) -> None:
    await known(world)
    world.clock.advance(TTL_S * 1.1)
    world.heads.head_now(ACME)
    (look,) = world.heads._changes._looks.tasks
    look.cancel()
    await world.behind()
    world.heads.head_now(ACME)
    await world.behind()
    assert len(world.looks) == 1


def test_a_late_swap_is_announced_once_more() -> None:
    clock, store = ManualClock(), MemoryStore()

    def slow(operation: str, key: str) -> None:
        if operation == "put" and key == layout.head_key(ACME):
            clock.advance(LATE_S + 1)

    Registry(FaultyStore(store, after=slow), clock=clock).create_tenant(ACME)
    assert [(one.tenant, one.revision) for one in Registry(store, clock=clock).feed.since(0)] == [
        (ACME, 1)
    ] * 2


def test_a_change_that_cannot_be_announced_is_not_made() -> None:
    store = MemoryStore()
    registry = Registry(store)
    registry.create_tenant(ACME)

    def mute(operation: str, key: str) -> None:
        if operation == "put" and key.startswith(layout.CHANGES):
            raise Unavailable("down")

    before = store.get(layout.head_key(ACME)).data
    with pytest.raises(Unavailable):
        Registry(FaultyStore(store, before=mute)).tenancy.set_quotas(ACME, Quotas(burst=7))
    assert store.get(layout.head_key(ACME)).data == before


def test_what_is_no_announcement_announces_nobody() -> None:
    store = MemoryStore()
    registry = Registry(store)
    ulid = "0" * 26
    for key in (
        "README",
        f"{ulid}.Not-An-Id.1",
        f"{ulid}.acme.x",
        f"{ulid}.acme",
        "x.acme.1",
        f"{ulid}.acme.{'9' * 99}",
    ):
        store.put(f"{layout.CHANGES}{key}", b"", Create())
    assert registry.feed.since(0) == []


@pytest.mark.parametrize("seed", range(8))
async def test_every_change_is_seen_within_the_ttl_whatever_happens(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random histories: writers at any point between announcement and swap, failing looks, clocks that differ.

    Whoever asks for a head a third time gets one that was current a TTL before the first: as without a feed.
    """
    rng = random.Random(seed)
    # Wall clocks of writers may be this far behind the replica's: what the overlap is for, less a late swap.
    most_behind = OVERLAP_S - LATE_S
    if seed % 2:  # gaps that are short beside the age at which a head is read again in any case
        most_behind = 0.0
        monkeypatch.setattr(changes, "GAP_S", TTL_S * 3)
        monkeypatch.setattr(changes, "OVERLAP_S", 0.1)
    clock, store, down = ManualClock(), MemoryStore(), threading.Event()

    def before(operation: str, key: str) -> None:
        if operation == "list" and down.is_set():
            raise Unavailable("down")

    writers = [
        Registry(store, clock=lambda lag=lag: 1e9 + clock() - lag)  # type: ignore[misc]  # a default binds
        for lag in (0.0, most_behind * 0.95, rng.uniform(0, most_behind))
    ]
    tenants = [TenantId(f"t{number}") for number in range(6)]
    history: dict[TenantId, list[tuple[float, int]]] = {}
    asked: dict[TenantId, list[float]] = {}
    for tenant in tenants:
        writers[0].create_tenant(tenant)
        history[tenant] = [(clock(), 1)]
    with ThreadPoolExecutor(4) as threads:
        view = TenantHeads(
            Registry(FaultyStore(store, before=before)), threads, ttl_s=TTL_S,
            clock=clock, wall=lambda: 1e9 + clock(),
        )  # fmt: skip
        for tenant in tenants:
            await view.head(tenant)
        for _ in range(600):
            step = rng.random()
            if step < 0.3:
                tenant, writer = rng.choice(tenants), rng.choice(writers)
                after = writer.tenancy.set_quotas(tenant, Quotas(burst=rng.randrange(1, 1_000)))
                history[tenant].append((clock(), after.revision))
            elif step < 0.34:
                (down.clear if down.is_set() else down.set)()
            pause = rng.choice([0.1, 0.5, TTL_S * 0.6, TTL_S * 1.1, TTL_S * 3.2])
            clock.advance(pause if rng.random() < 0.9 else rng.uniform(OVERLAP_S, GAP_S * 1.2))
            asked_at = clock()
            for tenant in rng.sample(tenants, 2):
                # As who checks a key asks, and as who resolves a ref: that one waits later.
                head = view._now(tenant, rng.choice([KEYS_AFTER_TTLS, STALE_AFTER_TTLS]))
                if head is None:
                    head = await view.head(tenant)
                # The ask before began a look, and where that failed the next one a read.
                asked.setdefault(tenant, []).append(asked_at)
                old = asked[tenant][-3] - TTL_S if len(asked[tenant]) > 2 else 0.0
                due = max((revision for at, revision in history[tenant] if at < old), default=0)
                assert head.revision >= due, f"{tenant} at {asked_at}: as it was before {old}"
            while tasks := [*view._reads.tasks, *view._changes._looks.tasks]:
                await asyncio.gather(*tasks, return_exceptions=True)
            for tenant in tenants:
                seen = view.last_head(tenant)
                assert seen is not None
                checked = view._heads[tenant].checked_at
                due = max((revision for at, revision in history[tenant] if at < checked), default=0)
                assert seen.revision >= due, f"{tenant} at {asked_at}: believed as of {checked}"


async def test_more_announcements_than_are_remembered_cost_a_read_of_each_head(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MAX_ANNOUNCED", 5)
    await known(world)
    for tenant in OTHERS[:3]:
        world.registry.tenancy.set_quotas(tenant, Quotas(burst=2))
    world.clock.advance(TTL_S * 1.1)
    await used(world)
    world.reads.clear()
    for tenant in OTHERS[3:6]:  # beside the three that are remembered
        world.registry.tenancy.set_quotas(tenant, Quotas(burst=2))
    world.clock.advance(TTL_S * 1.1)
    await used(world)
    await used(world)
    world.clock.advance(TTL_S * 2.2)
    await used(world)
    assert {layout.head_key(tenant) for tenant in OTHERS} <= set(world.reads)


async def test_a_look_is_not_believed_beyond_twice_the_ttl_nor_after_a_failure(world: World) -> None:
    await known(world)
    feed = world.heads._changes
    assert feed.is_followed
    world.clock.advance(TTL_S * 2)
    assert feed.is_followed
    world.clock.advance(0.01)
    assert not feed.is_followed
    await used(world)
    assert feed.is_followed
    world.clock.advance(TTL_S * 1.1)
    world.down = True
    feed.look()
    await world.behind()
    assert not feed.is_followed
    looks = len(world.looks)
    world.clock.advance(FAILED_S)
    feed.look()
    await world.behind()
    assert len(world.looks) == looks, "not at once again"
    world.clock.advance(0.01)
    world.down = False
    feed.look()
    await world.behind()
    assert len(world.looks) == looks + 1
    assert feed.is_followed


async def test_a_change_of_many_tenants_leaves_reads_for_those_that_are_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator's script promotes all of them: unknown tenants were refused until the last head was read."""
    monkeypatch.setattr(heads, "ANNOUNCED_READS", 3)
    monkeypatch.setattr(heads, "MAX_READS", 8)
    await known(world)
    for tenant in OTHERS:
        world.registry.tenancy.set_quotas(tenant, Quotas(burst=2))
    world.registry.create_tenant(TenantId("new"))
    world.clock.advance(TTL_S * 1.1)
    world.heads._changes.look()
    (look,) = world.heads._changes._looks.tasks
    await look
    assert len(world.heads._reads) <= 3
    assert (await world.heads.head(TenantId("new"))).tenant == "new"
    for tenant in OTHERS:  # the rest is read by who asks
        world.heads.head_now(tenant)
        await world.behind()
        head = world.heads.head_now(tenant)
        assert head is not None
        assert head.quotas.burst == 2


async def test_one_look_is_under_way_at_a_time_and_nobody_waits_for_it(world: World) -> None:
    await known(world)
    world.gate = threading.Event()
    world.clock.advance(TTL_S * 1.1)
    for tenant in [ACME, *OTHERS] * 2:
        assert world.heads.head_now(tenant) is not None
    world.gate.set()
    await world.behind()
    assert (len(world.looks), world.reads) == (1, [])
