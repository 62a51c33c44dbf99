"""The story of a request where its parts meet: probes of reloaded models, quarantine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.device.cpu import CpuDevice
from flatshare.engine.inference import Inference
from flatshare.engine.quotas import QuotaKeeper
from flatshare.errors import IsolationBroken, ModelFailed, Overloaded
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare.replica.request import InferenceService
from flatshare.replica.ticket import Prediction
from flatshare.replica.usage import UsageCounter
from flatshare.residency.fair_semaphore import FairSemaphore
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.resolution.heads import TenantHeads
from flatshare.resolution.resolver import Resolver
from flatshare.resolution.swaps import Swaps
from flatshare.weights.device_loader import PROOF_S, DeviceLoader
from flatshare.weights.fetch import TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare.weights.tiers import LeaseTag, ModelKey, State, Tier
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import NotFound
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import ManualClock
from flatshare_registry.usage import UsedVersion

NETWORK = architecture("mnist-cnn")
ROWS = NETWORK.preprocess(torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8).numpy())
ACME = ModelKey("acme", 1)


class World:
    def __init__(self, threads: ThreadPoolExecutor, folder: Path) -> None:
        store = MemoryStore()
        registry = Registry(store)
        registry.create_tenant(TenantId("acme"))
        torch.manual_seed(4)
        self.module = NETWORK.build()
        registry.register(
            TenantId("acme"), save(dict(self.module.state_dict())), NETWORK.name, NETWORK.tensors,
            probe=lambda weights: probe_logits(NETWORK, weights),
        )  # fmt: skip
        view = TenantHeads(registry, threads, ttl_s=60)
        source = TensorSource(store, HostTier(folder, 10**9))
        self.clock = ManualClock(0.0)
        self.loader = DeviceLoader(source, CpuDevice(), threads, threads, clock=self.clock)
        self.cache = ModelCache(ledger=Ledger(4, None), loader=self.loader)
        self.inference = Inference(CpuDevice())
        self.service = InferenceService(
            resolver=Resolver(view, Swaps(self.cache, view.record, timeout_s=5)), cache=self.cache,
            inference=self.inference, admission=FairSemaphore(8, 8), cold=FairSemaphore(8, 0), quotas=QuotaKeeper(), timeout_s=10,
            usage=UsageCounter(MemoryStore(), "test", threads, 0),
        )  # fmt: skip

    async def ask(self, rows: NDArray[np.float32] = ROWS) -> Prediction:
        with await self.service.enter(LOCAL_OPERATOR, ModelRef.parse("acme")) as ticket:
            return await self.service.predict(ticket, lambda network: rows)

    def right(self) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self.module(torch.from_numpy(ROWS))
            return logits


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ThreadPoolExecutor(2) as threads:
        world = World(threads, tmp_path)
        yield world
        world.inference.close()


async def test_a_reload_answers_its_probe_with_its_first_rows_and_rightly(world: World) -> None:
    first = await world.ask()
    world.cache.unload(ACME)
    world.clock.advance(PROOF_S + 1)
    again = await world.ask()
    assert (first.tier, again.tier) == (Tier.STORE, Tier.HOST)
    assert world.inference.rows == 6, "the probe's row is nobody's"
    for prediction in (first, again, await world.ask()):
        torch.testing.assert_close(torch.from_numpy(prediction.logits), world.right(), rtol=1e-5, atol=1e-5)


async def test_a_model_whose_memory_was_damaged_never_answers(world: World) -> None:
    await world.ask()
    world.cache.unload(ACME)
    world.clock.advance(PROOF_S + 1)
    for part, tensor in world.loader._warm._tensors.items():
        if part.shape == (64, 32, 3, 3):
            tensor += 0.1  # this process's own copy, in channels-last order
    with pytest.raises(ModelFailed, match="does not answer its probe"):
        await world.ask()
    assert not world.cache.is_resident(ACME)
    with pytest.raises(ModelFailed, match="does not answer its probe"):
        await world.ask()  # remembered
    # Asked to try again, it is loaded anew from the node's checked files, not from the damaged memory.
    world.cache.forget_failures("acme")
    torch.testing.assert_close(
        torch.from_numpy((await world.ask()).logits), world.right(), rtol=1e-5, atol=1e-5
    )


async def test_a_bad_row_does_not_condemn_a_model_that_still_owes_its_probe(world: World) -> None:
    await world.ask()
    world.cache.unload(ACME)
    world.clock.advance(PROOF_S + 1)
    small = ROWS[:, :, :5, :5].copy()  # no network of this shape takes it
    with pytest.raises(ModelFailed, match="failed in its forward pass"):
        await world.ask(small)
    assert world.cache.is_resident(ACME), "a caller's input must not take the model away from the others"
    torch.testing.assert_close(
        torch.from_numpy((await world.ask()).logits), world.right(), rtol=1e-5, atol=1e-5
    )


async def test_a_slot_that_fails_an_isolation_check_is_quarantined_and_the_next_request_is_served(
    world: World,
) -> None:
    await world.ask()
    original = world.cache._residency.grant

    def swapped(one, tier):  # type: ignore[no-untyped-def]  # as _grant
        held = original(one, tier)
        one.tag = LeaseTag("initech", 1, "1" * 64, 100)
        return held

    world.cache._residency.grant = swapped  # type: ignore[method-assign]  # a slot changes hands under a lease
    with pytest.raises(IsolationBroken):
        await world.ask()
    world.cache._residency.grant = original  # type: ignore[method-assign]
    assert world.cache.stats.quarantined == 1
    assert [info.state for info in world.cache.snapshot()] == [State.QUARANTINED]
    torch.testing.assert_close(
        torch.from_numpy((await world.ask()).logits), world.right(), rtol=1e-5, atol=1e-5
    )
    assert world.cache.occupied == 2


async def test_answers_and_failures_are_counted_alike_on_both_ways_and_refusals_are_not(world: World) -> None:
    used = world.service.usage._used
    key = UsedVersion("acme", 1)
    small = ROWS[:, :, :5, :5].copy()  # no network of this shape takes it

    async def begun(rows: NDArray[np.float32]) -> Prediction | Exception:
        answered: asyncio.Future[Prediction | Exception] = asyncio.get_running_loop().create_future()
        with await world.service.enter(LOCAL_OPERATOR, ModelRef.parse("acme")) as ticket:
            ticket.hold_bytes(50)
            assert world.service.begin(ticket, lambda network: rows, answered.set_result)
            return await answered

    first = await world.ask()
    assert isinstance(await begun(ROWS), Prediction)
    one = used[key]
    assert (one.requests, one.rows, one.cold_loads, one.body_bytes, one.failed) == (2, 6, 1, 50, 0)
    assert sum(one.labels) == 6 and one.labels[first.label_list()[0]] >= 2
    with pytest.raises(ModelFailed):
        await world.ask(small)
    assert isinstance(await begun(small), ModelFailed)
    assert (one.requests, one.failed) == (2, 2)

    world.service.fence(TenantId("acme"), 60)
    with pytest.raises(NotFound):
        await world.ask()
    world.service._fences.clear()
    world.cache.unload(ACME)
    world.service.cold = FairSemaphore(0, 0)
    with pytest.raises(Overloaded):
        await world.ask()
    assert (one.requests, one.failed) == (2, 2), "a refusal is no failure"
    assert world.service.usage.stats.durations[Tier.DEVICE].seconds > 0
