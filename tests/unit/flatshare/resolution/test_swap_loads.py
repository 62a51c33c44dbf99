"""A swap under way: what ends it, what redirects it, and what must not touch it (promise 10)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from flatshare.resolution.swaps import RETRY_S, Swaps
from flatshare.weights.tiers import ModelKey
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Unavailable
from flatshare_registry.ids import PRODUCTION, AliasName, ModelRef, TenantId
from flatshare_registry.records import Quotas, TenantHead, VersionRecord
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import ManualClock
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights

from ..residency.scripted import ScriptedLoader, make, resident, settle, use, version

ACME, GLOBEX, CANARY = TenantId("acme"), TenantId("globex"), AliasName("canary")


class World:
    """Two tenants with three versions each, of which the first is resident; nothing is read behind."""

    def __init__(self, slots: int = 8) -> None:
        self.registry = Registry(MemoryStore())
        self.heads: dict[TenantId, TenantHead] = {}
        for tenant in (ACME, GLOBEX):
            self.registry.create_tenant(tenant)
            for value in (1, 2, 3):
                self.registry.register(tenant, tiny_weights(value), "tiny", TINY_SPECS)
            self.heads[tenant] = self.registry.head(tenant)
        self.loader = ScriptedLoader()
        self.cache = make(self.loader, slots=slots)
        self.clock = ManualClock()
        self.changes = 0
        self.reading: dict[int, asyncio.Event] = {}
        self.swaps = Swaps(self.cache, self._record, timeout_s=5, on_change=self._changed, clock=self.clock)

    async def _record(self, tenant: TenantId, number: int) -> VersionRecord:
        if number in self.reading:
            await self.reading[number].wait()
        return version(tenant, number)

    def _changed(self) -> None:
        self.changes += 1

    def see(self, tenant: TenantId = ACME) -> None:
        """The replica reads the tenant's head anew."""
        old, self.heads[tenant] = self.heads[tenant], self.registry.head(tenant)
        self.swaps.moved(old, self.heads[tenant])

    def promote(self, number: int, tenant: TenantId = ACME, alias: AliasName = PRODUCTION) -> None:
        self.registry.set_alias(tenant, alias, number)
        self.see(tenant)

    def gate(self, name: str) -> asyncio.Event:
        return self.loader.preparing.setdefault(name, asyncio.Event())

    def serving(self, ref: str = "acme") -> int | None:
        """The old version that still answers for a ref; None where it is what the head says."""
        record = self.swaps.serving(ModelRef.parse(ref))
        return record.version if record is not None else None

    @property
    def under_way(self) -> list[tuple[str, str, int, int]]:
        return [(one.tenant, one.alias, one.from_version, one.to_version) for one in self.swaps.snapshot()]


@pytest.fixture
async def swaps() -> AsyncIterator[World]:
    swaps = World()
    await use(swaps.cache, version("acme"), version("globex"))
    yield swaps
    swaps.swaps.close()


@pytest.mark.parametrize("change", ["a key", "quotas", "another alias", "a new version"])
async def test_any_other_change_of_the_tenant_leaves_a_swap_alone(swaps: World, change: str) -> None:
    gate = swaps.gate("acme@2")
    swaps.promote(2)
    await settle()
    if change == "a key":
        swaps.registry.tenancy.create_key(ACME)
    elif change == "quotas":
        swaps.registry.tenancy.set_quotas(ACME, Quotas(requests_per_s=9))
    elif change == "another alias":
        swaps.registry.set_alias(ACME, CANARY, 3)
    else:
        swaps.registry.register(ACME, tiny_weights(9), "tiny", TINY_SPECS)
    told = swaps.changes
    swaps.see()
    await settle()
    assert swaps.changes == told, "nothing that an alias means here has changed"
    assert swaps.under_way == [("acme", "production", 1, 2)]
    assert swaps.serving() == 1, "requests go on on the old one, rather than wait for a cold load"
    assert swaps.loader.prepared.count("acme@2") == 1, "its load was not begun anew"
    gate.set()
    await swaps.swaps.settled("acme", 5)
    assert (swaps.serving(), swaps.under_way, swaps.cache.stats.swaps) == (None, [], 1)
    assert swaps.changes == told + 1, "now it means the new one"
    assert "acme@2" in resident(swaps.cache)


async def test_another_tenants_change_leaves_a_swap_alone(swaps: World) -> None:
    swaps.gate("acme@2")
    swaps.promote(2)
    swaps.registry.tenancy.create_key(GLOBEX)
    swaps.see(GLOBEX)
    assert (swaps.serving(), swaps.serving("globex")) == (1, None)


async def test_a_second_promotion_redirects_the_swap_and_what_it_gave_up_is_not_loaded(swaps: World) -> None:
    swaps.reading[2] = asyncio.Event()  # the first swap has not got as far as its load
    swaps.promote(2)
    await settle()
    gate = swaps.gate("acme@3")
    swaps.promote(3)
    await settle()
    assert swaps.under_way == [("acme", "production", 1, 3)]
    assert swaps.serving() == 1, "the old one answers until the last one promoted is here"
    swaps.reading[2].set()
    await settle()
    assert "acme@2" not in swaps.loader.prepared
    gate.set()
    await swaps.swaps.settled("acme", 5)
    assert (swaps.serving(), swaps.under_way, swaps.cache.stats.swaps) == (None, [], 1)
    assert resident(swaps.cache) == {"acme@1", "acme@3", "globex@1"}


async def test_the_first_of_two_promotions_may_end_its_load_and_changes_nothing(swaps: World) -> None:
    first, second = swaps.gate("acme@2"), swaps.gate("acme@3")
    swaps.promote(2)
    await settle()
    swaps.promote(3)
    await settle()
    first.set()
    await settle()
    assert (swaps.serving(), swaps.under_way) == (1, [("acme", "production", 1, 3)])
    second.set()
    await swaps.swaps.settled("acme", 5)
    assert (swaps.serving(), swaps.cache.stats.swaps) == (None, 1)


async def test_rolled_back_before_it_was_done_the_swap_ends(swaps: World) -> None:
    swaps.gate("acme@2")
    swaps.promote(2)
    await settle()
    told = swaps.changes
    swaps.promote(1)
    assert (swaps.under_way, swaps.serving()) == ([], None)
    assert swaps.changes == told + 1, "what the alias means here has changed"


async def test_a_tenant_that_is_gone_has_no_swap_and_no_old_version_that_answers(swaps: World) -> None:
    for tenant in (ACME, GLOBEX):
        swaps.gate(f"{tenant}@2")
        swaps.promote(2, tenant)
    await settle()
    swaps.swaps.moved(swaps.heads[ACME], None)
    assert swaps.under_way == [("globex", "production", 1, 2)]
    assert (swaps.serving("acme"), swaps.serving("globex")) == (None, 1)


async def test_a_tenant_that_was_never_seen_and_one_that_came_begin_nothing(swaps: World) -> None:
    swaps.swaps.moved(None, None)
    swaps.registry.set_alias(ACME, PRODUCTION, 2)
    swaps.swaps.moved(None, swaps.registry.head(ACME))
    assert swaps.under_way == []


async def test_an_alias_that_was_removed_or_an_old_version_that_was_deleted_ends_its_swap(
    swaps: World,
) -> None:
    swaps.promote(1, alias=CANARY)
    for name in ("acme@2", "globex@2"):
        swaps.gate(name)
    swaps.promote(2, alias=CANARY)
    swaps.promote(2, GLOBEX)
    assert len(swaps.under_way) == 2
    swaps.registry.remove_alias(ACME, CANARY)
    swaps.see()
    swaps.registry.delete_version(GLOBEX, 1)
    swaps.see(GLOBEX)
    assert (swaps.under_way, swaps.serving("acme:canary"), swaps.serving("globex")) == ([], None, None)


async def test_only_what_is_here_and_whose_successor_is_not_is_swapped(swaps: World) -> None:
    await use(swaps.cache, version("acme", 2))
    swaps.promote(2)
    assert (swaps.under_way, swaps.serving()) == ([], None), "it is here: nothing to wait for"
    swaps.cache.unload(ModelKey("globex", 1))
    swaps.promote(2, GLOBEX)
    assert (swaps.under_way, swaps.serving("globex")) == ([], None), "nothing here could answer"


async def test_settled_waits_for_the_tenants_own_swaps_and_only_so_long(swaps: World) -> None:
    gates = [swaps.gate(f"{tenant}@2") for tenant in (ACME, GLOBEX)]
    swaps.promote(2)
    swaps.promote(2, GLOBEX)
    await settle()
    await asyncio.wait_for(swaps.swaps.settled("initech", 60), 1)
    waiting = asyncio.create_task(swaps.swaps.settled("acme", 60))
    await settle()
    assert not waiting.done()
    gates[0].set()
    await asyncio.wait_for(waiting, 1)
    assert swaps.under_way == [("globex", "production", 1, 2)], "another tenant's was not waited for"
    await asyncio.wait_for(swaps.swaps.settled("globex", 0.01), 1)
    assert swaps.serving("globex") == 1


async def test_a_version_that_failed_to_load_is_tried_again_after_its_time_and_not_before(
    swaps: World,
) -> None:
    swaps.loader.prepare_errors["acme@2"] = Unavailable("down")
    swaps.promote(2)
    await swaps.swaps.settled("acme", 5)
    (info,) = swaps.swaps.snapshot()
    assert info.error == "Unavailable: down"
    await asyncio.wait_for(swaps.swaps.settled("acme", 60), 1)
    swaps.cache.forget_failures("acme")
    for _ in range(3):
        assert swaps.serving() == 1
        await settle()
    assert swaps.loader.prepared.count("acme@2") == 1
    del swaps.loader.prepare_errors["acme@2"]
    swaps.clock.advance(RETRY_S)
    assert swaps.serving() == 1
    await swaps.swaps.settled("acme", 5)
    assert (swaps.serving(), swaps.under_way) == (None, [])


async def test_an_old_version_that_was_deleted_with_the_promotion_answers_no_more(swaps: World) -> None:
    swaps.gate("acme@2")
    swaps.registry.set_alias(ACME, PRODUCTION, 2)
    swaps.registry.delete_version(ACME, 1)
    swaps.see()  # both at once
    assert (swaps.under_way, swaps.serving()) == ([], None)


async def test_redirected_the_old_version_still_is_the_one_that_answered_last(swaps: World) -> None:
    """Although the one in between is here too by now."""
    swaps.reading[2] = asyncio.Event()
    swaps.promote(2)
    await use(swaps.cache, version("acme", 2))  # asked for by its number
    swaps.gate("acme@3")
    swaps.promote(3)
    assert (swaps.serving(), swaps.under_way) == (1, [("acme", "production", 1, 3)])


async def test_an_old_version_that_was_evicted_answers_no_more(swaps: World) -> None:
    swaps.gate("acme@2")
    swaps.promote(2)
    await settle()
    swaps.cache.unload(ModelKey("acme", 1))
    assert (swaps.serving(), swaps.under_way) == (None, [])


async def test_a_version_by_number_is_no_business_of_a_swap(swaps: World) -> None:
    swaps.gate("acme@2")
    swaps.promote(2)
    assert (swaps.serving("acme"), swaps.serving("acme@1"), swaps.serving("acme@2")) == (1, None, None)


async def test_after_a_swap_the_old_version_is_evicted_like_any_other() -> None:
    swaps = World(slots=3)
    await use(swaps.cache, version("acme"))
    swaps.promote(2)
    await swaps.swaps.settled("acme", 5)
    await use(swaps.cache, version("b"), version("c"))
    assert resident(swaps.cache) == {"acme@2", "b@1", "c@1"}, "the old one was the longest unused"
    swaps.swaps.close()


async def test_a_swap_pins_nothing_that_was_not_pinned(swaps: World) -> None:
    swaps.promote(2)
    await swaps.swaps.settled("acme", 5)
    await settle()
    assert swaps.cache.is_resident(ModelKey("acme", 2))
    assert not [info for info in swaps.cache.snapshot() if info.pinned]


async def test_two_aliases_that_move_off_one_version_protect_it_until_both_have() -> None:
    swaps = World(slots=3)
    cache, key = swaps.cache, ModelKey("acme", 1)
    await use(cache, version("acme"), version("b"), version("c"))
    with cache.protected(key):
        with cache.protected(key):
            pass
        await use(cache, version("d"))
        assert cache.is_resident(key), "one swap is still on its way"
    await use(cache, version("e"))
    assert not cache.is_resident(key)


async def test_closing_ends_all_swaps(swaps: World) -> None:
    for tenant in (ACME, GLOBEX):
        swaps.gate(f"{tenant}@2")
        swaps.promote(2, tenant)
    swaps.swaps.close()
    await settle()
    assert (swaps.under_way, swaps.serving(), swaps.serving("globex")) == ([], None, None)
