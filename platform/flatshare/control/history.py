"""The last hour of the fleet in a few numbers, for viewers of the page: how busy, how warm, how fast.

The numbers come from the replicas' counters, four times a minute, and are kept in this process's memory:
after a restart of the control plane they begin anew. Prometheus keeps more, and longer (METRICS.md).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, Field

from flatshare.control.fleet import Fleet
from flatshare.replica.snapshot import ReplicaSnapshot
from flatshare.residency.stats import Durations
from flatshare.weights.tiers import Tier
from flatshare_registry.usage import OTHERS

__all__ = ["History", "HistoryReply"]

logger = logging.getLogger("flatshare.control")

EVERY_S: Final = 15.0
POINTS: Final = 240
BUSIEST: Final = 10


class PointReply(BaseModel):
    """What happened since the point before."""

    at: float = Field(description="POSIX seconds.")
    requests_per_s: float = Field(description="Requests that got a model.")
    device: float | None = Field(description="Share of them that found it on the device; null without any.")
    p50: float | None = Field(description="Milliseconds of a request; null without any.")
    p99: float | None


class BusyTenant(BaseModel):
    """A tenant with many requests in the last minute."""

    tenant: str
    requests_per_s: float


class HistoryReply(BaseModel):
    """The last hour."""

    points: list[PointReply] = Field(description="Oldest first; one each 15 s.")
    tenants: list[BusyTenant] = Field(description="The busiest first.")


@dataclass(frozen=True, slots=True)
class _Counted:
    """What one replica had counted."""

    hits: dict[Tier, int]
    durations: list[int]


class History:
    """Keeps the last hour. To be used on one event loop."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float] = time.time) -> None:
        self._fleet = fleet
        self._clock = clock
        self._points: deque[PointReply] = deque(maxlen=POINTS)
        self._before: dict[str, _Counted] = {}
        self._at = clock()
        self._busiest: list[BusyTenant] = []

    @property
    def reply(self) -> HistoryReply:
        """What is kept now."""
        return HistoryReply(points=list(self._points), tenants=self._busiest)

    async def run(self) -> None:
        """Look again and again; raises nothing."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                self.add((await self._fleet.view()).snapshots)
            except Exception as error:  # ray has a dozen kinds; a point is missing
                logger.warning("the fleet could not be looked at: %s", type(error).__name__)

    def add(self, snapshots: Sequence[ReplicaSnapshot]) -> None:
        """Take what replicas have counted until now. What a new replica has counted before is left out."""
        now = self._clock()
        hits = dict.fromkeys(Tier, 0)
        durations = Durations()
        after: dict[str, _Counted] = {}
        tenants: dict[str, float] = {}
        for one in snapshots:
            took = [
                sum(counts)
                for counts in zip(*(each.counts for each in one.requests.durations.values()), strict=True)
            ]
            counted = after[one.replica] = _Counted(dict(one.stats.hits), took)
            before = self._before.get(one.replica, counted)
            for tier in Tier:
                hits[tier] += counted.hits[tier] - before.hits[tier]
            durations.counts = [
                total + new - old
                for total, new, old in zip(durations.counts, counted.durations, before.durations, strict=True)
            ]
            for tenant, rate in one.requests.busiest:
                tenants[tenant] = tenants.get(tenant, 0.0) + rate
        requests = sum(hits.values())
        p50, p99 = (durations.quantile_s(share) for share in (0.5, 0.99))
        self._points.append(
            PointReply(
                at=now,
                requests_per_s=requests / max(now - self._at, 1e-3),
                device=hits[Tier.DEVICE] / requests if requests else None,
                p50=None if p50 is None else p50 * 1e3,
                p99=None if p99 is None else p99 * 1e3,
            )
        )
        tenants.pop(OTHERS, None)
        ordered = sorted(tenants.items(), key=lambda one: -one[1])[:BUSIEST]
        self._busiest = [BusyTenant(tenant=tenant, requests_per_s=rate) for tenant, rate in ordered]
        self._before, self._at = after, now
