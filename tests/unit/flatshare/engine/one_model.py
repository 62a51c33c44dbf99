"""A cache of one model that is here already, made of the stages that a test gives."""

from __future__ import annotations

import threading
from collections.abc import Collection

import torch
from torch import nn

from flatshare.models.stages import Model
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import ModelCache
from flatshare.weights.loader import Held, Placed, Prepared
from flatshare.weights.tiers import Part, Tier
from flatshare_registry.records import VersionRecord

DIGEST = "0" * 64


def record_of(architecture: str) -> VersionRecord:
    return VersionRecord.model_validate(
        {"tenant": "acme", "version": 1, "architecture": architecture, "digest": DIGEST, "size_bytes": 0,
         "tensors": [], "created_at": "2026-01-01T00:00:00Z", "created_by": "test"}
    )  # fmt: skip


class OneModel:
    """A loader of it; it may still owe its probe."""

    def __init__(self, model: Model, proven: bool = True) -> None:
        self.model, self.proven = model, proven

    def check(self, record: VersionRecord) -> dict[Part, int]:
        return {}

    def hold(self, record: VersionRecord) -> dict[Part, object]:
        return {}

    def distrust(self, record: VersionRecord) -> None:
        pass  # keeps nothing between loads

    def let_go(self) -> None:
        pass  # keeps nothing between loads

    overwrites_what_leaves = False

    def scrub(self, model: Model, parts: Collection[Part]) -> int:
        return 0

    def scrub_held(self, held: Held, parts: Collection[Part], model: Model | None) -> int:
        return 0

    async def settle(self) -> None:
        pass  # overwrites nothing

    async def prepare_local(self, record: VersionRecord, held: Held) -> Prepared | None:
        return Prepared({}, Tier.HOST, self.model)

    async def prepare(self, record: VersionRecord, held: Held, timeout_s: float) -> Prepared:
        raise AssertionError("it is here")

    async def place(self, record: VersionRecord, prepared: Prepared, held: Held) -> Placed:
        return Placed(self.model, {}, self.proven)


def cache_of(*stages: nn.Module, digest: str = DIGEST, proven: bool = True, threads: int = 1) -> ModelCache:
    model = Model(stages, digest=digest, threads=threads)
    return ModelCache(ledger=Ledger(1, None), loader=OneModel(model, proven))


class Gate(nn.Module):
    """Waits inside the forward pass until it is let on."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.go.wait(10)
        return rows.flatten(1)
