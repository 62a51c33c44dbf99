"""Promise 10: a promoted version is loaded beside the old one, then swapped; nobody fails or waits."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save

from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.device.cpu import CpuDevice
from flatshare.engine.inference import Inference
from flatshare.engine.quotas import QuotaKeeper
from flatshare.models.architecture import architecture
from flatshare.replica.request import InferenceService
from flatshare.replica.ticket import Prediction
from flatshare.replica.usage import UsageCounter
from flatshare.residency.fair_semaphore import FairSemaphore
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.resolution.heads import TenantHeads
from flatshare.resolution.resolver import Resolver
from flatshare.resolution.swaps import RETRY_S, Swaps
from flatshare.weights.device_loader import DeviceLoader
from flatshare.weights.fetch import TensorSource
from flatshare.weights.tiers import ModelKey
from flatshare_registry import layout
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Unavailable
from flatshare_registry.ids import PRODUCTION, AliasName, ModelRef, TenantId
from flatshare_registry.stores.base import Overwrite
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import FaultyStore, ManualClock

NETWORK = architecture("mnist-cnn")
ACME = TenantId("acme")
ROWS = NETWORK.preprocess(torch.zeros(1, 28, 28, dtype=torch.uint8).numpy())


class World:
    """A real service on a store whose reads of weights wait until they are let on."""

    def __init__(self, threads: ThreadPoolExecutor, slots: int) -> None:
        self.store = MemoryStore()
        self.registry = Registry(self.store)
        self.registry.create_tenant(ACME)
        self.clock = ManualClock()
        self.down = False
        faulty = FaultyStore(self.store, before=self._before)
        self.heads = TenantHeads(
            Registry(faulty), threads, ttl_s=2, on_change=lambda old, new: self.swaps.moved(old, new)
        )
        self.cache = ModelCache(
            ledger=Ledger(slots, None),
            loader=DeviceLoader(TensorSource(faulty), CpuDevice(), threads, threads),
        )
        self.swaps = Swaps(self.cache, self.heads.record, timeout_s=5, clock=self.clock)
        self.inference = Inference(CpuDevice())
        self.resolver = Resolver(self.heads, self.swaps)
        self.service = InferenceService(
            resolver=self.resolver, cache=self.cache, inference=self.inference,
            admission=FairSemaphore(8, 8), cold=FairSemaphore(8, 0), quotas=QuotaKeeper(), timeout_s=5, usage=UsageCounter(MemoryStore(), "test", ThreadPoolExecutor(1), 0),)  # fmt: skip

    def _before(self, operation: str, key: str) -> None:
        if key.startswith("blobs/") and self.down:
            raise Unavailable("down")

    def register(self, seed: int) -> int:
        torch.manual_seed(seed)
        weights = save(dict(NETWORK.build().state_dict()))
        return self.registry.register(ACME, weights, NETWORK.name, NETWORK.tensors).version.version

    async def promote(self, number: int, alias: AliasName = PRODUCTION) -> None:
        await asyncio.to_thread(self.registry.set_alias, ACME, alias, number)
        await self.heads.refresh(ACME)

    async def ask(self, ref: str = "acme") -> Prediction:
        with await self.service.enter(LOCAL_OPERATOR, ModelRef.parse(ref)) as ticket:
            return await self.service.predict(ticket, lambda network: ROWS)

    async def serves(self, ref: str = "acme") -> int:
        return (await self.ask(ref)).version.version


@pytest.fixture
async def world(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]  # a generator fixture
    with ThreadPoolExecutor(4) as threads:
        world = World(threads, getattr(request, "param", 4))
        yield world
        world.swaps.close()
        world.inference.close()


async def test_promise_10_no_request_fails_or_waits_for_the_swap(world: World) -> None:
    world.register(1)
    assert await world.serves() == 1
    two = world.register(2)
    # Hold the new version's load in the middle of its fetch.
    loading, go_on = asyncio.Event(), asyncio.Event()
    prepare = world.cache._loader.prepare

    async def held_back(*arguments):  # type: ignore[no-untyped-def]  # as prepare
        loading.set()
        await go_on.wait()
        return await prepare(*arguments)

    world.cache._loader.prepare = held_back  # type: ignore[method-assign]  # a gate in the real loader
    await world.promote(two)
    await loading.wait()
    for _ in range(20):
        prediction = await asyncio.wait_for(world.ask(), 30)
        assert (prediction.version.version, prediction.tier.value) == (1, "device")
    assert [(swap.from_version, swap.to_version, swap.error) for swap in world.swaps.snapshot()] == [
        (1, 2, "")
    ]
    go_on.set()
    await world.swaps.settled("acme", 5)
    prediction = await world.ask()
    assert (prediction.version.version, prediction.tier.value) == (2, "device")
    assert world.cache.stats.swaps == 1
    assert world.swaps.snapshot() == []


async def test_promise_10_rollback_is_instant_while_the_old_one_is_here(world: World) -> None:
    world.register(1)
    await world.serves()
    await world.promote(world.register(2))
    await world.swaps.settled("acme", 5)
    assert await world.serves() == 2
    loads = world.cache.stats.loads
    await world.promote(1)
    prediction = await world.ask()
    assert (prediction.version.version, prediction.tier.value) == (1, "device")
    assert world.cache.stats.loads == loads


async def test_a_version_that_can_not_be_loaded_does_not_take_the_old_one_down(world: World) -> None:
    world.register(1)
    await world.serves()
    two = world.register(2)
    record = world.registry.version(ACME, two)
    good = world.store.get(layout.blob_key(record.digest)).data
    world.store.put(layout.blob_key(record.digest), bytes(len(good)), Overwrite())
    await world.promote(two)
    await world.swaps.settled("acme", 5)
    assert await world.serves() == 1
    (swap,) = world.swaps.snapshot()
    assert "Corrupt" in swap.error
    # Mended, it is tried again when requests come.
    world.store.put(layout.blob_key(record.digest), good, Overwrite())
    world.cache.forget_failures("acme")
    world.clock.advance(RETRY_S + 1)
    assert await world.serves() == 1
    await world.swaps.settled("acme", 5)
    assert await world.serves() == 2


async def test_a_second_promotion_while_the_first_is_under_way_wins(world: World) -> None:
    world.register(1)
    await world.serves()
    two, three = world.register(2), world.register(3)
    world.down = True
    await world.promote(two)
    assert await world.serves() == 1
    assert [(swap.from_version, swap.to_version) for swap in world.swaps.snapshot()] == [(1, two)]
    world.down = False
    await world.promote(three)
    assert [swap.to_version for swap in world.swaps.snapshot()] in ([three], []), "redirected, or done"
    assert await world.serves() in (1, three), "never the one that was given up"
    await world.swaps.settled("acme", 5)
    assert await world.serves() == 3
    await world.promote(two)
    await world.promote(three)  # back before it was done: nothing to swap
    assert await world.serves() == 3


async def test_a_version_by_number_is_always_that_version(world: World) -> None:
    world.register(1)
    await world.serves()
    world.down = True
    two = world.register(2)
    await world.promote(two)
    assert await world.serves("acme@1") == 1
    with pytest.raises(Unavailable):
        await world.ask("acme@2")


async def test_a_deleted_old_version_is_not_served_on(world: World) -> None:
    world.register(1)
    await world.serves()
    two = world.register(2)
    world.down = True
    await world.promote(two)
    await world.swaps.settled("acme", 5)
    assert await world.serves() == 1
    world.registry.delete_version(ACME, 1)
    await world.heads.refresh(ACME)
    with pytest.raises(Unavailable):
        await world.ask()


@pytest.mark.parametrize("world", [1], indirect=True)
async def test_with_a_single_slot_the_old_one_goes_at_the_last_moment(world: World) -> None:
    world.register(1)
    await world.serves()
    await world.promote(world.register(2))
    await world.swaps.settled("acme", 5)
    assert await world.serves() == 2
    assert [info.version for info in world.cache.snapshot()] == [2]


async def test_the_old_one_is_evicted_after_all_others_while_its_successor_loads(world: World) -> None:
    for tenant in ("b", "c", "d"):
        world.registry.create_tenant(TenantId(tenant))
    world.register(1)
    await world.serves()
    with world.cache.protected(ModelKey("acme", 1)):
        for seed, tenant in enumerate(("b", "c", "d")):
            torch.manual_seed(seed + 10)
            weights = save(dict(NETWORK.build().state_dict()))
            world.registry.register(TenantId(tenant), weights, NETWORK.name, NETWORK.tensors)
            await world.serves(tenant)
        two = world.register(2)
        await world.heads.refresh(ACME)
        assert await world.serves(f"acme@{two}") == two
        assert world.cache.is_resident(ModelKey("acme", 1))
    assert not world.cache.is_resident(ModelKey("b", 1))


async def test_a_pin_moves_to_the_promoted_version(world: World) -> None:
    world.register(1)
    await world.cache.preload(await world.heads.resolve(ModelRef.parse("acme"), 5), 5, pin=True)
    two = world.register(2)
    await world.promote(two)
    await world.swaps.settled("acme", 5)
    assert not world.cache.is_pinned(ModelKey("acme", 1))
    assert world.cache.is_pinned(ModelKey("acme", two))


async def test_a_pin_stays_where_another_alias_still_needs_it(world: World) -> None:
    world.register(1)
    canary = AliasName("canary")
    await world.promote(1, canary)
    await world.cache.preload(await world.heads.resolve(ModelRef.parse("acme"), 5), 5, pin=True)
    await world.promote(world.register(2), canary)
    await world.swaps.settled("acme", 5)
    assert world.cache.is_pinned(ModelKey("acme", 1)), "production still means it"
    assert world.cache.is_pinned(ModelKey("acme", 2))


@pytest.mark.parametrize("world", [2], indirect=True)
async def test_a_pin_that_can_not_move_stays(world: World) -> None:
    world.register(1)
    await world.cache.preload(await world.heads.resolve(ModelRef.parse("acme"), 5), 5, pin=True)
    await world.promote(world.register(2))
    await world.swaps.settled("acme", 5)
    assert await world.serves() == 2
    assert world.cache.is_pinned(ModelKey("acme", 1))


async def test_aliases_swap_apart_from_each_other(world: World) -> None:
    world.register(1)
    canary = AliasName("canary")
    await world.promote(1, canary)
    await world.serves()
    await world.serves("acme:canary")
    world.down = True
    await world.promote(world.register(2), canary)
    await world.swaps.settled("acme", 5)
    assert [await world.serves(), await world.serves("acme:canary")] == [1, 1]
    assert [swap.alias for swap in world.swaps.snapshot()] == ["canary"]


async def test_a_ref_means_both_versions_while_its_swap_fails(world: World) -> None:
    """Who unpins or unloads an alias means the version that answers for it, too."""
    world.register(1)
    assert await world.serves() == 1
    two = world.register(2)
    prepare = world.cache._loader.prepare

    async def fails(*arguments):  # type: ignore[no-untyped-def]  # as prepare
        raise Unavailable("down")

    world.cache._loader.prepare = fails  # type: ignore[method-assign]  # the new version can't be loaded
    await world.promote(two)
    await world.swaps.settled("acme", 5)
    ref = ModelRef.parse("acme")
    assert await world.serves() == 1
    assert await world.resolver.meant(ref, 5) == [ModelKey("acme", 1), ModelKey("acme", 2)]
    assert await world.resolver.meant(ModelRef.parse("acme@2"), 5) == [ModelKey("acme", 2)]
    assert (await world.resolver.said(ref, 5)).version == 2
    assert (await world.resolver.serving(ref, 5)).version == 1
    world.cache._loader.prepare = prepare  # type: ignore[method-assign]


# -- the resolver, which knows heads and swaps


async def swapping(world: World) -> int:
    """acme's production was moved from version 1, which is here, to one that can't be loaded; its number."""
    world.register(1)
    assert await world.serves() == 1
    two = world.register(2)
    world.down = True
    await world.promote(two)
    await world.swaps.settled("acme", 5)
    return two


async def test_during_a_swap_the_old_version_answers_the_alias_and_its_own_number(world: World) -> None:
    await swapping(world)
    one, two = world.registry.version(ACME, 1), world.registry.version(ACME, 2)
    assert world.resolver.refs_of(one) == {"acme@1", "acme"}
    assert world.resolver.refs_of(two) == {"acme@2"}
    serving = world.resolver.serving_now(ModelRef.parse("acme"))
    assert serving is not None
    assert serving.version == 1
    assert (await world.resolver.serving(ModelRef.parse("acme@2"), 5)).version == 2


async def test_after_a_swap_the_alias_is_the_new_versions(world: World) -> None:
    await swapping(world)
    await asyncio.to_thread(world.registry.set_alias, ACME, AliasName("canary"), 1)
    await world.heads.refresh(ACME)
    world.down = False
    world.clock.advance(RETRY_S + 0.1)
    world.cache.forget_failures(ACME)
    assert await world.serves() == 1, "and its request begins the next try"
    await world.swaps.settled("acme", 5)
    one, two = world.registry.version(ACME, 1), world.registry.version(ACME, 2)
    assert world.resolver.refs_of(one) == {"acme@1", "acme:canary"}
    assert world.resolver.refs_of(two) == {"acme@2", "acme"}
    assert await world.resolver.meant(ModelRef.parse("acme"), 5) == [ModelKey("acme", 2)]


async def test_an_alias_that_is_no_ref_takes_no_others_along(world: World) -> None:
    world.register(1)
    await world.heads.head(ACME)
    head = world.heads.last_head(ACME)
    assert head is not None
    world.heads._heads[ACME].head = head.model_copy(update={"aliases": {"Not A Label": 1, **head.aliases}})
    assert world.resolver.refs_of(world.registry.version(ACME, 1)) == {"acme@1", "acme"}


async def test_of_a_tenant_that_is_not_known_a_version_answers_its_number_alone(world: World) -> None:
    world.register(1)
    assert world.resolver.refs_of(world.registry.version(ACME, 1)) == {"acme@1"}
    assert world.resolver.head_now(ACME) is None
    assert world.resolver.serving_now(ModelRef.parse("acme")) is None
    assert (await world.resolver.head(ACME)).tenant == "acme"
    assert world.resolver.head_now(ACME) is not None
