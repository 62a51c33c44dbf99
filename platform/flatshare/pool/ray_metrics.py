"""A few of a replica's counters in Ray's own metrics, for users of Ray's pipeline (agents, dashboard).

Every ten seconds Ray gets what was counted since the last time. A call of ``ray.serve.metrics`` takes 3 to
5 us, which is too much for each request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from ray.serve.metrics import Counter

from flatshare.replica.exposition import REPLICA_FAMILIES, samples_of
from flatshare.replica.snapshot import ReplicaSnapshot

__all__ = ["TOLD", "tell_ray"]

logger = logging.getLogger("flatshare.pool")

EVERY_S: Final = 10.0
"""Seconds between two updates: Ray's agent does not read more often."""

TOLD: Final = (
    "flatshare_requests",
    "flatshare_request_errors",
    "flatshare_leases",
    "flatshare_loads",
    "flatshare_evictions",
)
"""The counters. Ray adds the replica's own labels, ``ray_`` before and ``_total`` behind the name."""


async def tell_ray(snapshot: Callable[[], Awaitable[ReplicaSnapshot]], every_s: float = EVERY_S) -> None:
    """Tell Ray's metrics what a replica counts, until cancelled."""
    families = {one.name: one for one in REPLICA_FAMILIES if one.name in TOLD}
    counters = {
        name: Counter(name, description=one.help, tag_keys=cast("Any", one.labels[1:]))  # mis-typed in 2.60
        for name, one in families.items()
    }
    told: dict[tuple[object, ...], float] = {}

    def tell(one: ReplicaSnapshot) -> None:
        for name, (_, *labels), value in samples_of(one):
            if name not in counters or value is None:
                continue
            more = value - told.get((name, *labels), 0)
            if more > 0:
                tags = dict(zip(families[name].labels[1:], map(str, labels), strict=True))
                counters[name].inc(more, tags)
                told[name, *labels] = value

    while True:
        await asyncio.sleep(every_s)
        try:
            tell(await snapshot())
        except Exception:
            logger.exception("Ray's metrics were not told, and are tried again")
