"""The model cache against a plain model with a byte counter.

Any interleaving of loads that end well or badly, leases, cancels, evictions, promotions, pins, unloads,
erasures, a store that is down, and models that share parts. The plain model counts parts by itself:
what it says is held must be what the ledger says, at every step and at every change in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from flatshare.errors import NeverFits, NoRoom
from flatshare.models.stages import Model
from flatshare.residency.lease import Lease
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.residency.policy import POLICIES
from flatshare.resolution.swaps import Swaps
from flatshare.weights.loader import Held, Placed, Prepared
from flatshare.weights.tiers import ModelKey, Part, State, Tier
from flatshare_registry.errors import Corrupt, NotFound, Unavailable
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.records import Action, AuditEntry, TenantHead, VersionRecord, utc

SLOTS = 4
BUDGET = 100
NAMES = [f"t{n}" for n in range(5)]
TENANTS = st.sampled_from(NAMES)
VERSIONS = st.sampled_from([1, 2, 3])
EXPECTED = (Corrupt, Unavailable, NoRoom, NeverFits, NotFound)


def version(tenant: str, number: int) -> VersionRecord:
    return VersionRecord(
        tenant=tenant, version=number, architecture="x", digest=f"{NAMES.index(tenant)}{number}".ljust(64, "0"),
        size_bytes=0, tensors=(), created_at=utc(0), created_by="test",
    )  # fmt: skip


def parts_of(record: VersionRecord) -> dict[Part, int]:
    """A base that all even tenants share, one that a tenant's versions share, and something of one's own."""
    index = NAMES.index(record.tenant)
    parts = {
        Part(f"tenant{index}", "F32", ()): 10,
        Part(f"own{index}-{record.version}", "F32", ()): 10 + 5 * index,
    }
    if index % 2 == 0:
        parts[Part("base", "F32", ())] = 25
    if (index, record.version) == (4, 3):
        parts[Part("huge", "F32", ())] = 1000  # can never fit
    return parts


def head(tenant: str, production: int, revision: int) -> TenantHead:
    entry = AuditEntry(
        id="0", tenant=tenant, revision=revision, at=datetime.now(UTC), actor="test", action=Action.ALIAS_SET
    )
    return TenantHead(
        tenant=tenant, revision=revision, next_version=4,
        versions={number: version(tenant, number).digest for number in (1, 2, 3)},
        aliases={"production": production}, created_at=datetime.now(UTC), last_entry=entry,
    )  # fmt: skip


class Loader:
    """Every load from the store waits until the machine ends it, well or badly."""

    def __init__(self) -> None:
        self.open: dict[str, asyncio.Future[None]] = {}
        self.local: set[str] = set()
        self.down = False

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
        return self._prepared(record, Tier.HOST) if record.name in self.local else None

    async def prepare(self, record: VersionRecord, held: Held, timeout_s: float) -> Prepared:
        if self.down:
            raise Unavailable("down")
        future = self.open[record.name] = asyncio.get_running_loop().create_future()
        try:
            await future
        finally:
            self.open.pop(record.name, None)
        self.local.add(record.name)
        return self._prepared(record, Tier.STORE)

    def _prepared(self, record: VersionRecord, tier: Tier) -> Prepared:
        module = nn.Identity()
        module.mark = record.name  # type: ignore[assignment]  # to check answers by
        return Prepared({}, tier, Model((module,), digest=record.digest))

    async def place(self, record: VersionRecord, prepared: Prepared, held: Held) -> Placed:
        assert prepared.model is not None
        return Placed(prepared.model, parts_of(record))


class CacheMachine(RuleBasedStateMachine):
    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.loader = Loader()
        self.told: set[str] = set()
        self.ledger = Ledger(SLOTS, BUDGET)
        self.heads = {tenant: head(tenant, 1, 1) for tenant in NAMES}
        self.held: list[tuple[VersionRecord, Lease]] = []
        self.waiting: list[tuple[VersionRecord, asyncio.Task[Lease]]] = []
        self.pinned: set[ModelKey] = set()
        self.run(self.build())

    async def build(self) -> None:
        self.cache = ModelCache(
            ledger=self.ledger, loader=self.loader, load_concurrency=2, room_timeout_s=1000,
            policy=POLICIES[self.policy](), on_change=self.changed,
        )  # fmt: skip

        async def record_of(tenant: TenantId, number: int) -> VersionRecord:
            return version(str(tenant), number)

        self.swaps = Swaps(self.cache, record_of, timeout_s=1000)

    def changed(self) -> None:
        self.told = {record.name for record in self.cache.resident_records()}
        self.bytes_and_slots_hold()  # also in the middle of things

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def settle(self) -> None:
        async def steps() -> None:
            for _ in range(40):
                await asyncio.sleep(0)

        self.run(steps())
        still: list[tuple[VersionRecord, asyncio.Task[Lease]]] = []
        for record, task in self.waiting:
            if not task.done():
                still.append((record, task))
            elif not task.cancelled() and task.exception() is None:
                self.held.append((record, task.result()))
            elif not task.cancelled():
                assert isinstance(task.exception(), EXPECTED), task.exception()
        self.waiting = still
        self.pinned &= {ModelKey.of(record) for record in self.cache.resident_records()}

    def within(self, work: Any) -> Any:
        """Run something that calls into the cache on its loop, then let everything settle."""

        async def call() -> Any:
            return work()

        result = self.run(call())
        self.settle()
        return result

    # -- rules

    @rule(tenant=TENANTS, number=VERSIONS)
    def ask(self, tenant: str, number: int) -> None:
        record = version(tenant, number)
        task = self.within(lambda: asyncio.ensure_future(self.cache.lease(record, 1000)))
        if task.done():
            self.settle()
        if all(task is not one for _, one in self.waiting) and not task.done():
            self.waiting.append((record, task))
        elif task.done() and task.exception() is None:
            self.held.append((record, task.result()))
        elif task.done():
            assert isinstance(task.exception(), EXPECTED), task.exception()

    @rule(tenant=TENANTS)
    def ask_by_alias(self, tenant: str) -> None:
        """Promise 1 and 10: what serves is what the head says, or the version from before the promotion."""
        ref = ModelRef(TenantId(tenant), ModelRef.parse(tenant).selector)
        serving = self.within(lambda: self.swaps.serving(ref))
        if serving is not None:
            lease = self.within(lambda: self.cache.try_lease(serving))
            assert lease is not None, "a swap must not make a request wait"
            self.held.append((serving, lease))

    @precondition(lambda self: self.loader.open)
    @rule(data=st.data(), well=st.booleans())
    def end_a_load(self, data: st.DataObject, well: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.loader.open)))
        evictions = self.cache.stats.evictions
        others = len(self.cache.loading) > 1
        future = self.loader.open[name]
        self.within(lambda: future.set_result(None) if well else future.set_exception(Corrupt("scripted")))
        if not well:
            # Promise 2: a failing load evicts nothing; only another one that waited for its turn may.
            assert others or self.cache.stats.evictions == evictions
            self.cache.forget_failures(name.partition("@")[0])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.within(lease.release)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        _, task = self.waiting[data.draw(st.integers(0, len(self.waiting) - 1))]
        self.within(task.cancel)

    @rule(tenant=TENANTS, number=VERSIONS)
    def promote(self, tenant: str, number: int) -> None:
        old = self.heads[tenant]
        new = self.heads[tenant] = head(tenant, number, old.revision + 1)
        self.within(lambda: self.swaps.moved(old, new))

    @rule(tenant=TENANTS, number=VERSIONS)
    def pin(self, tenant: str, number: int) -> None:
        record = version(tenant, number)
        if self.cache.is_resident(ModelKey.of(record)):
            task = self.within(lambda: asyncio.ensure_future(self.cache.preload(record, 1000, pin=True)))
            assert task.done()
            if task.exception() is None:
                self.pinned.add(ModelKey.of(record))
            else:
                assert isinstance(task.exception(), NoRoom)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.pinned)))
        self.pinned.discard(key)
        assert self.within(lambda: self.cache.unpin(key))

    @rule(tenant=TENANTS, number=VERSIONS)
    def unload(self, tenant: str, number: int) -> None:
        self.pinned.discard(ModelKey(tenant, number))
        self.within(lambda: self.cache.unload(ModelKey(tenant, number)))

    @rule(tenant=TENANTS)
    def erase(self, tenant: str) -> None:
        self.pinned = {key for key in self.pinned if key.tenant != tenant}
        self.within(lambda: self.cache.erase(tenant))
        assert not any(record.tenant == tenant for record in self.cache.resident_records())

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        _, lease = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        key = ModelKey.of(lease.record)
        self.pinned.discard(key)
        self.within(lambda: self.cache.quarantine(lease))
        self.within(lambda: self.cache.unload(key))  # the operator clears it, or the slot were lost

    @rule()
    def store_goes_down_or_comes_back(self) -> None:
        self.loader.down = not self.loader.down
        for tenant in NAMES:
            self.cache.forget_failures(tenant)

    # -- what must hold

    @invariant()
    def bytes_and_slots_hold(self) -> None:
        assert self.ledger.held_bytes + self.ledger.reserved_bytes <= BUDGET
        assert 0 <= self.ledger.slots_taken <= SLOTS
        assert self.ledger.reserved_bytes >= 0

    @invariant()
    def the_ledger_counts_what_is_there(self) -> None:
        infos = self.cache.snapshot()
        parts: dict[Part, int] = {}
        for info in infos:
            parts |= parts_of(version(info.tenant, info.version))
        held = sum(parts.values())
        if self.cache.loading:
            assert self.ledger.held_bytes >= held  # a load holds what it counts on
        else:
            assert (self.ledger.held_bytes, self.ledger.reserved_bytes) == (held, 0)
            assert self.ledger.slots_taken == len(infos)

    @invariant()
    def leased_models_live_and_are_the_right_ones(self) -> None:
        for record, lease in self.held:
            assert lease.model.stages[0].mark == record.name == lease.record.name
            assert lease.is_intact(id(lease.model))

    @invariant()
    def leases_are_counted_exactly(self) -> None:
        assert sum(info.leases for info in self.cache.snapshot()) == len(self.held)

    @invariant()
    def what_is_told_is_what_is_held(self) -> None:
        assert self.told == {record.name for record in self.cache.resident_records()}

    @invariant()
    def pinned_models_stay(self) -> None:
        assert all(self.cache.is_pinned(key) for key in self.pinned)

    @invariant()
    def nothing_that_left_lingers(self) -> None:
        for info in self.cache.snapshot():
            assert info.state is State.RESIDENT or info.leases

    @invariant()
    def a_version_loads_once_at_a_time(self) -> None:
        assert len(self.cache.loading) == len(set(self.cache.loading))
        assert len(self.loader.open) <= 2

    def teardown(self) -> None:
        self.within(self.swaps.close)
        for _, task in self.waiting:
            task.cancel()
        for future in list(self.loader.open.values()):
            future.cancel()
        self.settle()
        for _, lease in self.held:
            lease.release()
        self.held.clear()
        self.run(self.cache.close(1))
        assert (self.cache.occupied, self.ledger.held_bytes, self.ledger.reserved_bytes) == (0, 0, 0)
        self.settle()
        self.loop.close()


class SieveMachine(CacheMachine):
    policy = "sieve"


CacheMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
SieveMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase
TestSieveMachine = SieveMachine.TestCase
