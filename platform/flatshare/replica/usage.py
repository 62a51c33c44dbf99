"""What a replica counts of requests: how they ended, how long they took, and whose they were.

Plain numbers on the event loop: two clocks, a logarithm and a few additions, some 3 us a request
(``scripts/bench-parts``). Metrics read them from snapshots; what tenants used is written to the store once a
minute (``flatshare_registry.usage``), behind the requests.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from flatshare.residency.stats import Durations
from flatshare.threads import in_thread
from flatshare.weights.tiers import Tier
from flatshare_registry.errors import RegistryError
from flatshare_registry.records import VersionRecord
from flatshare_registry.stores.base import BlobStore
from flatshare_registry.usage import OTHERS, Used, UsedVersion, write_usage

__all__ = ["RequestStats", "UsageCounter"]

logger = logging.getLogger("flatshare.replica")

MAX_VERSIONS: Final = 20_000
"""Versions whose use in one hour is kept apart; what comes beyond them counts as ``OTHERS``."""

MAX_LABELS: Final = 256
"""Most classes of a network whose answers are counted by class; with more, none are counted."""

MAX_UNWRITTEN: Final = 24
"""Hours that are kept while the store is down."""

BUSIEST: Final = 50
"""Tenants whose rates are told."""

LOOK_S: Final = 60.0
"""Seconds between looks at who is busiest, where nothing is written."""

LAST_WRITE_S: Final = 3.0
"""Seconds that a stopping replica gives the store."""

SLICE: Final = 500
"""Versions that are copied at a time: 1 ms."""


@dataclass(slots=True)
class RequestStats:
    """Requests since the replica started.

    Attributes
    ----------
    statuses
        By the HTTP status of their answers; those that came by a handle are not here.
    errors
        Of these, those that were refused or failed, by the code in their answers.
    durations
        Of answered requests, by the tier in which they found their model: from the arrival of the body until
        the answer was made.
    busiest
        The tenants with the most requests in the last minute, and their requests a second.
    """

    statuses: dict[int, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    durations: dict[Tier, Durations] = field(default_factory=lambda: {tier: Durations() for tier in Tier})
    busiest: Sequence[tuple[str, float]] = ()


class UsageCounter:
    """Counts a replica's requests. To be used on one event loop.

    Parameters
    ----------
    writer
        The name under which this process writes.
    threads
        Where the blocking writes run: threads that requests do not wait for.
    interval_s
        Seconds between writes; 0 for never.
    clock
        POSIX seconds.
    """

    def __init__(
        self,
        store: BlobStore,
        writer: str,
        threads: Executor,
        interval_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.stats = RequestStats()
        self._store = store
        self._writer = writer
        self._threads = threads
        self._interval_s = interval_s
        self._clock = clock
        self._hour = self._now()
        self._used: dict[UsedVersion, Used] = {}
        self._changed = False
        self._unwritten: deque[tuple[datetime, dict[UsedVersion, Used]]] = deque(maxlen=MAX_UNWRITTEN)
        self._before: dict[str, int] = {}
        self._looked_at = clock()
        self._writing: asyncio.Task[None] | None = None

    # -- the hot path

    def replied(self, status: int, code: str = "") -> None:
        """A request was answered with this HTTP status, and this code if it was refused or failed."""
        statuses = self.stats.statuses
        statuses[status] = statuses.get(status, 0) + 1
        if code:
            self.stats.errors[code] = self.stats.errors.get(code, 0) + 1

    def answered(
        self,
        version: VersionRecord,
        tier: Tier,
        seconds: float,
        labels: Sequence[int],
        body_bytes: int,
        classes: int,
    ) -> None:
        """A request has its prediction.

        Parameters
        ----------
        labels
            The class of each row.
        classes
            How many there are.
        """
        self.stats.durations[tier].add(seconds)
        used = self._of(version)
        used.requests += 1
        used.rows += len(labels)
        used.cold_loads += tier is not Tier.DEVICE
        used.body_bytes += body_bytes
        used.seconds += seconds
        if classes > MAX_LABELS:
            return
        counts = used.labels
        if len(counts) < classes:
            counts.extend([0] * (classes - len(counts)))
        for label in labels:
            counts[label] += 1

    def failed(self, version: VersionRecord) -> None:
        """A request for a known version failed, and its caller was not at fault."""
        self._of(version).failed += 1

    def _of(self, version: VersionRecord) -> Used:
        self._changed = True
        key = UsedVersion(version.tenant, version.version)
        used = self._used.get(key)
        if used is None:
            if len(self._used) >= MAX_VERSIONS:
                key = UsedVersion(OTHERS, 0)
            used = self._used.setdefault(key, Used())
        return used

    # -- behind it

    def start(self) -> None:
        """Begin to look, and to write."""
        self._writing = asyncio.get_running_loop().create_task(self._write_on(), name="write usage")

    async def close(self) -> None:
        """Stop it with a last write, which may take a moment but no longer."""
        if self._writing is None:
            return
        self._writing.cancel()
        await asyncio.gather(self._writing, return_exceptions=True)
        try:
            async with asyncio.timeout(LAST_WRITE_S):
                await self.write()
        except TimeoutError:
            logger.warning("what tenants used in the last minute was not written: the store does not answer")

    async def write(self) -> None:
        """Write what was counted since the last write. If the store is down, the next write includes it."""
        self.look_at_the_busiest()
        if (hour := self._now()) > self._hour:  # a clock that is set back changes nothing
            if self._used and self._interval_s:
                self._unwritten.append((self._hour, self._used))
            self._hour, self._used, self._changed = hour, {}, False
            self._before = {}
        if not self._interval_s:
            return
        try:
            while self._unwritten:
                await self._put(*self._unwritten[0], last=True)
                self._unwritten.popleft()
            if self._changed and self._used:
                self._changed = False
                await self._put(self._hour, self._used, last=False)
        except BaseException as error:
            self._changed = True
            if not isinstance(error, RegistryError):
                raise
            logger.warning("what tenants used was not written, and is tried again: %s", error)

    async def _write_on(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s or LOOK_S)
            try:
                await self.write()
            except Exception:
                logger.exception("what tenants used was not written, and is tried again")

    async def _put(self, hour: datetime, used: Mapping[UsedVersion, Used], *, last: bool) -> None:
        # Copied here, so that the thread never sees half an addition; in slices, because requests wait.
        copy: dict[UsedVersion, Used] = {}
        for key in list(used):
            copy[key] = replace(used[key], labels=list(used[key].labels))
            if len(copy) % SLICE == 0:
                await asyncio.sleep(0)
        await in_thread(self._threads, lambda: write_usage(self._store, hour, self._writer, copy, last=last))

    def look_at_the_busiest(self) -> None:
        """Work out the rates since the last look."""
        counts: dict[str, int] = {}
        for key, used in self._used.items():
            counts[key.tenant] = counts.get(key.tenant, 0) + used.requests
        now = self._clock()
        passed_s = max(now - self._looked_at, 1e-3)
        rates = (
            (tenant, (count - self._before.get(tenant, 0)) / passed_s) for tenant, count in counts.items()
        )
        top = heapq.nlargest(BUSIEST, rates, key=lambda one: one[1])
        self.stats.busiest = tuple((tenant, rate) for tenant, rate in top if rate > 0)
        self._before, self._looked_at = counts, now

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC).replace(minute=0, second=0, microsecond=0)
