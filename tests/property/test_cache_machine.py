"""The model cache against a plain model: any interleaving of leases, failures, cancels and unloads."""

from __future__ import annotations

import asyncio

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from flatshare.cache.lease import Lease
from flatshare.cache.loading import Fetched, Placed
from flatshare.cache.model_cache import ModelCache
from flatshare.cache.tiers import ModelKey, Tier
from flatshare_registry.errors import Corrupt
from flatshare_registry.records import VersionRecord, utc

SLOTS = 3
TENANTS = st.sampled_from([f"t{n}" for n in range(6)])


def version(tenant: str) -> VersionRecord:
    return VersionRecord(
        tenant=tenant, version=1, architecture="x", digest="0" * 64, size_bytes=0, tensors=(),
        created_at=utc(0), created_by="test",
    )  # fmt: skip


class Loader:
    """Every load waits until the machine ends it, well or badly."""

    def __init__(self) -> None:
        self.open: dict[str, asyncio.Future[None]] = {}
        self.begun: list[str] = []

    async def fetch(self, record: VersionRecord) -> Fetched:
        self.begun.append(record.tenant)
        future = self.open[record.tenant] = asyncio.get_running_loop().create_future()
        try:
            await future
        finally:
            self.open.pop(record.tenant, None)
        return Fetched(b"", Tier.STORE)

    def check(self, record: VersionRecord) -> None:
        pass

    async def prepare(self, record: VersionRecord, fetched: Fetched) -> nn.Module:
        module = nn.Identity()
        module.tenant = record.tenant  # type: ignore[assignment]  # a mark to check answers by
        return module

    async def place(self, record: VersionRecord, module: nn.Module) -> Placed:
        return Placed(module, 1)


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.loader = Loader()
        self.told: set[str] = set()
        self.cache = self.run(self.build())
        self.held: list[tuple[str, Lease]] = []
        self.waiting: list[tuple[str, asyncio.Task[Lease]]] = []

    async def build(self) -> ModelCache:
        return ModelCache(
            slots=SLOTS,
            source=self.loader,
            placer=self.loader,
            load_concurrency=2,
            room_timeout_s=1000,
            on_change=self.changed,
        )

    def changed(self) -> None:
        self.told = {record.tenant for record in self.cache.resident_records()}

    def run(self, work: object) -> object:
        return self.loop.run_until_complete(work)  # type: ignore[call-overload]  # a coroutine

    def settle(self) -> None:
        async def steps() -> None:
            for _ in range(25):
                await asyncio.sleep(0)

        self.run(steps())
        still: list[tuple[str, asyncio.Task[Lease]]] = []
        for tenant, task in self.waiting:
            if not task.done():
                still.append((tenant, task))
            elif not task.cancelled() and task.exception() is None:
                self.held.append((tenant, task.result()))
            elif not task.cancelled():
                assert isinstance(task.exception(), Corrupt), task.exception()
        self.waiting = still

    @rule(tenant=TENANTS)
    def ask(self, tenant: str) -> None:
        async def start() -> asyncio.Task[Lease]:
            return asyncio.create_task(self.cache.lease(version(tenant), 1000))

        self.waiting.append((tenant, self.run(start())))  # type: ignore[arg-type]  # a task
        self.settle()

    @precondition(lambda self: self.loader.open)
    @rule(data=st.data(), well=st.booleans())
    def end_a_load(self, data: st.DataObject, well: bool) -> None:
        tenant = data.draw(st.sampled_from(sorted(self.loader.open)))
        evictions = self.cache.stats.evictions
        others = len(self.cache._loads) > 1
        future = self.loader.open[tenant]
        if well:
            future.set_result(None)
        else:
            future.set_exception(Corrupt("scripted"))
        self.settle()
        if not well:
            # Promise 2: a failing load evicts nothing; only another one that waited for its turn may.
            assert others or self.cache.stats.evictions == evictions
            self.cache.forget_failures(tenant)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        _, lease = self.held.pop(index)
        lease.release()
        self.settle()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.waiting) - 1))
        _, task = self.waiting[index]
        task.cancel()
        self.settle()

    @rule(tenant=TENANTS)
    def unload(self, tenant: str) -> None:
        self.cache.unload(ModelKey(tenant, 1))
        self.settle()

    @invariant()
    def slots_hold(self) -> None:
        assert self.cache.occupied <= SLOTS

    @invariant()
    def leased_models_live_and_are_the_right_ones(self) -> None:
        for tenant, lease in self.held:
            assert lease.module.tenant == tenant  # type: ignore[comparison-overlap]  # the mark
            assert lease.current_receipt() == lease.receipt

    @invariant()
    def leases_are_counted_exactly(self) -> None:
        counted = {(info.tenant, id(info)): info.leases for info in self.cache.snapshot()}
        assert sum(counted.values()) == len(self.held)

    @invariant()
    def what_is_told_is_what_is_held(self) -> None:
        assert self.told == {record.tenant for record in self.cache.resident_records()}

    @invariant()
    def a_version_loads_once_at_a_time(self) -> None:
        loading = list(self.cache._loads)
        assert len(loading) == len(set(loading))
        assert len(self.loader.open) <= 2

    def teardown(self) -> None:
        for _, task in self.waiting:
            task.cancel()
        for future in list(self.loader.open.values()):
            future.cancel()
        for _, lease in self.held:
            lease.release()
        self.run(self.cache.close(1))
        assert self.cache.occupied == 0
        self.settle()
        self.loop.close()


CacheMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase
