"""What the registry's change feed has told one replica: which heads are unchanged, and which to read.

Nothing runs while there are no requests. A request that finds a head too old starts a look at the feed, one
for all tenants. A head whose change was not announced is current as of the start of that look.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from cachetools import TTLCache

from flatshare.single_flight import SingleFlight
from flatshare_registry.feed import ANNOUNCED_S, OVERLAP_S, Announcement, ChangeFeed
from flatshare_registry.ids import TenantId

__all__ = ["Changes"]

logger = logging.getLogger("flatshare.resolution")

GAP_S: Final = 60.0
"""If two looks are more seconds apart than this, the feed says nothing about older heads: these are read."""

FAILED_S: Final = 1.0
"""Seconds after a look that failed until the next one."""

MAX_ANNOUNCED: Final = 100_000
"""Most tenants whose announced change was not seen yet; beyond it all heads are read."""


class Changes:
    """Follows a change feed. All methods must be called on one event loop.

    Parameters
    ----------
    feed
        Asked in threads.
    threads
        Where the blocking calls run.
    ttl_s
        Seconds that a look is believed.
    on_announced
        Called with each tenant whose head is about to change or has changed, and with its new revision.
    clock
        Seconds that only rise.
    wall
        POSIX seconds, to be compared with writers' clocks.
    """

    def __init__(
        self,
        feed: ChangeFeed,
        threads: Executor,
        *,
        ttl_s: float,
        on_announced: Callable[[TenantId, int], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._feed = feed
        self._threads = threads
        self._ttl_s = ttl_s
        self._on_announced = on_announced
        self._clock = clock
        self._wall = wall
        self._since: float | None = None  # the feed was followed without a gap from here
        self._looked_at = float("-inf")
        self._looked_at_wall = 0.0
        self._failed_at = float("-inf")
        self._seen: frozenset[str] = frozenset()
        self._announced: TTLCache[TenantId, int] = TTLCache(MAX_ANNOUNCED, ANNOUNCED_S, clock)
        self._looks: SingleFlight[str, None] = SingleFlight("look at")

    @property
    def is_followed(self) -> bool:
        """Whether the last look succeeded, and recently: heads that it did not name need no read."""
        return self._failed_at < self._looked_at and self._clock() - self._looked_at <= 2 * self._ttl_s

    @property
    def age_s(self) -> float | None:
        """Seconds since the feed was last read; None if it was not yet."""
        return self._clock() - self._looked_at if self._since is not None else None

    def follows(self, confirmed_at: float) -> bool:
        """Whether a head that was current then needs no read until a change of it is announced."""
        return self.is_followed and self._since is not None and confirmed_at >= self._since

    def is_due(self, tenant: TenantId, revision: int) -> bool:
        """Whether a later revision than this one was announced, so that the head must be read."""
        return self._announced.get(tenant, 0) > revision

    def current_at(self, tenant: TenantId, revision: int, confirmed_at: float) -> float:
        """When a head was last known to be current.

        Parameters
        ----------
        revision
            The head's.
        confirmed_at
            When the read of it began; by the same clock as the result.
        """
        if self._since is None or confirmed_at < self._since or self.is_due(tenant, revision):
            return confirmed_at
        return max(confirmed_at, self._looked_at)

    def look(self) -> None:
        """Start a look at the feed, unless one is under way, or one succeeded or failed a moment ago."""
        now = self._clock()
        if now - self._looked_at > self._ttl_s and now - self._failed_at > FAILED_S:
            # Taken now, not at the task's first step, so that the look covers a read that begins meanwhile.
            wall = self._wall()
            self._looks.begin("changes", lambda: self._look_once(now, wall))

    async def _look_once(self, began: float, wall: float) -> None:
        goes_on = self._since is not None and began - self._looked_at <= GAP_S
        # By the writers' clocks, which may be behind ours; and ours may have been set back.
        start = min(self._looked_at_wall, wall) if goes_on else wall
        try:
            found = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._feed.since, start - OVERLAP_S
            )
        except Exception as error:  # whatever a store raises: one that knows no ``after``, say
            if self._failed_at <= self._looked_at:  # told once until it works again
                logger.warning("the change feed can't be read, heads are read one by one: %s", error)
            self._failed_at = self._clock()
            return
        new = [one for one in found if one.id not in self._seen]
        self._seen = frozenset(one.id for one in found)
        if not goes_on or len(new) + len(self._announced) > MAX_ANNOUNCED:
            self._since = began
        self._looked_at, self._looked_at_wall = began, wall
        self._take(new)

    def _take(self, new: list[Announcement]) -> None:
        for one in new:
            self._announced[one.tenant] = max(one.revision, self._announced.get(one.tenant, 0))
        for tenant in {one.tenant for one in new}:
            self._on_announced(tenant, self._announced.get(tenant, 0))
