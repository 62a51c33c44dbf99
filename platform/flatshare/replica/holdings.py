"""What a replica offers to placement: its load, the models that it holds, and loading models in advance."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from flatshare.placement.homes import canonical
from flatshare.placement.load import Held, ReplicaLoad
from flatshare.replica.load import LoadMeter
from flatshare.residency.model_cache import ModelCache
from flatshare.resolution.resolver import Resolver
from flatshare_registry.records import VersionRecord

__all__ = ["Holdings"]

logger = logging.getLogger("flatshare.replica")

MOST_POPULAR: Final = 16
POPULAR_AFTER_S: Final = 20.0
"""Number of models whose rates a replica reports, and the seconds over which a newly loaded model's requests
are counted.
"""


@dataclass(frozen=True, slots=True)
class Holdings:
    """One replica, as the fleet sees it. To be used on its event loop.

    Attributes
    ----------
    preload
        Makes what a ref means resident; raises when it can't.
    """

    replica: str
    cache: ModelCache
    resolver: Resolver
    meter: LoadMeter
    preload: Callable[[str], Awaitable[object]]

    def load(self, place: int) -> ReplicaLoad:
        """How busy it was in the last seconds.

        Parameters
        ----------
        place
            Its number on the ring.
        """
        seen = self.meter.measured()
        models: dict[str, float] = {}
        also: dict[str, list[str]] = {}
        for key, ongoing in seen.models.items():
            record = self.cache.record_of(key)
            if record is not None:
                ref, *others = self._refs(record)
                models[ref], also[ref] = ongoing, others
        popular: dict[str, float] = {}
        for rate, record in self._most_asked():
            ref, *others = self._refs(record)
            popular[ref], also[ref] = rate, others
        return ReplicaLoad(
            self.replica,
            place,
            seen.ongoing,
            seen.loading,
            seen.requests_per_s,
            seen.idle_s,
            models,
            popular,
            {ref: others for ref, others in also.items() if others},
        )

    def _most_asked(self) -> list[tuple[float, VersionRecord]]:
        """The models with the most requests a second since they were loaded, with these rates."""
        now = time.time()
        rates = [
            (hits / max(now - loaded_at, POPULAR_AFTER_S), record)
            for record, hits, loaded_at, _ in self.cache.uses()
        ]
        return heapq.nlargest(MOST_POPULAR, rates, key=lambda one: one[0])

    def held(self, place: int) -> Held:
        """What it holds, by the refs that requests most likely name; most recently used first."""
        latest = sorted(self.cache.uses(), key=lambda one: one[3], reverse=True)
        return Held(self.replica, place, self.cache.slots, [self._refs(record)[0] for record, *_ in latest])

    def _refs(self, record: VersionRecord) -> list[str]:
        """What a version is called, the likeliest first: the tenant, an alias, the number."""
        refs = {canonical(ref) for ref in self.resolver.refs_of(record)}
        return sorted(refs, key=lambda ref: ("@" in ref, ":" in ref, ref))

    async def warm(self, refs: Sequence[str], within_s: float) -> list[str]:
        """Load models before their requests come, as time and room allow; returns those that are here.

        Parameters
        ----------
        refs
            Most recently used first; the first is loaded last, and evicted last.
        """

        async def one(ref: str) -> str | None:
            try:
                await self.preload(ref)
            except Exception as error:  # one that fails must not cost the others
                logger.info("%s was not loaded in advance: %s", ref, error)
                return None
            return ref

        tasks = [asyncio.create_task(one(ref)) for ref in reversed(refs)]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=within_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        return [ref for task in tasks if not task.cancelled() and (ref := task.result()) is not None]
