"""The ledger against torch's allocator, simulated: never over budget, and nobody refused while an unleased model could go."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping

import torch
from torch import nn

from flatshare.device.cuda import MIB, CudaDevice
from flatshare.device.testing.allocator import Block, CachingAllocator
from flatshare.device.testing.simulated_cuda import SimulatedCuda
from flatshare.errors import DeviceFull, NoRoom
from flatshare.models.stages import Model
from flatshare.residency.lease import Lease
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.weights.loader import Held, Placed, Prepared
from flatshare.weights.tiers import ModelKey, Part, Tier
from flatshare_registry.records import VersionRecord

HISTORIES = 10_000
FOOTPRINT = CudaDevice(SimulatedCuda()).footprint


def record_of(tenant: str, digest: str) -> VersionRecord:
    return VersionRecord.model_validate(
        {"tenant": tenant, "version": 1, "architecture": "x", "digest": digest, "size_bytes": 0,
         "tensors": [], "created_at": "2026-01-01T00:00:00Z", "created_by": "test"}
    )  # fmt: skip


class OnAllocator:
    """A loader onto an allocator: what a tensor takes is what the allocator cuts for it."""

    overwrites_what_leaves = True

    def __init__(self, allocator: CachingAllocator, sizes: Mapping[str, list[int]]) -> None:
        self.allocator = allocator
        self.sizes = sizes
        self.blocks: dict[str, list[Block]] = {}

    def parts(self, record: VersionRecord) -> dict[Part, int]:
        sizes = self.sizes[record.tenant]
        return {
            Part(f"{record.tenant}{number}", "U8", (size,)): FOOTPRINT(size)
            for number, size in enumerate(sizes)
        }

    def check(self, record: VersionRecord) -> dict[Part, int]:
        return self.parts(record)

    def hold(self, record: VersionRecord) -> dict[Part, object]:
        return {}

    def distrust(self, record: VersionRecord) -> None:
        pass

    def let_go(self) -> None:
        pass

    def stop(self, tenant: str) -> None:
        pass

    async def ended(self, tenant: str, timeout_s: float) -> bool:
        return True

    def scrub(self, model: Model, parts: Collection[Part]) -> int:
        for block in self.blocks.pop(model.architecture):  # it goes now: nobody else has them here
            self.allocator.free(block)
        return 0

    def scrub_held(self, held: Held, parts: Collection[Part], model: Model | None) -> int:
        return 0

    async def settle(self) -> None:
        pass

    async def prepare_local(self, record: VersionRecord, held: Held) -> Prepared | None:
        return Prepared({}, Tier.HOST)

    async def prepare(self, record: VersionRecord, held: Held, timeout_s: float) -> Prepared:
        raise AssertionError("it is here")

    async def place(self, record: VersionRecord, prepared: Prepared, held: Held) -> Placed:
        await asyncio.sleep(0)
        blocks: list[Block] = []
        try:
            for size in self.sizes[record.tenant]:
                blocks.append(self.allocator.allocate(size, 1))
        except torch.OutOfMemoryError as error:
            for block in blocks:
                self.allocator.free(block)
            raise DeviceFull("no memory") from error
        self.blocks[record.tenant] = blocks
        return Placed(Model((nn.Identity(),), {}, record.digest, record.tenant), self.parts(record))


async def history(seed: int) -> tuple[int, int]:
    """One random history; how many models were evicted, and how often the allocator had refused."""
    chosen = random.Random(seed)
    tenants = [f"t{number}" for number in range(chosen.randint(6, 16))]
    unit = chosen.choice([MIB // 8, MIB, 3 * MIB])
    sizes = {one: [chosen.randint(1, 4 * unit) for _ in range(chosen.randint(1, 5))] for one in tenants}
    largest = max(sum(map(FOOTPRINT, one)) for one in sizes.values())
    budget = largest * chosen.randint(2, 5)
    # What others have of it varies: from all that the budget promises to a good part less.
    allocator = CachingAllocator(
        int(budget * chosen.choice([1.2, 1.0, 0.8])) + 22 * MIB, expandable_segments=chosen.random() < 0.3
    )
    ledger = Ledger(chosen.choice([4, 1000]), budget)
    loader = OnAllocator(allocator, sizes)
    cache = ModelCache(ledger=ledger, loader=loader, room_timeout_s=0)
    records = {one: record_of(one, "0" * 64) for one in tenants}
    leases: list[Lease] = []
    for _ in range(chosen.randint(10, 40)):
        if leases and chosen.random() < 0.6:
            leases.pop(chosen.randrange(len(leases))).release()
        wanted = records[chosen.choice(tenants)]
        try:
            leases.append(await cache.lease(wanted, 5))
        except NoRoom:
            could_go = [one for one in cache._residency.lendable() if not one.leases]
            fits_alone = not any(one.leases for one in cache._residency.held())
            assert not (
                could_go and allocator_could(allocator, loader, sizes[wanted.tenant], could_go, ledger)
            ), seed
            assert not fits_alone or allocator.total_bytes < 2 * largest + 22 * MIB, seed
        assert ledger.held_bytes + ledger.reserved_bytes <= budget
        assert allocator.reserved <= allocator.total_bytes
        taken = [ModelKey.of(one.record) for one in cache._residency.held()]
        assert len(set(taken)) == ledger.slots_taken <= ledger.slots
        assert set(loader.blocks) == {key.tenant for key in taken}
    for one in leases:
        one.release()
    return cache.stats.evictions, cache._loads.refusals


def allocator_could(
    allocator: CachingAllocator, loader: OnAllocator, sizes: list[int], could_go: list, ledger: Ledger
) -> bool:
    """Whether all who are not in use could make room for it, by the ledger's count and by the allocator's."""
    freed = sum(one.size_bytes for one in could_go)
    if ledger.held_bytes - freed + sum(map(FOOTPRINT, sizes)) > (ledger.budget_bytes or 0):
        return False
    if ledger.slots_taken - len(could_go) >= ledger.slots:
        return False
    for one in could_go:
        for block in loader.blocks[one.record.tenant]:
            allocator.free(block)
    blocks: list[Block] = []
    try:
        for size in sizes:
            blocks.append(allocator.allocate(size, 1))
        return True
    except torch.OutOfMemoryError:
        return False


async def test_never_over_budget_and_never_refused_while_somebody_could_go() -> None:
    evicted = refused = 0
    for seed in range(HISTORIES):
        one, other = await history(seed)
        evicted, refused = evicted + one, refused + other
    assert evicted > HISTORIES
    assert refused > HISTORIES // 10, "the allocator had less than the ledger, often"
