"""The model cache's promises, one by one, with loads that the test holds in its hand."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator

import pytest
from torch import nn

from flatshare.errors import DeadlineExceeded, ModelFailed, NeverFits, NoRoom, ResidentOverQuota, ServeError
from flatshare.models.stages import Model
from flatshare.residency.failures import MAX_CHARS, MAX_SHOWN, REMEMBER_S
from flatshare.residency.lease import Lease
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.residency.policy import Sieve
from flatshare.residency.tenant_limits import NO_BOUNDS, BoundsOf, TenantBounds
from flatshare.weights.loader import Held, Placed, Prepared
from flatshare.weights.tiers import ModelKey, Part, State, Tier
from flatshare_registry.errors import Corrupt, NotFound, Unavailable
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


SIZE = 8


def own_part(record: VersionRecord) -> Part:
    return Part(record.digest, "F32", (2,))


class FakeLoader:
    """Both halves of a load, scripted by tenant: ``gated-`` waits to be let on, ``fail-`` raises."""

    def __init__(self) -> None:
        self.fetches: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.prepare_errors: dict[str, Exception] = {}
        self.place_errors: dict[str, Exception] = {}
        self.local: set[str] = set()
        self.parts: dict[str, dict[Part, int]] = {}
        self.measured: dict[str, dict[Part, int]] = {}
        self.running = 0
        self.most_running = 0
        self.scrubbed: list[str] = []

    def gate(self, tenant: str) -> asyncio.Event:
        return self.gates.setdefault(tenant, asyncio.Event())

    def check(self, record: VersionRecord) -> dict[Part, int]:
        if record.architecture != "tiny":
            raise ModelFailed("unknown architecture")
        return self.parts.get(record.tenant, {own_part(record): SIZE})

    def hold(self, record: VersionRecord) -> dict[Part, object]:
        return dict.fromkeys(self.check(record))

    def distrust(self, record: VersionRecord) -> None:
        pass  # keeps nothing between loads

    def let_go(self) -> None:
        pass  # keeps nothing between loads

    def stop(self, tenant: str) -> None:
        pass  # has no threads

    async def ended(self, tenant: str, timeout_s: float) -> bool:
        return True

    overwrites_what_leaves = False

    def scrub_held(self, held: Held, parts: Collection[Part], model: Model | None) -> int:
        return 0

    async def settle(self) -> None:
        pass  # overwrites at once

    def scrub(self, model: Model, parts: Collection[Part]) -> int:
        self.scrubbed += [part.digest for part in parts]
        return 7

    async def prepare_local(self, record: VersionRecord, held: Held) -> Prepared | None:
        if record.tenant not in self.local:
            return None
        return Prepared({}, Tier.HOST, Model((nn.Identity(),), digest=record.digest))

    async def prepare(self, record: VersionRecord, held: Held, timeout_s: float) -> Prepared:
        self.fetches.append(record.name)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if record.tenant.startswith("gated-"):
                await self.gate(record.tenant).wait()
            for errors in (self.errors, self.prepare_errors):
                if record.tenant in errors:
                    raise errors[record.tenant]
            return Prepared({}, Tier.STORE, Model((nn.Identity(),), digest=record.digest))
        finally:
            self.running -= 1

    async def place(self, record: VersionRecord, prepared: Prepared, held: Held) -> Placed:
        if record.tenant in self.place_errors:
            raise self.place_errors[record.tenant]
        assert prepared.model is not None
        return Placed(prepared.model, self.measured.get(record.tenant, self.check(record)))


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


def make(loader: FakeLoader, slots: int = 2, budget: int | None = None, **options: object) -> ModelCache:
    return ModelCache(ledger=Ledger(slots, budget), loader=loader, **options)  # type: ignore[arg-type]  # test options


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
    assert cache.stats.hits == {Tier.DEVICE: 1, Tier.HOST: 0, Tier.PEER: 0, Tier.STORE: 1}
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
    assert one.model is not two.model
    assert (one.tag.version, two.tag.version) == (1, 2)


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
    lease = await asyncio.wait_for(waiting, 30)
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
    assert lease.model is not None
    lease.release()
    (await waiting).release()
    assert held(cache) == {"b"}


async def test_no_room_until_the_deadline_evicts_nothing_and_says_so(loader: FakeLoader) -> None:
    cache = make(loader, slots=1, room_timeout_s=0.01)
    lease = await cache.lease(version("a"), 5)
    with pytest.raises(NoRoom, match="all 1 slots") as caught:
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
    assert len({id(lease.model) for lease in leases}) == 1
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
        assert lease.model is not None
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


async def test_why_the_last_load_failed_is_shown_until_it_is_loaded(loader: FakeLoader) -> None:
    clock = ManualClock()
    cache = make(loader, clock=clock)
    for tenant, error in (("bad", Corrupt("sha256 of w")), ("down", Unavailable("no answer"))):
        loader.errors[tenant] = error
        with pytest.raises(type(error)):
            await cache.lease(version(tenant), 5)
    assert [(one.tenant, one.version, one.kind, one.error) for one in cache.failed] == [
        ("down", 1, "Unavailable", "no answer"),
        ("bad", 1, "Corrupt", "sha256 of w"),
    ]
    clock.advance(REMEMBER_S[Corrupt] + 1)
    assert len(cache.failed) == 2, "for longer than it is answered from memory"
    cache.forget_failures("down")
    assert len(cache.failed) == 2, "a change of the tenant mends nothing"
    del loader.errors["down"]
    await use(cache, "down")
    assert [one.tenant for one in cache.failed] == ["bad"]
    cache.hide_failed("bad", {1})
    assert len(cache.failed) == 1
    cache.hide_failed("bad", ())
    assert cache.failed == [], "its version is gone"
    for number in range(MAX_SHOWN + 5):
        loader.errors[f"n{number}"] = Corrupt("x")
        with pytest.raises(Corrupt):
            await cache.lease(version(f"n{number}"), 5)
    assert len(cache.failed) == MAX_SHOWN and cache.failed[0].tenant == f"n{MAX_SHOWN + 4}"
    loader.errors["long"] = Corrupt("x" * 10_000)
    with pytest.raises(Corrupt):
        await cache.lease(version("long"), 5)
    assert len(cache.failed[0].error) == MAX_CHARS


@pytest.mark.parametrize("gone", ["erased", "deleted"])
async def test_nothing_of_one_that_is_gone_is_shown_though_a_load_was_under_way(
    loader: FakeLoader, gone: str
) -> None:
    cache = make(loader)
    loader.errors["gated-a"] = Corrupt("old")
    loader.gate("gated-a").set()
    with pytest.raises(Corrupt):
        await cache.lease(version("gated-a"), 5)
    cache.forget_failures("gated-a")
    del loader.errors["gated-a"]
    loader.gate("gated-a").clear()
    task = asyncio.create_task(cache.lease(version("gated-a"), 5))
    await settle()
    assert len(cache.failed) == 1
    if gone == "erased":
        cache.erase("gated-a")
    else:
        cache.withdraw(ModelKey("gated-a", 1))
    assert cache.failed == []
    loader.gate("gated-a").set()
    with pytest.raises(NotFound):
        await task
    assert cache.failed == []


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
    assert lease.model is not None
    with pytest.raises(NoRoom):
        await cache.lease(version("b"), 5)
    lease.release()
    assert cache.occupied == 0
    assert not cache.unload(ModelKey("a", 1))
    with pytest.raises(ServeError, match="after its release"):
        _ = lease.model


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
                seen.add(lease.tag.generation)
    assert len(seen) == 6


# -- bytes


def share(*names: str) -> dict[Part, int]:
    """Parts of 10 bytes each."""
    return {Part(name, "F32", (1,)): 10 for name in names}


async def test_promise_4_bytes_hold_at_every_instant_also_while_draining(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, budget=30, room_timeout_s=5)
    for tenant in "abcd":
        loader.parts[tenant] = share(tenant)
    leases = [await cache.lease(version(tenant), 5) for tenant in "abc"]
    assert cache.ledger.held_bytes == 30
    cache.unload(ModelKey("a", 1))  # draining: its bytes count until its lease has ended
    waiting = asyncio.create_task(cache.lease(version("d"), 5))
    await settle()
    assert (held(cache), cache.ledger.held_bytes) == ({"b", "c"}, 30)
    leases[0].release()
    (await waiting).release()
    assert (held(cache), cache.ledger.held_bytes) == ({"b", "c", "d"}, 30)
    for lease in leases[1:]:
        lease.release()


async def test_victims_are_chosen_as_a_set_or_nothing_is_evicted(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, budget=40, room_timeout_s=0.02)
    for tenant in "abcd":
        loader.parts[tenant] = share(tenant)
    await use(cache, "a", "b", "c", "d")
    lease = await cache.lease(version("d"), 5)
    loader.parts["big"] = share("big1", "big2", "big3", "big4")
    with pytest.raises(NoRoom):  # a, b and c together would not do
        await cache.lease(version("big"), 5)
    assert (held(cache), cache.stats.evictions) == ({"a", "b", "c", "d"}, 0)
    lease.release()
    await use(cache, "big")
    assert (held(cache), cache.stats.evictions) == ({"big"}, 4)


async def test_a_victim_that_would_not_help_is_spared(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, budget=50)
    loader.parts |= {"small": share("s"), "large": share("l1", "l2", "l3", "l4"), "new": share("n1", "n2")}
    await use(cache, "small", "large")
    await use(cache, "new")  # small, the least recently used, would not have been enough; large alone is
    assert held(cache) == {"small", "new"}


async def test_promise_8_every_addition_and_removal_is_told(loader: FakeLoader) -> None:
    told: list[set[str]] = []
    cache = make(loader, slots=2, on_change=lambda: told.append(held(cache)))

    async def check() -> None:
        assert told, "nothing was told"
        assert told[-1] == held(cache)
        told.clear()

    await use(cache, "a", "b")
    await check()
    await use(cache, "c")  # evicts
    await check()
    assert held(cache) == {"b", "c"}
    cache.unload(ModelKey("b", 1))
    await check()
    cache.withdraw(ModelKey("c", 1))
    await check()
    await use(cache, "a", "b")
    told.clear()
    cache.erase("a")
    await check()
    cache.quarantine(await cache.lease(version("b"), 5))
    await check()
    with await cache.lease(version("d"), 5) as lease:
        told.clear()
        cache.condemn(lease, ModelFailed("wrong"))
        await check()
    assert cache.stats.probes_failed == 1
    assert held(cache) == set()


async def test_promise_9_what_can_never_fit_is_refused_by_name_and_size(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, budget=25)
    loader.parts |= {"a": share("a"), "huge": share("h1", "h2", "h3")}
    await use(cache, "a")
    with pytest.raises(NeverFits, match=r"huge@1 takes 30 bytes .* budget is 25"):
        await cache.lease(version("huge"), 5)
    assert (held(cache), loader.fetches) == ({"a"}, ["a@1"])


async def test_a_load_that_is_larger_than_it_claimed_makes_more_room_or_fails(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, budget=40, room_timeout_s=0.02)
    loader.parts |= {"a": share("a"), "b": share("b"), "liar": share("x")}
    loader.measured["liar"] = share("x", "y", "z")
    await use(cache, "a", "b", "liar")
    assert (held(cache), cache.ledger.held_bytes, cache.ledger.reserved_bytes) == ({"b", "liar"}, 40, 0)
    loader.measured["monster"] = share(*(f"m{n}" for n in range(9)))
    with pytest.raises(NeverFits, match="90 bytes"):
        await cache.lease(version("monster"), 5)
    assert (cache.ledger.reserved_bytes, cache.occupied) == (0, len(held(cache)))


async def test_shared_parts_count_once_and_stay_until_their_last_holder_goes(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, budget=100)
    loader.parts |= {name: share("base1", "base2", f"head-{name}") for name in ("a", "b", "c")}
    await use(cache, "a", "b", "c")
    assert cache.ledger.held_bytes == 50
    assert {info.own_bytes for info in cache.snapshot()} == {10}
    cache.unload(ModelKey("a", 1))
    cache.unload(ModelKey("b", 1))
    assert cache.ledger.held_bytes == 30
    assert cache.snapshot()[0].own_bytes == 30
    cache.unload(ModelKey("c", 1))
    assert cache.ledger.held_bytes == 0


async def test_what_a_load_counts_on_is_not_evicted_under_it(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, budget=40, load_concurrency=4)
    loader.parts |= {
        "a": share("base", "head-a"),
        "gated-b": share("base", "head-b"),
        "c": share("c1", "c2"),
    }
    await use(cache, "a")
    waiting = asyncio.create_task(cache.lease(version("gated-b"), 5))
    await settle()
    cache.unload(ModelKey("a", 1))
    assert cache.ledger.held_bytes == 10  # the base is held by the load
    await use(cache, "c")
    loader.gate("gated-b").set()
    (await waiting).release()
    assert (held(cache), cache.ledger.held_bytes) == ({"c", "gated-b"}, 40)


async def test_one_lease_that_ends_lets_in_all_for_whom_there_is_room(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, budget=100, room_timeout_s=5, load_concurrency=8)
    loader.parts["big"] = dict.fromkeys(share("big"), 100)
    lease = await cache.lease(version("big"), 5)
    loader.parts |= {f"small-{n}": share(f"s{n}") for n in range(4)}
    waiting = [asyncio.create_task(cache.lease(version(f"small-{n}"), 5)) for n in range(4)]
    await settle()
    assert (cache.ledger.held_bytes, cache.ledger.reserved_bytes, cache.occupied) == (100, 0, 1)
    lease.release()
    for one in await asyncio.wait_for(asyncio.gather(*waiting), 30):
        one.release()
    assert held(cache) == {f"small-{n}" for n in range(4)}
    assert (cache.ledger.held_bytes, cache.ledger.reserved_bytes, cache.occupied) == (40, 0, 4)


async def test_one_that_does_not_fit_does_not_hold_up_others(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, budget=100, room_timeout_s=60, load_concurrency=2)
    loader.parts["leased"] = dict.fromkeys(share("leased"), 50)
    lease = await cache.lease(version("leased"), 5)
    for number in range(3):
        loader.parts[f"large-{number}"] = dict.fromkeys(share(f"l{number}"), 80)
    large = [asyncio.create_task(use(cache, f"large-{n}")) for n in range(3)]
    await settle()
    await asyncio.wait_for(use(cache, "a", "b"), 30)  # there is room for these beside the leased one
    fetches = len(loader.fetches)
    await use(cache, "a", "b", "a", "b")
    assert len(loader.fetches) == fetches, "those that wait do not fetch again and again"
    lease.release()
    await asyncio.wait_for(asyncio.gather(*large), 30)


async def test_loads_that_wait_for_room_do_not_hold_what_the_other_needs(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, budget=60, room_timeout_s=5, load_concurrency=4)
    for name in "xy":
        loader.parts[name] = {**dict.fromkeys(share(f"base-{name}"), 25), **share(f"head-{name}")}
        loader.parts[f"{name}2"] = {**loader.parts[name], **dict.fromkeys(share(f"more-{name}"), 20)}
        del loader.parts[f"{name}2"][Part(f"head-{name}", "F32", (1,))]
    await use(cache, "x")
    holder = await cache.lease(version("x"), 5)
    waiting = [asyncio.create_task(use(cache, name)) for name in ("y", "y2", "x2")]
    await settle()
    holder.release()
    await asyncio.wait_for(asyncio.gather(*waiting), 30)
    parts = {one for name in held(cache) for one in loader.parts[name].items()}
    assert cache.ledger.held_bytes == sum(size for _, size in parts) <= 60
    assert (cache.ledger.reserved_bytes, cache.occupied) == (0, len(held(cache)))


async def test_a_failed_load_wakes_who_waits_for_what_it_held(loader: FakeLoader) -> None:
    cache = make(loader, slots=10, budget=40, room_timeout_s=5, load_concurrency=4)
    loader.parts |= {
        "a": dict.fromkeys(share("base"), 30),
        "gated-b": {**dict.fromkeys(share("base"), 30), **share("own")},
        "c": dict.fromkeys(share("c"), 40),
    }
    await use(cache, "a")
    loader.errors["gated-b"] = Corrupt("bad")
    failing = asyncio.create_task(cache.lease(version("gated-b"), 5))
    await settle()
    waiting = asyncio.create_task(cache.lease(version("c"), 5))
    await settle()
    loader.gate("gated-b").set()
    with pytest.raises(Corrupt):
        await failing
    (await asyncio.wait_for(waiting, 30)).release()


async def test_closing_fails_who_waits_also_for_a_load_that_has_not_begun(loader: FakeLoader) -> None:
    cache = make(loader)
    waiter = cache._loads.join(version("a"), 5)
    await cache.close(1)
    with pytest.raises(NoRoom, match="stopping"):
        await asyncio.wait_for(waiter, 30)
    with pytest.raises(NoRoom, match="stopping"):
        await cache.lease(version("b"), 1)


async def test_a_version_withdrawn_while_it_loads_never_becomes_resident(loader: FakeLoader) -> None:
    cache = make(loader)
    loading = asyncio.create_task(cache.lease(version("gated-a"), 5))
    await settle()
    cache.withdraw(ModelKey("gated-a", 1))
    loader.gate("gated-a").set()
    with pytest.raises(NotFound):
        await loading
    assert (held(cache), cache.occupied, cache.ledger.held_bytes) == (set(), 0, 0)


# -- pins, quarantine, erasure, the node's own files


async def test_a_pinned_model_is_not_evicted_until_it_is_unpinned(loader: FakeLoader) -> None:
    cache = make(loader, slots=2)
    await cache.preload(version("vip"), 5, pin=True)
    await use(cache, "a", "b", "c")
    assert held(cache) == {"vip", "c"}
    assert {info.tenant for info in cache.snapshot() if info.pinned} == {"vip"}
    assert cache.unpin(ModelKey("vip", 1))
    assert not cache.unpin(ModelKey("vip", 1))
    await use(cache, "d")
    assert held(cache) == {"c", "d"}


async def test_pins_always_leave_room_for_others(loader: FakeLoader) -> None:
    cache = make(loader, slots=2, budget=100)
    await cache.preload(version("vip"), 5, pin=True)
    with pytest.raises(NoRoom, match="would leave none of 2 slots"):
        await cache.preload(version("vip2"), 5, pin=True)
    await cache.preload(version("vip"), 5, pin=True)  # again is harmless
    cache = make(loader, slots=10, budget=100)
    loader.parts["fat"] = share(*"123456")
    with pytest.raises(NoRoom, match="more than half"):
        await cache.preload(version("fat"), 5, pin=True)


async def test_a_quarantined_slot_is_lost_until_an_operator_unloads_it(loader: FakeLoader) -> None:
    cache = make(loader, slots=2)
    lease = await cache.lease(version("a"), 5)
    cache.quarantine(lease)
    lease.release()
    assert (held(cache), cache.occupied, cache.stats.quarantined) == (set(), 1, 1)
    assert [info.state for info in cache.snapshot()] == [State.QUARANTINED]
    await use(cache, "a", "b")  # loaded anew, into the slot that is left
    assert (held(cache), cache.occupied) == ({"b"}, 2)
    assert cache.unload(ModelKey("a", 1))
    assert (cache.occupied, len(cache.snapshot())) == (1, 1)


async def test_an_erased_tenant_is_gone_and_its_load_under_way_never_arrives(loader: FakeLoader) -> None:
    cache = make(loader, slots=4)
    await use(cache, "gone")
    lease = await cache.lease(version("gone", 2), 5)
    loading = asyncio.create_task(cache.lease(version("gated-gone"), 5))
    await settle()
    assert cache.erase("gone").models == 2
    assert cache.erase("gated-gone").models == 0
    loader.gate("gated-gone").set()
    with pytest.raises(NotFound, match="erased"):
        await loading
    assert (held(cache), cache.occupied) == (set(), 1)
    lease.release()
    assert cache.occupied == 0


def shares(**given: TenantBounds) -> BoundsOf:
    return lambda tenant: given.get(tenant.partition("-")[0], NO_BOUNDS)


async def test_nobody_is_evicted_below_its_floor(loader: FakeLoader) -> None:
    size = sum(loader.check(version("kept")).values())
    cache = make(loader, slots=8, bounds_of=shares(kept=TenantBounds(floor_bytes=2 * size)))
    for number in (1, 2, 3):
        (await cache.lease(version("kept", number), 5)).release()
    for number in range(24):
        (await cache.lease(version(f"flood-{number}"), 5)).release()
    kept = [one for one in cache.resident_records() if one.tenant == "kept"]
    assert sorted(one.version for one in kept) == [2, 3], "the third was above the floor"
    assert cache.occupied == 8


async def test_a_floor_of_many_bytes_keeps_a_part_of_the_slots_only(loader: FakeLoader) -> None:
    cache = make(loader, slots=8, bounds_of=shares(kept=TenantBounds(floor_bytes=10**9)))
    for number in range(1, 9):
        (await cache.lease(version("kept", number), 5)).release()
    assert cache.occupied == 8
    await use(cache, "a", "b", "c", "d", "e", "f", "g", "h")
    kept = [one for one in cache.resident_records() if one.tenant == "kept"]
    assert sorted(one.version for one in kept) == [7, 8], "one slot in four"


@pytest.mark.parametrize(
    ("slots", "budget", "most"), [(8, None, 7), (64, 80, 8)], ids=["slots bind", "bytes bind"]
)
async def test_floors_of_all_together_leave_room_for_others(
    loader: FakeLoader, slots: int, budget: int | None, most: int
) -> None:
    """A floor in a plan is every tenant's: they can't all be kept, and nobody else could ever load."""
    size = sum(loader.check(version("t-0")).values())
    cache = make(
        loader,
        slots=slots,
        budget=budget,
        bounds_of=lambda tenant: TenantBounds(floor_bytes=size),
        room_timeout_s=1,
    )
    for number in range(20):
        await use(cache, f"t-{number}")
    assert cache.is_resident(ModelKey.of(version("t-19")))
    kept = {tenant for tenant in held(cache) if int(tenant.partition("-")[2]) < most + 1}
    assert len(kept) == most, "all but an eighth, and no more, is kept for those who had it"


async def test_a_tenant_may_evict_below_its_own_floor(loader: FakeLoader) -> None:
    size = sum(loader.check(version("kept")).values())
    cache = make(loader, slots=1, bounds_of=shares(kept=TenantBounds(floor_bytes=size)), room_timeout_s=0.05)
    for number in (1, 2):
        (await cache.lease(version("kept", number), 5)).release()
    assert sorted(one.version for one in cache.resident_records()) == [2]
    with pytest.raises(NoRoom):  # others can't
        await cache.lease(version("other"), 5)


async def test_a_tenant_at_its_cap_evicts_its_own_models_only(loader: FakeLoader) -> None:
    size = sum(loader.check(version("many")).values())
    cache = make(
        loader, slots=6, bounds_of=shares(many=TenantBounds(cap_bytes=2 * size)), room_timeout_s=0.05
    )
    await use(cache, "other-1", "other-2")
    for number in range(1, 8):
        (await cache.lease(version("many", number), 5)).release()
    assert sorted(one.version for one in cache.resident_records() if one.tenant == "many") == [6, 7]
    assert {"other-1", "other-2"} <= held(cache)
    with await cache.lease(version("many", 6), 5), await cache.lease(version("many", 7), 5):
        with pytest.raises(ResidentOverQuota, match="is in use"):
            await cache.lease(version("many", 8), 5)
    (await cache.lease(version("many", 8), 5)).release()  # it was not remembered
    # While a model is in use its successor waits for it, rather than fail: a promotion at the cap ends well.
    patient = make(loader, slots=6, bounds_of=shares(many=TenantBounds(cap_bytes=size)), room_timeout_s=5)
    old = await patient.lease(version("many", 1), 5)
    new = asyncio.create_task(patient.lease(version("many", 2), 5))
    await settle()
    assert not new.done()
    old.release()
    (await new).release()
    assert [one.version for one in patient.resident_records()] == [2]
    tiny = make(loader, slots=6, bounds_of=shares(many=TenantBounds(cap_bytes=size - 1)))
    with pytest.raises(ResidentOverQuota, match="may keep"):
        await tiny.lease(version("many", 1), 5)
    assert tiny.occupied == 0


async def test_a_flood_of_loads_does_not_hold_up_another_tenants(loader: FakeLoader) -> None:
    cache = make(loader, slots=40, load_concurrency=1)
    flood = [asyncio.create_task(cache.lease(version("gated-x", number), 60)) for number in range(1, 30)]
    await settle()
    victim = asyncio.create_task(cache.lease(version("victim"), 60))
    await settle()
    loader.gate("gated-x").set()
    for task in [victim, *flood]:
        (await task).release()
    assert loader.fetches.index("victim@1") <= 2, "it waited behind one or two of them, not behind all"


async def test_what_is_erased_is_overwritten_when_its_last_lease_ends(loader: FakeLoader) -> None:
    cache = make(loader, slots=4)
    lease = await cache.lease(version("gone"), 5)
    await use(cache, "stays")
    told = cache.erase("gone")
    assert not await cache.erased("gone", 0.01)
    assert loader.scrubbed == []
    waiting = asyncio.create_task(cache.erased("gone", 5))
    await settle()
    lease.release()
    assert await waiting
    assert loader.scrubbed == [version("gone").digest]
    assert (told.models, told.overwritten_bytes) == (1, 7)
    assert held(cache) == {"stays"}
    assert cache.erase("gone") is told, "asked again, it tells the same"


async def test_promise_11_a_store_that_hangs_does_not_hold_up_the_nodes_own_files(loader: FakeLoader) -> None:
    cache = make(loader, slots=12, load_concurrency=2)
    hanging = [asyncio.create_task(cache.lease(version(f"gated-{n}"), 60)) for n in range(5)]
    await settle()
    loader.local = {f"here-{n}" for n in range(6)}
    for name in sorted(loader.local):
        with await asyncio.wait_for(cache.lease(version(name), 30), 30) as lease:
            assert lease.tier == Tier.HOST
    for number in range(5):
        loader.gate(f"gated-{number}").set()
    for task in hanging:
        (await task).release()


async def test_a_scan_drives_out_the_hot_ones_under_lru_but_not_under_sieve(loader: FakeLoader) -> None:
    for policy, stays in ((None, False), (Sieve(), True)):
        cache = make(loader, slots=4, policy=policy)
        await use(cache, "hot-1", "hot-2", "hot-1", "hot-2")
        for number in range(10):  # the hot ones go on being used, but more rarely than the scan goes on
            await use(cache, f"scan-{number}", f"scan-{number}-b", f"scan-{number}-c")
            if {"hot-1", "hot-2"} <= held(cache):
                await use(cache, "hot-1", "hot-2")
        assert ({"hot-1", "hot-2"} <= held(cache)) is stays
        assert cache.occupied == 4


@pytest.fixture(autouse=True)
def no_task_is_left(loader: FakeLoader) -> Iterator[None]:
    yield
    for gate in loader.gates.values():
        gate.set()
