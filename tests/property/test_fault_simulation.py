"""Thousands of seeded interleavings of loads that fail, hang, are slow, or turn out corrupt.

Time is simulated: the loop's clock jumps to the next timer, so that 30-second deadlines cost nothing and a
seed always gives the same run. ``FLATSHARE_TEST_SEEDS=100000`` runs more of them.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Collection

from torch import nn

from flatshare.errors import DeadlineExceeded, ModelFailed, NoRoom
from flatshare.models.stages import Model
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.residency.policy import POLICIES
from flatshare.weights.loader import Held, Placed, Prepared
from flatshare.weights.tiers import ModelKey, Part, Tier
from flatshare_registry.errors import Corrupt, NotFound, Unavailable
from flatshare_registry.records import VersionRecord, utc

from ..simulated_time import in_simulated_time

SEEDS = int(os.environ.get("FLATSHARE_TEST_SEEDS", "2000"))
REQUESTS = 40
SLOTS = 4
BUDGET = 100
EXPECTED = (Corrupt, Unavailable, NoRoom, DeadlineExceeded, ModelFailed, NotFound)


def parts_of(record: VersionRecord) -> dict[Part, int]:
    number = int(record.tenant[1:])
    shared = Part(f"base{number % 3}", "F32", ())
    return {shared: 15, Part(f"own{number}-{record.version}", "F32", ()): 10 + number % 4 * 5}


class HostileLoader:
    """Each load takes a random time and ends as the seed has it."""

    def __init__(self, chosen: random.Random) -> None:
        self.chosen = chosen
        self.local: set[str] = set()
        self.loading: Counter[str] = Counter()
        self.most = 0

    def check(self, record: VersionRecord) -> dict[Part, int]:
        return parts_of(record)

    def hold(self, record: VersionRecord) -> dict[Part, object]:
        return dict.fromkeys(parts_of(record))

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
        return 0

    async def prepare_local(self, record: VersionRecord, held: Held) -> Prepared | None:
        if record.name not in self.local:
            return None
        await asyncio.sleep(self.chosen.choice([0, 0, 0.001]))
        return self.made(record, Tier.HOST)

    async def prepare(self, record: VersionRecord, held: Held, timeout_s: float) -> Prepared:
        self.loading[record.name] += 1
        assert self.loading[record.name] == 1, "promise 5: one load of a version at a time"
        self.most = max(self.most, sum(self.loading.values()))
        try:
            fate = self.chosen.random()
            await asyncio.sleep(
                1000 if fate < 0.03 else self.chosen.expovariate(20)
            )  # hangs, or takes its time
            if fate < 0.10:
                raise Unavailable("down")
            if fate < 0.15:
                raise Corrupt("flipped")
            if fate < 0.18:
                raise ModelFailed("does not answer its probe")
        finally:
            self.loading[record.name] -= 1
        self.local.add(record.name)
        return self.made(record, Tier.STORE)

    def made(self, record: VersionRecord, tier: Tier) -> Prepared:
        module = nn.Identity()
        module.mark = record.name  # type: ignore[assignment]  # to check answers by
        return Prepared({}, tier, Model((module,), digest=record.digest))

    async def place(self, record: VersionRecord, prepared: Prepared, held: Held) -> Placed:
        await asyncio.sleep(self.chosen.choice([0, 0.002]))
        if self.chosen.random() < 0.03:
            raise ModelFailed("out of memory")
        assert prepared.model is not None
        return Placed(prepared.model, parts_of(record))


async def scenario(seed: int, seen: Counter[str]) -> None:
    chosen = random.Random(seed)
    loop = asyncio.get_running_loop()
    loader = HostileLoader(chosen)
    ledger = Ledger(SLOTS, BUDGET)

    def check() -> None:
        assert ledger.held_bytes + ledger.reserved_bytes <= BUDGET
        assert 0 <= ledger.slots_taken <= SLOTS

    cache = ModelCache(
        ledger=ledger, loader=loader, load_concurrency=2, room_timeout_s=chosen.choice([0.5, 5]), fetch_timeout_s=2,
        policy=POLICIES[chosen.choice(sorted(POLICIES))](), on_change=check, clock=loop.time, wall_clock=loop.time,
    )  # fmt: skip

    async def request(number: int) -> None:
        record = VersionRecord(
            tenant=f"t{min(int(chosen.expovariate(0.25)), 11)}", version=chosen.choice([1, 1, 2]), architecture="x",
            digest="0" * 64, size_bytes=0, tensors=(), created_at=utc(0), created_by="test",
        )  # fmt: skip
        await asyncio.sleep(chosen.uniform(0, 3))
        try:
            with await cache.lease(record, chosen.choice([0.01, 1, 30])) as lease:
                check()
                assert lease.model.stages[0].mark == record.name, "promise 1"
                await asyncio.sleep(chosen.expovariate(30))
                assert lease.model.stages[0].mark == record.name, "promise 3: it must not be freed meanwhile"
                assert lease.is_intact(id(lease.model))
                if chosen.random() < 0.02:
                    cache.quarantine(lease)
                seen[f"tier {lease.tier.value}"] += 1
        except EXPECTED as error:
            seen[type(error).__name__] += 1
        finally:
            check()

    async def disturb() -> None:
        for _ in range(12):
            await asyncio.sleep(chosen.expovariate(4))
            tenant = f"t{chosen.randrange(6)}"
            match chosen.randrange(4):
                case 0:
                    cache.unload(ModelKey(tenant, 1))
                case 1:
                    cache.erase(tenant)
                    assert not any(one.tenant == tenant for one in cache.resident_records())
                case 2:
                    cache.forget_failures(tenant)
                case _:
                    cache.withdraw(ModelKey(tenant, 2))

    tasks = [asyncio.create_task(request(number)) for number in range(REQUESTS)]
    disturbing = asyncio.create_task(disturb())
    for task in chosen.sample(tasks, 8):
        loop.call_later(chosen.uniform(0, 4), task.cancel)
    await asyncio.gather(*tasks, disturbing, return_exceptions=True)
    for task in (*tasks, disturbing):
        if not task.cancelled() and task.exception() is not None:
            raise AssertionError(f"seed {seed}") from task.exception()
    assert loader.most <= 2
    await cache.close(60)
    for key in {ModelKey(info.tenant, info.version) for info in cache.snapshot()}:
        cache.unload(key)  # what is in quarantine waits for an operator
    while cache.snapshot():
        cache.unload(ModelKey(cache.snapshot()[0].tenant, cache.snapshot()[0].version))
    assert (ledger.held_bytes, ledger.reserved_bytes, ledger.slots_taken) == (0, 0, 0), f"seed {seed} leaks"


def a_version(tenant: str) -> VersionRecord:
    return VersionRecord(
        tenant=tenant, version=1, architecture="x", digest="0" * 64, size_bytes=0, tensors=(), created_at=utc(0),
        created_by="test",
    )  # fmt: skip


class HangingLoader(HostileLoader):
    """The store takes requests and never answers."""

    async def prepare(self, record: VersionRecord, held: Held, timeout_s: float) -> Prepared:
        self.loading[record.name] += 1
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def prepare_local(self, record: VersionRecord, held: Held) -> Prepared | None:
        return self.made(record, Tier.HOST) if record.name in self.local else None


def test_promise_11_with_a_store_that_hangs_everybody_gets_503_and_nobody_a_hang() -> None:
    """With the times of the settings' defaults; 24 cold tenants, 4 of whom ask the store at a time."""
    ended: Counter[str] = Counter()

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        cache = ModelCache(
            ledger=Ledger(10, None), loader=HangingLoader(random.Random(0)), load_concurrency=4, room_timeout_s=30,
            fetch_timeout_s=10, clock=loop.time, wall_clock=loop.time,
        )  # fmt: skip

        async def request(number: int) -> None:
            try:
                await cache.lease(a_version(f"t{number}"), 29.4)
            except Unavailable:
                ended["Unavailable"] += 1
                assert loop.time() < 10.1

        await asyncio.gather(*(request(number) for number in range(24)))
        await asyncio.sleep(5)  # and later it is asked again
        again = asyncio.create_task(cache.lease(a_version("t30"), 29.4))
        await asyncio.sleep(1)
        assert not again.done(), "the store is asked"
        again.cancel()
        await cache.close(1)

    in_simulated_time(scene())
    assert ended == {"Unavailable": 24}


def test_all_slots_leased_is_503_and_says_so() -> None:
    """Not a time-out: the load is ready and waits for a lease to end, up to the request's deadline."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        loader = HangingLoader(random.Random(0))
        loader.local = {"t1@1", "t2@1"}
        cache = ModelCache(
            ledger=Ledger(1, None), loader=loader, room_timeout_s=30, clock=loop.time, wall_clock=loop.time
        )
        with await cache.lease(a_version("t1"), 29.4):
            try:
                await cache.lease(a_version("t2"), 29.4)
            except NoRoom as error:
                assert "in use" in error.message and error.retry_after_s and loop.time() < 30
            else:
                raise AssertionError("there is no room")
        await asyncio.sleep(1)
        assert cache.stats.evictions == 0, "nobody waits any more: nothing is evicted for nobody"
        await cache.close(1)

    in_simulated_time(scene())


def test_no_seed_breaks_a_promise_or_leaks() -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        in_simulated_time(scenario(seed, seen))
    for outcome in (
        "tier device",
        "tier host",
        "tier store",
        "Corrupt",
        "Unavailable",
        "NoRoom",
        "DeadlineExceeded",
    ):
        assert seen[outcome] > SEEDS // 200, (outcome, seen)
