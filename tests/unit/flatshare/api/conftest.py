"""A data plane over ASGI, with a real service on a store in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from flatshare.api.app import create_app
from flatshare.api.hot import HotRoutes
from flatshare.api.identity import Identities, OperatorKeys, Role
from flatshare.device.cpu import CpuDevice
from flatshare.engine.inference import Inference
from flatshare.engine.quotas import QuotaKeeper
from flatshare.models.architecture import architecture
from flatshare.replica.request import InferenceService
from flatshare.replica.usage import UsageCounter
from flatshare.residency.fair_semaphore import FairSemaphore
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.resolution.heads import TenantHeads
from flatshare.resolution.resolver import Resolver
from flatshare.resolution.swaps import Swaps
from flatshare.weights.device_loader import DeviceLoader
from flatshare.weights.fetch import TensorSource
from flatshare.weights.tiers import ModelKey
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.keys import new_key
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import FaultyStore, ManualClock

NETWORK = architecture("mnist-cnn")


class World:
    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.down = False
        self.clock, self.wall_clock = ManualClock(0.0), ManualClock()
        store = MemoryStore()
        self.registry = Registry(store, clock=self.wall_clock)
        self.modules: dict[str, nn.Module] = {}
        faulty = self.faulty = FaultyStore(store, before=self._before)
        self.heads = TenantHeads(Registry(faulty), threads, ttl_s=2)
        self.cache = ModelCache(
            ledger=Ledger(2, None),
            loader=DeviceLoader(TensorSource(faulty), CpuDevice(), threads, threads),
        )
        self.inference = Inference(CpuDevice())
        self.admission = FairSemaphore(8, 8)
        self.cold = FairSemaphore(16, 0)
        self.service = InferenceService(
            resolver=Resolver(self.heads, Swaps(self.cache, self.heads.record, timeout_s=5)),
            cache=self.cache,
            inference=self.inference,
            admission=self.admission,
            cold=self.cold,
            quotas=QuotaKeeper(clock=self.clock),
            timeout_s=5,
            usage=UsageCounter(MemoryStore(), "test", ThreadPoolExecutor(1), 0),
        )
        self.operators = {role: new_key(role.name).text for role in Role}
        self.app = self.secured(None)

    def secured(self, operators: OperatorKeys | None) -> HotRoutes:
        """The same data plane with authentication on, or off for None."""
        return create_app(
            self.service,
            Identities(self.heads, operators, clock=self.wall_clock),
            replica="r1",
            max_body_bytes=150_000,
            max_rows=8,
        )

    def close(self) -> None:
        """End its thread and drop all weights: FastAPI remembers every app's functions, and so this, for good."""
        self.inference.close()
        for record in self.cache.resident_records():
            self.cache.unload(ModelKey.of(record))
        for meta in list(self.registry.store.list("")):
            self.registry.store.delete(meta.key)
        self.modules.clear()

    def _before(self, operation: str, key: str) -> None:
        if self.down:
            raise Unavailable("s3://secret-bucket is down")

    def add(self, tenant: str, seed: int) -> None:
        torch.manual_seed(seed)
        module = self.modules[tenant] = NETWORK.build()
        self.registry.create_tenant(TenantId(tenant))
        self.registry.register(
            TenantId(tenant), save(dict(module.state_dict())), NETWORK.name, NETWORK.tensors
        )

    def logits(self, tenant: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return self.modules[tenant](torch.from_numpy(rows)).numpy()  # type: ignore[no-any-return]  # an array

    def right(self, tenant: str, rows: NDArray[np.float32]) -> list[int]:
        return self.logits(tenant, rows).argmax(axis=1).tolist()  # type: ignore[no-any-return]  # ints


@pytest.fixture
def world() -> Iterator[World]:
    with ThreadPoolExecutor(2) as threads:
        world = World(threads)
        for seed, tenant in enumerate(("acme", "globex", "initech")):
            world.add(tenant, seed)
        yield world
        world.close()


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=world.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
