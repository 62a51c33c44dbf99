"""A loader whose steps the test holds in its hand, and versions and parts for it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from torch import nn

from flatshare.models.stages import Model
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.weights.loader import Held, Placed, Prepared
from flatshare.weights.tiers import Part, Tier
from flatshare_registry.records import VersionRecord, utc

SIZE = 8


def version(tenant: str, number: int = 1) -> VersionRecord:
    return VersionRecord(
        tenant=tenant, version=number, architecture="tiny", digest=(f"{tenant}@{number}".encode().hex() + "0" * 64)[:64],
        size_bytes=SIZE, tensors=(), created_at=utc(0), created_by="test",
    )  # fmt: skip


def part(name: str) -> Part:
    return Part(name, "F32", (1,))


class ScriptedLoader:
    """Loads at once, but for versions with a gate, parts or an error of their own; each by the version's name.

    Attributes
    ----------
    preparing, placing
        Where a version waits, if there is an entry for it.
    parts
        What it holds, if not one tensor of its own of ``SIZE`` bytes.
    """

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.placed: list[str] = []
        self.preparing: dict[str, asyncio.Event] = {}
        self.placing: dict[str, asyncio.Event] = {}
        self.parts: dict[str, dict[Part, int]] = {}
        self.prepare_errors: dict[str, Exception] = {}
        self.place_errors: dict[str, Exception] = {}
        self.scrubbed: list[str] = []
        self.let_go_of = 0

    def check(self, record: VersionRecord) -> dict[Part, int]:
        return self.parts.get(record.name, {part(record.name): SIZE})

    def hold(self, record: VersionRecord) -> dict[Part, object]:
        return dict.fromkeys(self.check(record))

    def distrust(self, record: VersionRecord) -> None:
        pass  # keeps nothing between loads

    def let_go(self) -> None:
        self.let_go_of += 1

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
        self.scrubbed += sorted(one.digest for one in parts)
        return SIZE * len(parts)

    async def prepare_local(self, record: VersionRecord, held: Held) -> Prepared | None:
        return None

    async def prepare(self, record: VersionRecord, held: Held, timeout_s: float) -> Prepared:
        self.prepared.append(record.name)
        if record.name in self.preparing:
            await self.preparing[record.name].wait()
        if record.name in self.prepare_errors:
            raise self.prepare_errors[record.name]
        return Prepared({}, Tier.STORE, Model((nn.Identity(),), digest=record.digest))

    async def place(self, record: VersionRecord, prepared: Prepared, held: Held) -> Placed:
        self.placed.append(record.name)
        if record.name in self.placing:
            await self.placing[record.name].wait()
        if record.name in self.place_errors:
            raise self.place_errors[record.name]
        assert prepared.model is not None
        return Placed(prepared.model, self.check(record))


def make(loader: ScriptedLoader, slots: int = 4, budget: int | None = None, **options: object) -> ModelCache:
    return ModelCache(ledger=Ledger(slots, budget), loader=loader, **options)  # type: ignore[arg-type]  # test options


def resident(cache: ModelCache) -> set[str]:
    return {record.name for record in cache.resident_records()}


async def use(cache: ModelCache, *versions: VersionRecord) -> None:
    for one in versions:
        (await cache.lease(one, 5)).release()


async def settle() -> None:
    """Let everything that can run without outside help run."""
    for _ in range(30):
        await asyncio.sleep(0)
