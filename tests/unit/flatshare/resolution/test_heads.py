"""The registry view: fresh, stale, missing, and a store that is down."""

from __future__ import annotations

import asyncio
import threading

import pytest

from flatshare.resolution import heads as view_module
from flatshare.resolution.trust import TrustedHeads
from flatshare_registry import layout
from flatshare_registry.errors import Corrupt, NotFound, Unavailable
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.stores.base import Overwrite

from .conftest import ACME, World

REF = ModelRef.parse("acme")


async def test_a_fresh_answer_costs_no_request(world: World) -> None:
    assert await world.resolve() == 1
    reads = len(world.reads)
    for _ in range(100):
        record = world.heads.resolve_now(REF)
        assert record is not None
        assert record.version == 1
    assert len(world.reads) == reads == 2  # the head and the version record, once


async def test_a_stale_answer_is_given_once_more_and_renewed_behind(world: World) -> None:
    await world.resolve()
    world.publish(2)
    world.clock.advance(2.5)
    assert await world.resolve() == 1
    await world.behind()
    assert await world.resolve() == 2
    assert len(world.told) == 2


async def test_a_very_old_answer_is_read_again_first(world: World) -> None:
    await world.resolve()
    world.publish(2)
    world.clock.advance(2.0 * 15 + 1)
    assert await world.resolve() == 2


async def test_an_unchanged_head_is_one_conditional_request(world: World) -> None:
    await world.resolve()
    world.clock.advance(100)
    before = len(world.reads)
    assert await world.resolve() == 1
    assert len(world.reads) == before + 1  # the version record is immutable, so never again
    assert len(world.told) == 1


async def test_a_refresh_sees_a_promotion_at_once(world: World) -> None:
    await world.resolve()
    world.publish(2)
    head = await world.heads.refresh(ACME)
    assert head is not None
    assert await world.resolve() == 2


async def test_a_refresh_does_not_join_a_read_that_began_before_it(world: World) -> None:
    world.gate = threading.Event()
    early = asyncio.create_task(world.heads.resolve(REF, 5))
    while not world.reads:
        await asyncio.sleep(0)
    world.publish(2)  # lands while the early read is under way
    refreshing = asyncio.create_task(world.heads.refresh(ACME))
    await asyncio.sleep(0)
    world.gate.set()
    head = await refreshing
    assert head is not None
    assert head.aliases["production"] == 2
    await early
    assert await world.resolve() == 2


async def test_unknown_tenants_are_remembered_for_one_ttl(world: World) -> None:
    for _ in range(50):
        with pytest.raises(NotFound):
            await world.resolve("nobody")
    assert len(world.reads) == 1
    world.clock.advance(2.1)
    with pytest.raises(NotFound):
        await world.resolve("nobody")
    assert len(world.reads) == 2
    with pytest.raises(NotFound):
        await world.resolve("acme:canary")
    world.registry.create_tenant(TenantId("nobody"))
    await world.heads.refresh(TenantId("nobody"))
    with pytest.raises(NotFound, match="no alias"):
        await world.resolve("nobody")


async def test_a_version_registered_a_moment_ago_is_found_at_its_first_request(world: World) -> None:
    await world.resolve()
    with pytest.raises(NotFound):
        await world.resolve("acme@2")
    world.publish(2, promote=False)
    with pytest.raises(NotFound):  # believed for a quarter of a second
        await world.resolve("acme@2")
    world.clock.advance(0.3)
    reads = len(world.reads)
    assert await world.resolve("acme@2") == 2
    for _ in range(50):
        with pytest.raises(NotFound):
            await world.resolve("acme@3")
    assert len(world.reads) == reads + 2  # the head, and the record of version 2


async def test_promise_11_what_is_known_goes_on_while_the_store_is_down(world: World) -> None:
    await world.resolve()
    world.down = True
    for age in (1, 5, 1000, 100_000):
        world.clock.advance(age)
        assert await world.resolve() == 1
        await world.behind()
    with pytest.raises(Unavailable):
        await world.resolve("globex")
    world.down = False
    world.publish(2)
    world.clock.advance(1000)
    assert await world.resolve() == 2


async def test_promise_11_a_known_tenant_does_not_wait_for_a_store_that_hangs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_module, "PATIENCE_S", 0.02)
    await world.resolve()
    world.gate = threading.Event()
    world.clock.advance(1000)
    assert await asyncio.wait_for(world.resolve(), 30) == 1
    assert world.heads.resolve_now(REF) is not None, "and the next request does not wait at all"
    world.gate.set()


async def test_promise_7_a_damaged_record_is_not_read_at_every_request(world: World) -> None:
    key = layout.version_key(ACME, 1)
    world.registry.store.put(key, b"damaged", Overwrite())
    for _ in range(20):
        with pytest.raises(Corrupt):
            await world.resolve()
    assert world.reads.count(key) == 1
    world.clock.advance(1.1)
    with pytest.raises(Corrupt):
        await world.resolve()
    assert world.reads.count(key) == 2


async def test_promise_7_a_store_that_is_down_is_not_asked_at_every_request(world: World) -> None:
    world.down = True
    for _ in range(20):
        with pytest.raises(Unavailable):
            await world.resolve()
    assert len(world.reads) == 1


async def test_a_store_that_hangs_is_unavailable_in_time(world: World) -> None:
    world.gate = threading.Event()
    with pytest.raises(Unavailable, match=r"within 0\.05 s"):
        await world.heads.resolve(REF, 0.05)
    world.gate.set()


async def test_a_deleted_tenant_is_gone_after_its_ttl(world: World) -> None:
    await world.resolve()
    world.registry.delete_tenant(ACME)
    world.clock.advance(2.5)
    await world.resolve()
    await world.behind()
    with pytest.raises(NotFound):
        await world.resolve()
    assert world.heads.head_now(ACME) is None


async def test_many_callers_share_one_read(world: World) -> None:
    await asyncio.gather(*[world.resolve() for _ in range(30)])
    assert len(world.reads) == 2  # one head, one record


async def test_a_caller_that_goes_away_does_not_cancel_the_read(world: World) -> None:
    world.gate = threading.Event()
    first = asyncio.create_task(world.resolve())
    second = asyncio.create_task(world.resolve())
    while not world.reads:
        await asyncio.sleep(0)
    first.cancel()
    world.gate.set()
    assert await second == 1


async def test_a_told_revocation_counts_without_the_store(world: World) -> None:
    """Who can't read the store believes the control plane, and refuses a key that it has just taken away."""
    world.publish(1)
    key = world.registry.tenancy.create_key(ACME)
    await world.heads.resolve(REF, 5)
    world.down = True
    world.registry.tenancy.revoke_key(ACME, key.id)
    world.heads.learn(world.registry.head(ACME))
    known = world.heads.head_now(ACME)
    assert known is not None
    assert key.id not in known.keys
    with pytest.raises(Unavailable):
        await world.heads.refresh(ACME)
    assert world.heads.head_now(ACME) == known, "a failed read does not bring the old one back"


async def test_what_is_told_late_does_not_undo_what_is_known(world: World) -> None:
    world.publish(1)
    old = world.registry.head(ACME)
    two = world.publish(2)
    await world.heads.resolve(REF, 5)
    world.heads.learn(old)
    assert (await world.heads.resolve(REF, 5)).version == two


async def test_a_told_end_is_the_end(world: World) -> None:
    world.publish(1)
    await world.heads.resolve(REF, 5)
    world.down = True
    world.registry.delete_tenant(ACME)
    told = len(world.told)
    world.heads.learn(world.registry._heads.read_any(ACME))
    assert world.heads.head_now(ACME) is None
    assert len(world.told) == told + 1


async def test_keys_are_believed_for_a_bounded_time_models_are_served_without_one(world: World) -> None:
    world.publish(1)
    trusted = TrustedHeads(world.heads, trust_s=100)
    await world.heads.resolve(REF, 5)
    world.down = True
    world.clock.advance(99)
    assert (await trusted.head(ACME)).tenant == "acme"
    world.clock.advance(2)
    assert trusted.head_now(ACME) is None
    with pytest.raises(Unavailable, match="has not confirmed the keys of acme"):
        await trusted.head(ACME)
    assert (await world.heads.resolve(REF, 5)).version == 1
    world.down = False
    world.clock.advance(20)  # the failure is forgotten
    assert (await trusted.head(ACME)).tenant == "acme"
    assert trusted.head_now(ACME) is not None


async def test_a_record_that_was_being_read_when_its_tenant_was_erased_is_not_kept(world: World) -> None:
    world.publish(1)
    await world.heads.head(ACME)
    world.gate = threading.Event()
    reading = asyncio.create_task(world.heads.record(ACME, 1))
    await asyncio.sleep(0)
    world.heads.forget(ACME)
    world.gate.set()
    await reading
    assert not world.heads._records
