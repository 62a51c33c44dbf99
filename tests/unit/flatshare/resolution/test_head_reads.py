"""Reads of the registry under way: what an erasure makes of them, how many there may be, what a failed one leaves."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flatshare.resolution import heads as view_module
from flatshare.resolution.heads import FAILED_S, KEYS_AFTER_TTLS, RECHECK_S, STALE_AFTER_TTLS, TenantHeads
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import NotFound, Unavailable
from flatshare_registry.ids import PRODUCTION, ModelRef, TenantId
from flatshare_registry.records import TenantHead
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import FaultyStore
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights

from .conftest import ACME, TTL_S, World


@pytest.mark.parametrize("ask", ["head", "resolve"])
async def test_a_read_that_finds_no_change_after_the_tenant_was_forgotten_gives_nobody_its_head(
    world: World, ask: str
) -> None:
    """An erasure forgets first; a conditional read may have been on its way since before."""
    await world.heads.head(ACME)
    world.clock.advance(TTL_S * STALE_AFTER_TTLS + 1)
    world.gate = threading.Event()
    calls: dict[str, Any] = {
        "head": lambda: world.heads.head(ACME), "resolve": lambda: world.heads.resolve(ModelRef.parse("acme"), 5)
    }  # fmt: skip
    waiting = [asyncio.create_task(calls[ask]()) for _ in range(2)]
    await world.reading()
    world.heads.forget(ACME)
    world.gate.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in answers] == [NotFound, NotFound]
    assert world.heads.last_head(ACME) is None


async def test_a_head_that_made_room_for_others_during_a_read_of_it_is_not_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody erased it: it was only the longest unused."""
    monkeypatch.setattr(view_module, "MAX_HEADS", 1)
    with ThreadPoolExecutor(4) as threads:
        world = World(threads)
        world.registry.create_tenant(TenantId("globex"))
        head = await world.heads.head(ACME)
        world.clock.advance(TTL_S * STALE_AFTER_TTLS + 1)
        held = world.gate = threading.Event()
        waiting = asyncio.create_task(world.heads.head(ACME))
        await world.reading()
        world.gate = None
        await world.heads.head(TenantId("globex"))
        assert world.heads.last_head(ACME) is None
        held.set()
        assert await waiting == head


async def test_forgetting_forgets_heads_and_records_and_tells_once(world: World) -> None:
    await world.heads.resolve(ModelRef.parse("acme"), 5)
    world.told.clear()
    world.heads.forget(ACME)
    world.heads.forget(ACME)
    assert [(old is not None and old.tenant, new) for old, new in world.told] == [("acme", None)]
    assert (world.heads.last_head(ACME), world.heads.resolve_now(ModelRef.parse("acme"))) == (None, None)
    before = len(world.reads)
    await world.heads.resolve(ModelRef.parse("acme"), 5)
    assert len(world.reads) == before + 2, "neither its head nor its record was kept"


async def test_a_full_read_that_was_on_its_way_is_not_remembered_after_the_tenant_was_forgotten(
    world: World,
) -> None:
    world.gate = threading.Event()
    waiting = asyncio.create_task(world.heads.head(ACME))
    await world.reading()
    world.heads.forget(ACME)
    world.gate.set()
    await asyncio.gather(waiting, return_exceptions=True)
    assert (world.heads.last_head(ACME), world.told) == (None, [])


async def test_the_last_head_is_known_however_old_and_whether_the_store_is_there_or_not(world: World) -> None:
    """Caps and floors of the device hang on it."""
    assert world.heads.last_head(ACME) is None
    head = await world.heads.head(ACME)
    world.down = True
    world.clock.advance(1e6)
    assert world.heads.last_head(ACME) is head


async def test_junk_tenants_can_have_only_so_many_reads_under_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_module, "MAX_READS", 3)
    await world.heads.head(ACME)
    world.gate = threading.Event()
    junk = [asyncio.create_task(world.heads.head(TenantId(f"junk-{number}"))) for number in range(3)]
    for _ in range(5):
        await asyncio.sleep(0)
    for number in (3, 4):
        with pytest.raises(Unavailable, match="too many tenants wait"):
            await world.heads.head(TenantId(f"junk-{number}"))
    again = asyncio.create_task(world.heads.head(TenantId("junk-0")))  # to join a read is no new one
    await asyncio.sleep(0)
    assert not again.done()
    world.clock.advance(TTL_S + 0.1)
    before = len(world.reads)
    assert world.heads.head_now(ACME) is not None, "who is known goes on, and is not read behind now"
    await asyncio.sleep(0.02)
    assert len(world.reads) <= max(before, 1 + 3)
    world.gate.set()
    answers = await asyncio.gather(*junk, again, return_exceptions=True)
    assert [type(one) for one in answers] == [NotFound] * 4
    with pytest.raises(NotFound):
        await world.heads.head(TenantId("junk-5"))


async def test_a_refresh_asks_again_what_failed_or_was_missing_a_moment_ago(world: World) -> None:
    """Of this tenant: others' failures stay remembered."""
    other, new = TenantId("globex"), TenantId("initech")
    world.registry.create_tenant(other)
    world.down = True
    for tenant in (ACME, other):
        with pytest.raises(Unavailable):
            await world.heads.head(tenant)
    world.down = False
    with pytest.raises(NotFound):
        await world.heads.head(new)
    with pytest.raises(Unavailable):
        await world.heads.head(ACME)  # remembered
    assert await world.heads.refresh(ACME) is not None
    world.heads.forget(ACME)
    await world.heads.head(ACME)
    with pytest.raises(Unavailable):
        await world.heads.head(other)
    world.registry.create_tenant(new)
    assert await world.heads.refresh(new) is not None
    world.clock.advance(FAILED_S + 0.01)
    await world.heads.head(other)


async def test_a_refresh_asks_again_for_a_record_that_failed(world: World) -> None:
    await world.heads.head(ACME)
    world.down = True
    ref = ModelRef.parse("acme")
    with pytest.raises(Unavailable):
        await world.heads.resolve(ref, 5)
    world.down = False
    with pytest.raises(Unavailable):
        await world.heads.resolve(ref, 5)  # remembered
    await world.heads.refresh(ACME)
    assert (await world.heads.resolve(ref, 5)).version == 1


async def test_a_refresh_of_a_tenant_whose_record_can_not_be_read_still_tells_its_head(world: World) -> None:
    before = world.heads._registry.record

    def unreadable(head: TenantHead, number: int) -> Any:
        raise Unavailable("the record is elsewhere")

    world.heads._registry.record = unreadable  # type: ignore[method-assign]  # only heads are read
    head = await world.heads.refresh(ACME)
    assert head is not None and head.aliases == {str(PRODUCTION): 1}
    world.heads._registry.record = before  # type: ignore[method-assign]


async def test_reads_that_nobody_waits_for_and_that_fail_are_no_forgotten_errors(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio reports an exception that nobody looked at when its task is collected."""
    import gc

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    await world.heads.resolve(ModelRef.parse("acme"), 5)
    world.clock.advance(TTL_S + 0.1)
    world.down = True
    before = len(world.reads)
    for _ in range(2):  # a look at the change feed, and where that fails a read of the head
        assert world.heads.head_now(ACME) is not None
        await world.behind()
    assert (len(world.looks), len(world.reads)) == (2, before + 1)
    world.clock.advance(FAILED_S / 2)
    assert world.heads.head_now(ACME) is not None
    await world.behind()
    assert (len(world.looks), len(world.reads)) == (2, before + 1), (
        "what failed a moment ago is not tried again"
    )
    gc.collect()
    await asyncio.sleep(0)
    assert reported == []


async def test_whose_key_is_good_is_believed_for_a_shorter_time_than_what_a_ref_means(world: World) -> None:
    await world.heads.resolve(ModelRef.parse("acme"), 5)
    world.down = True
    world.clock.advance(TTL_S * KEYS_AFTER_TTLS)
    assert world.heads.head_now(ACME) is not None
    world.clock.advance(0.1)
    assert world.heads.head_now(ACME) is None
    assert world.heads.resolve_now(ModelRef.parse("acme")) is not None
    world.clock.advance(TTL_S * (STALE_AFTER_TTLS - KEYS_AFTER_TTLS))
    assert world.heads.resolve_now(ModelRef.parse("acme")) is None


async def test_a_record_by_number_is_read_once_and_an_unknown_number_is_not_found(world: World) -> None:
    assert (await world.heads.record(ACME, 1)).name == "acme@1"
    before = len(world.reads)
    assert (await world.heads.record(ACME, 1)).name == "acme@1"
    with pytest.raises(NotFound, match="acme has no version 2"):
        await world.heads.record(ACME, 2)
    assert len(world.reads) == before


async def test_an_older_answer_that_comes_home_last_does_not_undo_a_newer_one(world: World) -> None:
    head = await world.heads.head(ACME)
    world.registry.register(ACME, tiny_weights(2), "tiny", TINY_SPECS, alias=PRODUCTION)
    newer = await world.heads.refresh(ACME)
    assert newer is not None and newer.revision > head.revision
    world.heads._registry.head_unless = lambda tenant, etag: (head, "an older etag")  # type: ignore[method-assign]
    world.clock.advance(TTL_S * STALE_AFTER_TTLS + 1)
    assert (await world.heads.head(ACME)).revision == newer.revision
    assert world.heads.last_head(ACME) is newer


async def test_a_read_that_was_true_before_a_refresh_does_not_bring_a_deleted_tenant_back() -> None:
    """It has its answer, and comes home after the refresh that found the tenant gone."""
    late, answered = threading.Event(), threading.Event()
    store, first = MemoryStore(), [True]
    registry = Registry(store)
    registry.create_tenant(ACME)

    def after(operation: str, key: str) -> None:
        if operation == "get" and first and first.pop():
            answered.set()
            assert late.wait(10)

    with ThreadPoolExecutor(2) as threads:
        view = TenantHeads(Registry(FaultyStore(store, after=after)), threads, ttl_s=TTL_S)
        early = asyncio.create_task(view.head(ACME))
        await asyncio.to_thread(answered.wait, 10)
        registry.delete_tenant(ACME)
        assert await view.refresh(ACME) is None
        late.set()
        await asyncio.gather(early, return_exceptions=True)
        assert view.last_head(ACME) is None
        with pytest.raises(NotFound):
            await view.head(ACME)


async def test_that_there_is_no_such_alias_is_believed_for_its_time_and_then_looked_up(world: World) -> None:
    await world.heads.head(ACME)
    canary = ModelRef.parse("acme:canary")
    before = len(world.reads)
    world.clock.advance(RECHECK_S)
    for _ in range(3):
        with pytest.raises(NotFound, match="no alias canary"):
            world.heads.resolve_now(canary)
        with pytest.raises(NotFound, match="no alias canary"):
            await world.heads.resolve(canary, 5)
    assert len(world.reads) == before
    world.clock.advance(0.001)
    assert world.heads.resolve_now(canary) is None
    with pytest.raises(NotFound, match="no alias canary"):
        await world.heads.resolve(canary, 5)
    assert len(world.reads) == before + 1


async def test_a_head_whose_keys_can_still_be_believed_is_not_waited_for(world: World) -> None:
    head = await world.heads.head(ACME)
    before = len(world.reads)
    world.clock.advance(TTL_S * KEYS_AFTER_TTLS)
    assert await world.heads.head(ACME) is head
    assert len(world.reads) == before
    world.clock.advance(0.01)
    await world.heads.head(ACME)
    assert len(world.reads) == before + 1


async def test_to_forget_one_tenant_forgets_nothing_of_another(world: World) -> None:
    other = TenantId("globex")
    world.registry.create_tenant(other)
    world.registry.register(other, tiny_weights(1), "tiny", TINY_SPECS)
    for text in ("acme", "globex"):
        await world.heads.resolve(ModelRef.parse(text), 5)
    world.heads.forget(ACME)
    assert world.heads.resolve_now(ModelRef.parse("globex")) is not None
    assert world.heads.last_head(other) is not None


async def test_reads_that_their_callers_left_or_that_are_cancelled_are_no_forgotten_errors(
    world: World,
) -> None:
    import gc

    reported: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: reported.append(context))
    await world.heads.head(ACME)
    world.gate = threading.Event()
    with pytest.raises(Unavailable, match="did not answer within"):  # the record's read goes on
        await world.heads.resolve(ModelRef.parse("acme"), 0.02)
    world.down = True
    world.gate.set()
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0.001)
    world.down, world.gate = False, threading.Event()
    globex = TenantId("globex")
    for asked in (world.heads.head(globex), world.heads.record(ACME, 1)):
        world.clock.advance(FAILED_S + 0.01)
        caller = asyncio.create_task(asked)
        await world.reading()
        for task in asyncio.all_tasks() - {caller, asyncio.current_task()}:
            task.cancel()  # as a loop that ends does
        await asyncio.gather(caller, return_exceptions=True)
    world.gate.set()
    gc.collect()
    await asyncio.sleep(0.01)
    assert reported == []
