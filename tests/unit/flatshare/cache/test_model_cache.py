"""The model cache's promises, one by one, with loads that the test holds in its hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from torch import nn

from flatshare.cache.failures import REMEMBER_S
from flatshare.cache.lease import Lease
from flatshare.cache.loading import Fetched, Placed
from flatshare.cache.model_cache import ModelCache
from flatshare.cache.tiers import ModelKey, Tier
from flatshare.errors import DeadlineExceeded, ModelFailed, NoRoom, ServeError
from flatshare_registry.errors import Corrupt, Unavailable
from flatshare_registry.records import VersionRecord, utc
from flatshare_registry.testing.faults import ManualClock


def version(tenant: str, number: int = 1) -> VersionRecord:
    return VersionRecord(
        tenant=tenant,
        version=number,
        architecture="tiny",
        digest=f"{abs(hash((tenant, number))):064x}"[:64],
        size_bytes=8,
        tensors=(),
        created_at=utc(0),
        created_by="test",
    )


class FakeLoader:
    """Both halves of a load, scripted by tenant: ``gated-`` waits to be let on, ``fail-`` raises."""

    def __init__(self) -> None:
        self.fetches: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.prepare_errors: dict[str, Exception] = {}
        self.place_errors: dict[str, Exception] = {}
        self.running = 0
        self.most_running = 0

    def gate(self, tenant: str) -> asyncio.Event:
        return self.gates.setdefault(tenant, asyncio.Event())

    async def fetch(self, record: VersionRecord) -> Fetched:
        self.fetches.append(record.name)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if record.tenant.startswith("gated-"):
                await self.gate(record.tenant).wait()
            if record.tenant in self.errors:
                raise self.errors[record.tenant]
            return Fetched(b"", Tier.STORE)
        finally:
            self.running -= 1

    def check(self, record: VersionRecord) -> None:
        if record.architecture != "tiny":
            raise ModelFailed("unknown architecture")

    async def prepare(self, record: VersionRecord, fetched: Fetched) -> nn.Module:
        if record.tenant in self.prepare_errors:
            raise self.prepare_errors[record.tenant]
        return nn.Identity()

    async def place(self, record: VersionRecord, module: nn.Module) -> Placed:
        if record.tenant in self.place_errors:
            raise self.place_errors[record.tenant]
        return Placed(module, 8)


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


def make(loader: FakeLoader, slots: int = 2, **options: object) -> ModelCache:
    return ModelCache(slots=slots, source=loader, placer=loader, **options)  # type: ignore[arg-type]  # test options


def held(cache: ModelCache) -> set[str]:
    return {record.tenant for record in cache.resident_records()}


async def use(cache: ModelCache, *tenants: str) -> None:
    for tenant in tenants:
        (await cache.lease(version(tenant), 5)).release()


async def settle() -> None:
    """Let everything that can run without outside help run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_miss_loads_and_a_hit_does_not(loader: FakeLoader) -> None:
    cache = make(loader)
    first = await cache.lease(version("acme"), 5)
    second = await cache.lease(version("acme"), 5)
    assert (first.tier, second.tier) == (Tier.STORE, Tier.DEVICE)
    assert loader.fetches == ["acme@1"]
    assert cache.stats.hits == {Tier.DEVICE: 1, Tier.HOST: 0, Tier.STORE: 1}
    assert (cache.stats.requests, cache.stats.loads) == (2, 1)


async def test_the_least_recently_used_goes(loader: FakeLoader) -> None:
    cache = make(loader)
    await use(cache, "a", "b", "a", "c")
    assert held(cache) == {"a", "c"}
    assert cache.stats.evictions == 1


async def test_a_version_is_a_model_of_its_own(loader: FakeLoader) -> None:
    cache = make(loader)
    one = await cache.lease(version("a", 1), 5)
    two = await cache.lease(version("a", 2), 5)
    assert one.module is not two.module
    assert (one.receipt.version, two.receipt.version) == (1, 2)


@pytest.mark.parametrize("error", [Corrupt("bad"), Unavailable("down"), ModelFailed("no")])
async def test_promise_2_a_load_that_fails_evicts_nothing(loader: FakeLoader, error: Exception) -> None:
    cache = make(loader)
    await use(cache, "a", "b")
    for number in range(5):
        loader.errors[f"fail-{number}"] = error
        with pytest.raises(type(error), match=str(error)):
            await cache.lease(version(f"fail-{number}"), 5)
    assert held(cache) == {"a", "b"}
    assert cache.stats.evictions == 0


async def test_promise_2_an_unknown_architecture_is_refused_before_anything_is_fetched(
    loader: FakeLoader,
) -> None:
    cache = make(loader)
    await use(cache, "a", "b")
    with pytest.raises(ModelFailed):
        await cache.lease(version("c").model_copy(update={"architecture": "other"}), 5)
    assert (held(cache), loader.fetches) == ({"a", "b"}, ["a@1", "b@1"])


async def test_promise_2_a_model_that_does_not_build_evicts_nothing(loader: FakeLoader) -> None:
    cache = make(loader)
    await use(cache, "a", "b")
    loader.prepare_errors["odd"] = ModelFailed("state does not fit")
    with pytest.raises(ModelFailed):
        await cache.lease(version("odd"), 5)
    assert (held(cache), cache.stats.evictions) == ({"a", "b"}, 0)


async def test_a_flood_of_callers_who_hang_up_loads_and_evicts_nothing(loader: FakeLoader) -> None:
    cache = make(loader, slots=2, load_concurrency=1)
    await use(cache, "a", "b")
    blocker = asyncio.create_task(cache.lease(version("gated-0"), 5))
    await settle()
    flood = [asyncio.create_task(cache.lease(version(f"cold-{n}"), 5)) for n in range(50)]
    await settle()
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    loader.gate("gated-0").set()
    (await blocker).release()
    await settle()
    assert not any(name.startswith("cold-") for name in loader.fetches)
    assert cache.stats.evictions == 1  # for gated-0 alone
    assert cache.stats.load_failures == 0
    await use(cache, "cold-7")  # and who asks again is served


async def test_a_store_that_hangs_is_unavailable_in_time(loader: FakeLoader) -> None:
    cache = make(loader, fetch_timeout_s=0.02)
    with pytest.raises(Unavailable, match="did not deliver"):
        await cache.lease(version("gated-never"), 5)


async def test_a_load_whose_callers_left_can_be_evicted_for_one_that_waits(loader: FakeLoader) -> None:
    cache = make(loader, slots=1, load_concurrency=2, room_timeout_s=60)
    leaving = asyncio.create_task(cache.lease(version("gated-a"), 5))
    await settle()
    loader.gate("gated-a").set()
    # b's load finds the only slot reserved for a, and waits.
    waiting = asyncio.create_task(cache.lease(version("b"), 5))
    leaving.cancel()
    lease = await asyncio.wait_for(waiting, 2)
    assert held(cache) == {"b"}
    lease.release()


async def test_a_device_that_refuses_gives_its_slot_back(loader: FakeLoader) -> None:
    cache = make(loader, slots=1)
    loader.place_errors["big"] = ModelFailed("out of memory")
    with pytest.raises(ModelFailed):
        await cache.lease(version("big"), 5)
    assert cache.occupied == 0
    await use(cache, "a")


async def test_promise_3_a_leased_model_is_not_freed(loader: FakeLoader) -> None:
    cache = make(loader, slots=1)
    lease = await cache.lease(version("a"), 5)
    waiting = asyncio.create_task(cache.lease(version("b"), 5))
    await settle()
    assert held(cache) == {"a"}
    assert lease.module is not None
    lease.release()
    (await waiting).release()
    assert held(cache) == {"b"}


async def test_no_room_until_the_deadline_evicts_nothing_and_says_so(loader: FakeLoader) -> None:
    cache = make(loader, slots=1, room_timeout_s=0.01)
    lease = await cache.lease(version("a"), 5)
    with pytest.raises(NoRoom, match="all 1 are in use") as caught:
        await cache.lease(version("b"), 5)
    assert caught.value.retry_after_s == 1
    assert held(cache) == {"a"}
    lease.release()
    await use(cache, "b")  # not remembered as a failure


async def test_promise_4_slots_hold_at_every_instant(loader: FakeLoader) -> None:
    cache = make(loader, slots=2, load_concurrency=8)
    tasks = [asyncio.create_task(cache.lease(version(f"gated-{n}"), 5)) for n in range(6)]
    await settle()
    for number in range(6):
        loader.gate(f"gated-{number}").set()
    for done in asyncio.as_completed(tasks):
        lease = await done
        assert cache.occupied <= 2
        lease.release()
    assert cache.occupied <= 2


async def test_promise_5_one_load_for_many_callers(loader: FakeLoader) -> None:
    cache = make(loader)
    tasks = [asyncio.create_task(cache.lease(version("gated-a"), 5)) for _ in range(20)]
    await settle()
    loader.gate("gated-a").set()
    leases = await asyncio.gather(*tasks)
    assert loader.fetches == ["gated-a@1"]
    assert len({id(lease.module) for lease in leases}) == 1
    assert {lease.tier for lease in leases} == {Tier.STORE}


async def test_promise_5_different_versions_load_in_parallel_but_bounded(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, load_concurrency=3)
    tasks = [asyncio.create_task(cache.lease(version(f"gated-{n}"), 5)) for n in range(6)]
    await settle()
    assert loader.running == 3
    for number in range(6):
        loader.gate(f"gated-{number}").set()
    await asyncio.gather(*tasks)
    assert loader.most_running == 3


async def test_promise_6_a_caller_that_goes_away_does_not_cancel_the_load(loader: FakeLoader) -> None:
    cache = make(loader)
    first = asyncio.create_task(cache.lease(version("gated-a"), 5))
    second = asyncio.create_task(cache.lease(version("gated-a"), 5))
    await settle()
    first.cancel()
    await settle()
    loader.gate("gated-a").set()
    lease = await second
    assert first.cancelled()
    assert loader.fetches == ["gated-a@1"]
    lease.release()
    assert cache.snapshot()[0].leases == 0


async def test_promise_6_a_load_without_any_caller_left_still_ends(loader: FakeLoader) -> None:
    cache = make(loader)
    task = asyncio.create_task(cache.lease(version("gated-a"), 5))
    await settle()
    task.cancel()
    loader.gate("gated-a").set()
    await settle()
    assert held(cache) == {"gated-a"}
    assert cache.snapshot()[0].leases == 0


async def test_a_caller_cancelled_just_after_it_was_handed_its_lease_gives_it_back(
    loader: FakeLoader,
) -> None:
    cache = make(loader, slots=1)
    task = asyncio.create_task(cache.lease(version("gated-a"), 5))
    await settle()
    loader.gate("gated-a").set()
    while not cache.resident_records():  # the very step in which the lease is granted
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled():
        task.result().release()
    assert cache.snapshot()[0].leases == 0
    await use(cache, "b")  # the slot can be taken again


async def test_a_caller_in_a_hurry_leaves_the_load_running(loader: FakeLoader) -> None:
    cache = make(loader)
    with pytest.raises(DeadlineExceeded):
        await cache.lease(version("gated-a"), 0.01)
    loader.gate("gated-a").set()
    await settle()
    assert held(cache) == {"gated-a"}


async def test_a_fresh_model_cannot_be_evicted_before_its_waiters_have_it(loader: FakeLoader) -> None:
    cache = make(loader, slots=1, load_concurrency=4)
    tasks = [asyncio.create_task(cache.lease(version(f"gated-{n}"), 5)) for n in range(4)]
    await settle()
    for number in range(4):
        loader.gate(f"gated-{number}").set()
    for _ in range(4):
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1, "two leases on one slot"
        (finished,) = done
        lease: Lease = finished.result()
        assert lease.module is not None
        lease.release()
        tasks = list(pending)


async def test_promise_7_failures_are_remembered_for_their_time(loader: FakeLoader) -> None:
    clock = ManualClock()
    cache = make(loader, clock=clock)
    for tenant, error in (("bad", Corrupt("sha256")), ("down", Unavailable("no answer"))):
        loader.errors[tenant] = error
        for _ in range(10):
            with pytest.raises(type(error)):
                await cache.lease(version(tenant), 5)
        assert loader.fetches.count(f"{tenant}@1") == 1
        clock.advance(REMEMBER_S[type(error)] + 0.1)
        with pytest.raises(type(error)):
            await cache.lease(version(tenant), 5)
        assert loader.fetches.count(f"{tenant}@1") == 2
    del loader.errors["bad"]
    cache.forget_failures("bad")
    await use(cache, "bad")


async def test_waiters_get_errors_of_their_own(loader: FakeLoader) -> None:
    cache = make(loader)
    loader.errors["gated-x"] = Corrupt("bad")
    tasks = [asyncio.create_task(cache.lease(version("gated-x"), 5)) for _ in range(3)]
    await settle()
    loader.gate("gated-x").set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert len({id(error) for error in errors}) == 3
    assert all(isinstance(error, Corrupt) for error in errors)


async def test_unload_waits_for_leases_and_its_slot_counts_until_then(loader: FakeLoader) -> None:
    cache = make(loader, slots=1, room_timeout_s=0.01)
    lease = await cache.lease(version("a"), 5)
    assert cache.unload(ModelKey("a", 1))
    assert (held(cache), cache.occupied) == (set(), 1)
    assert lease.module is not None
    with pytest.raises(NoRoom):
        await cache.lease(version("b"), 5)
    lease.release()
    assert cache.occupied == 0
    assert not cache.unload(ModelKey("a", 1))
    with pytest.raises(ServeError, match="after its release"):
        _ = lease.module


async def test_releasing_twice_is_harmless(loader: FakeLoader) -> None:
    cache = make(loader)
    one, two = await cache.lease(version("a"), 5), await cache.lease(version("a"), 5)
    one.release()
    one.release()
    assert cache.snapshot()[0].leases == 1
    two.release()


async def test_promise_8_every_change_of_residents_is_told(loader: FakeLoader) -> None:
    told: list[set[str]] = []
    cache = make(loader, on_change=lambda: told.append(held(cache)))
    await use(cache, "a", "b", "c")
    cache.unload(ModelKey("c", 1))
    assert told[-1] == held(cache) == {"b"}
    assert {"a", "b"} in told
    assert {"b", "c"} in told


async def test_a_preload_makes_resident_and_is_no_request(loader: FakeLoader) -> None:
    cache = make(loader)
    await cache.preload(version("a"), 5)
    await cache.preload(version("a"), 5)
    (info,) = cache.snapshot()
    assert (info.tenant, info.leases, info.hits) == ("a", 0, 0)
    assert (cache.stats.requests, cache.stats.loads) == (0, 1)


async def test_a_snapshot_tells_what_is_held(loader: FakeLoader) -> None:
    wall = ManualClock(1000.0)
    cache = make(loader, wall_clock=wall)
    lease = await cache.lease(version("a"), 5)
    wall.advance(5)
    await use(cache, "b")
    b, a = cache.snapshot()
    assert (a.tenant, a.leases, a.hits, a.last_used_at, a.loaded_at) == ("a", 1, 1, 1000.0, 1000.0)
    assert (b.tenant, b.leases, b.tier, b.size_bytes) == ("b", 0, Tier.STORE, 8)
    lease.release()


async def test_close_frees_everything_and_waits_for_leases(loader: FakeLoader) -> None:
    cache = make(loader, slots=3)
    await use(cache, "a")
    lease = await cache.lease(version("b"), 5)
    loading = asyncio.create_task(cache.lease(version("gated-c"), 5))
    await settle()
    closing = asyncio.create_task(cache.close(5))
    await settle()
    assert not closing.done()
    lease.release()
    await closing
    assert cache.occupied == 0
    with pytest.raises(NoRoom):
        await loading


async def test_a_generation_is_never_used_twice(loader: FakeLoader) -> None:
    cache = make(loader, slots=1)
    seen: set[int] = set()
    for _ in range(3):
        for tenant in ("a", "b"):
            with await cache.lease(version(tenant), 5) as lease:
                seen.add(lease.receipt.generation)
    assert len(seen) == 6


@pytest.fixture(autouse=True)
def no_task_is_left(loader: FakeLoader) -> Iterator[None]:
    yield
    for gate in loader.gates.values():
        gate.set()
