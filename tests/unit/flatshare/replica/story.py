"""A real service on a real registry in memory, whose loads and passes the test holds in its hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.engine.quotas import QuotaKeeper
from flatshare.models.stages import Model
from flatshare.replica.request import InferenceService
from flatshare.replica.ticket import Prediction, Ticket
from flatshare.replica.usage import UsageCounter
from flatshare.residency.fair_semaphore import FairSemaphore
from flatshare.residency.lease import Lease
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.resolution.heads import TenantHeads
from flatshare.resolution.resolver import Resolver
from flatshare.resolution.swaps import Swaps
from flatshare.weights.loader import Held, Placed, Prepared
from flatshare.weights.tiers import Part, Tier
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.records import Quotas, VersionRecord
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import ManualClock
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights

ACME, GLOBEX = TenantId("acme"), TenantId("globex")
T = TypeVar("T")


class AtOnce(Executor):
    """Does the work where it is asked for: nothing here blocks."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class GatedLoader:
    """Loads at once, or when the gate of a version's name is opened."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    def check(self, record: VersionRecord) -> dict[Part, int]:
        return {Part(record.digest, "F32", (2,)): 8}

    def hold(self, record: VersionRecord) -> dict[Part, object]:
        return {}

    def distrust(self, record: VersionRecord) -> None:
        pass  # keeps nothing between loads

    def let_go(self) -> None:
        pass  # keeps nothing between loads

    overwrites_what_leaves = False

    def scrub_held(self, held: Held, parts: Collection[Part], model: Model | None) -> int:
        return 0

    async def settle(self) -> None:
        pass  # overwrites at once

    def scrub(self, model: Model, parts: Collection[Part]) -> int:
        return 0

    async def prepare_local(self, record: VersionRecord, held: Held) -> Prepared | None:
        return None

    async def prepare(self, record: VersionRecord, held: Held, timeout_s: float) -> Prepared:
        self.loads.append(record.name)
        if record.name in self.gates:
            await self.gates[record.name].wait()
        return Prepared({}, Tier.STORE, Model((nn.Identity(),), digest=record.digest))

    async def place(self, record: VersionRecord, prepared: Prepared, held: Held) -> Placed:
        assert prepared.model is not None
        return Placed(prepared.model, self.check(record))


class GatedRuns:
    """A pass that answers zeros, at once or when it is let on."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.gate: asyncio.Event | None = None
        self.entered = asyncio.Event()

    async def run(
        self, lease: Lease, rows: NDArray[np.float32], background: bool = False
    ) -> NDArray[np.float32]:
        self.ran.append(lease.record.name)
        self.entered.set()
        if self.gate is not None:
            await self.gate.wait()
        return np.zeros((len(rows), 10), dtype=np.float32)


class Story:
    """Two tenants with a version each."""

    def __init__(
        self, *, slots: int = 4, timeout_s: float = 5.0, threads: Executor | None = None, store: Any = None,
        cold: FairSemaphore | None = None,
    ) -> None:  # fmt: skip
        self.clock = ManualClock(1000.0)
        self.registry = Registry(store or MemoryStore())
        self.loader, self.runs = GatedLoader(), GatedRuns()
        for value, tenant in enumerate((ACME, GLOBEX)):
            self.registry.create_tenant(tenant)
            self.register(tenant, value + 1)
        self.heads = TenantHeads(self.registry, threads or AtOnce(), ttl_s=60)
        self.cache = ModelCache(ledger=Ledger(slots, None), loader=self.loader, room_timeout_s=60)
        self.quotas = QuotaKeeper(clock=self.clock)
        self.cold = cold or FairSemaphore(8, 8)
        self.swaps = Swaps(self.cache, self.heads.record, timeout_s=5)
        self.service = InferenceService(
            resolver=Resolver(self.heads, self.swaps), cache=self.cache,
            inference=self.runs, admission=FairSemaphore(8, 8), cold=self.cold, quotas=self.quotas,
            timeout_s=timeout_s, clock=self.clock, usage=UsageCounter(MemoryStore(), "test", ThreadPoolExecutor(1), 0),)  # fmt: skip

    def register(self, tenant: TenantId, value: float, architecture: str = "mnist-cnn") -> int:
        done = self.registry.register(tenant, tiny_weights(value), architecture, TINY_SPECS)
        return done.version.version

    async def limit(self, tenant: TenantId = ACME, **quotas: float) -> None:
        self.registry.tenancy.set_quotas(tenant, Quotas.model_validate(quotas))
        await self.heads.refresh(tenant)

    async def enter(self, ref: str = "acme", within: Ticket | None = None) -> Ticket:
        return await self.service.enter(LOCAL_OPERATOR, ModelRef.parse(ref), within=within)

    async def ask(self, ref: str = "acme", rows: int = 1) -> Prediction:
        with await self.enter(ref) as ticket:
            return await self.service.predict(ticket, lambda network: rows_of(rows))

    @property
    def leases(self) -> int:
        """Of all models."""
        return sum(info.leases for info in self.cache.snapshot())


def rows_of(number: int) -> NDArray[np.float32]:
    return np.zeros((number, 1, 28, 28), dtype=np.float32)


async def settle() -> None:
    """Let everything that can run without outside help run."""
    for _ in range(20):
        await asyncio.sleep(0)
