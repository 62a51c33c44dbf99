"""What a replica knows of the registry: heads with a short life, version records for ever.

- A head younger than the TTL is answered from memory, without an await.
- An older head is answered from memory once more, while one look at the store's change feed runs in the
  background for all tenants (``changes.py``). It renews all heads whose change was not announced. Announced
  heads are read, and if the feed can't be read, all heads are: one conditional GET per tenant, in the
  background (stale-while-revalidate). Only if a head is very old does the request wait for this read.
- Whatever the feed says, a head is read again after ``REREAD_TTLS``: a writer's clock may be far behind.
- If the store is down, the last answer stands, however old (promise 11); a tenant that was never seen is
  ``Unavailable``.
- Unknown tenants are remembered for one TTL, unknown versions and aliases for ``RECHECK_S``, so junk
  costs the store one small GET in that time.

This module is long because each of these times is stated with its reason, and the rules of what is read when
belong in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

from cachetools import LRUCache, TTLCache

from flatshare.errors import copy_of
from flatshare.resolution.changes import Changes
from flatshare.single_flight import SingleFlight
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Corrupt, NotFound, Unavailable
from flatshare_registry.heads import select
from flatshare_registry.ids import PRODUCTION, ModelRef, TenantId
from flatshare_registry.records import TenantHead, VersionRecord

__all__ = ["TenantHeads"]

MAX_HEADS: Final = 20_000
"""Most tenants that one replica remembers; about 2 kB each."""

MAX_RECORDS: Final = 8_192
"""Most version records that one replica remembers; 3 kB for 8 tensors, 40 kB for 122."""

MAX_MISSING: Final = 10_000
"""Most unknown tenants remembered at a time; beyond it the oldest are asked for again."""

RECHECK_S: Final = 0.25
"""Seconds that "no such alias" or "no such version" of a known tenant is believed: a model that was
registered a moment ago is found at its first request, and junk costs four requests a second."""

REREAD_TTLS: Final = 24
"""TTLs after which a head is read again although nothing announced a change: two minutes, normally."""

STALE_AFTER_TTLS: Final = 15
"""A head older than this many TTLs is read before it is used: nobody asked for so long that a
promotion may be long past."""


KEYS_AFTER_TTLS: Final = 2
"""The same for the check of keys: a head older than this is read before its keys are trusted."""

PATIENCE_S: Final = 1.0
"""Seconds that a request for a known tenant waits for a newer answer before it takes the old one."""

FAILED_S: Final = 1.0
"""Seconds that a failed read of a head or a record is answered from memory."""

MAX_READS: Final = 1_000
"""Most reads under way or waiting for a thread; beyond it unknown tenants are unavailable."""

ANNOUNCED_READS: Final = 32
"""An announcement starts a read only while fewer reads than this are under way. Beyond it, the tenant's next
request reads it: a change of thousands must not take reads from tenants that are asked for now."""

RecordKey = tuple[TenantId, int, str]


@dataclass(slots=True)
class _Known:
    head: TenantHead
    etag: str | None
    checked_at: float  # trusted as if it had been confirmed at this time
    confirmed_at: float  # confirmed as current at this time, by a read or by the feed
    read_at: float


class TenantHeads:
    """Resolves refs for one replica.

    Parameters
    ----------
    registry
        Asked in threads.
    threads
        Where the blocking calls run.
    ttl_s
        Seconds that an answer is believed.
    on_change
        Called with a tenant's old and new head after it changed, came or went; must not raise.
    clock
        Seconds that only rise.
    wall
        POSIX seconds, to be compared with writers' clocks.
    """

    def __init__(
        self,
        registry: Registry,
        threads: Executor,
        *,
        ttl_s: float,
        on_change: Callable[[TenantHead | None, TenantHead | None], None] = lambda old, new: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._registry = registry
        self._threads = threads
        self._ttl_s = ttl_s
        self._on_change = on_change
        self._clock = clock
        self._heads: LRUCache[TenantId, _Known] = LRUCache(MAX_HEADS)
        self._records: LRUCache[RecordKey, VersionRecord] = LRUCache(MAX_RECORDS)
        self._missing: TTLCache[TenantId, None] = TTLCache(MAX_MISSING, ttl_s, clock)
        self._reads: SingleFlight[TenantId, TenantHead] = SingleFlight("head")
        self._record_reads: SingleFlight[RecordKey, VersionRecord] = SingleFlight("record")
        self._failed: TTLCache[TenantId | RecordKey, Exception] = TTLCache(MAX_MISSING, FAILED_S, clock)
        self._epochs: LRUCache[TenantId, int] = LRUCache(MAX_HEADS)
        self._changes = Changes(
            registry.feed, threads, ttl_s=ttl_s, on_announced=self._announced, clock=clock, wall=wall
        )

    def resolve_now(self, ref: ModelRef) -> VersionRecord | None:
        """The version that a ref means, if that is known well enough without waiting. The hot path.

        Raises
        ------
        NotFound
            It is known that there is none.
        """
        head = self._now(ref.tenant, STALE_AFTER_TTLS)
        if head is None:
            return None
        try:
            number = select(head, ref)
        except NotFound:
            if self._age_s(ref.tenant) > RECHECK_S:
                return None
            raise
        return self._records.get((ref.tenant, number, head.versions[number]))

    @property
    def feed_age_s(self) -> float | None:
        """Seconds since the change feed was last read; None if it was not yet."""
        return self._changes.age_s

    def head_now(self, tenant: TenantId) -> TenantHead | None:
        """A tenant's head if its keys and state can be trusted without waiting.

        A read that is due runs in the background.
        """
        return self._now(tenant, KEYS_AFTER_TTLS)

    def _now(self, tenant: TenantId, oldest_ttls: int) -> TenantHead | None:
        known = self._heads.get(tenant)
        if known is None:
            return None
        if self._clock() - known.checked_at > self._ttl_s:
            age_s = self._renewed_s(tenant, known)
            if age_s > self._ttl_s * oldest_ttls:
                return None
        return known.head

    def _renewed_s(self, tenant: TenantId, known: _Known) -> float:
        """Seconds since a head was last confirmed, also by the feed; starts a background check when due."""
        changes, now = self._changes, self._clock()
        known.confirmed_at = changes.current_at(tenant, known.head.revision, known.confirmed_at)
        known.checked_at = max(known.checked_at, known.confirmed_at)
        if now - known.read_at > self._ttl_s * REREAD_TTLS:
            self._read_behind(tenant)
        if now - known.checked_at > self._ttl_s:
            changes.look()
            if not changes.follows(known.confirmed_at) or changes.is_due(tenant, known.head.revision):
                self._read_behind(tenant)
        return now - known.checked_at

    def _announced(self, tenant: TenantId, revision: int) -> None:
        """A tenant changes, or has changed: read its head if we hold it, unless too many reads run."""
        self._missing.pop(tenant, None)
        known = self._heads.get(tenant)
        if known is not None and known.head.revision < revision and len(self._reads) < ANNOUNCED_READS:
            self._read_behind(tenant)

    async def resolve(self, ref: ModelRef, timeout_s: float) -> VersionRecord:
        """The version that a ref means.

        Raises
        ------
        NotFound
            No such tenant, alias or version.
        Unavailable
            The store does not answer (in time) and the tenant, or the version, is not known.
        Corrupt
            What the store holds can't be read.
        """
        found = self.resolve_now(ref)
        if found is not None:
            return found
        try:
            async with asyncio.timeout(timeout_s):
                head = await self._head(ref.tenant)
                try:
                    number = select(head, ref)
                except NotFound:
                    if self._age_s(ref.tenant) <= RECHECK_S:
                        raise
                    head = await self._read_shared(ref.tenant)
                    number = select(head, ref)
                return await self._record(head, number)
        except TimeoutError:
            raise Unavailable(f"the registry did not answer within {timeout_s:g} s") from None

    async def record(self, tenant: TenantId, number: int) -> VersionRecord:
        """One version's record, whatever the aliases mean.

        Raises
        ------
        NotFound
            No such tenant or version.
        Unavailable, Corrupt
            The store does not answer, or holds what can't be read.
        """
        head = await self._head(tenant)
        if number not in head.versions:
            raise NotFound(f"tenant {tenant} has no version {number}")
        return await self._record(head, number)

    def last_head(self, tenant: TenantId) -> TenantHead | None:
        """A tenant's head as last read, if any, however old."""
        known = self._heads.get(tenant)
        return known.head if known is not None else None

    async def refresh(self, tenant: TenantId) -> TenantHead | None:
        """Read a tenant's head now, whatever is remembered; None when there is no such tenant.

        Raises
        ------
        Unavailable
            The store does not answer; what was remembered stays.
        """
        self._missing.pop(tenant, None)
        for key in list(self._failed):
            if tenant == (key[0] if isinstance(key, tuple) else key):
                self._failed.pop(key, None)
        # A read that began before this call may return what was true before it: don't join that one.
        self._epochs[tenant] = self._epochs.get(tenant, 0) + 1
        self._reads.forget(tenant)
        try:
            head = await self._read(tenant)
        except NotFound:
            return None
        production = head.aliases.get(str(PRODUCTION))
        if production is not None:
            # Somebody just changed this tenant, so its first request should not have to wait for the record.
            # A failure is ignored here: a request that needs the record raises it.
            with contextlib.suppress(Unavailable, Corrupt):
                await self._record(head, production)
        return head

    def forget(self, tenant: TenantId) -> None:
        """Forget an erased tenant: the store answers the next request for it."""
        gone = self._heads.pop(tenant, None)
        self._epochs[tenant] = self._epochs.get(tenant, 0) + 1
        self._reads.forget(tenant)
        for key in [key for key in self._records if key[0] == tenant]:
            self._records.pop(key, None)
        if gone is not None:
            self._on_change(gone.head, None)

    def learn(self, head: TenantHead) -> None:
        """Take a head that somebody else has just read from the store, unless a newer one is known here."""
        tenant = TenantId(head.tenant)
        known = self._heads.get(tenant)
        if known is not None and known.head.revision >= head.revision:
            return
        now_s = self._clock()
        if head.state.exists:
            self._missing.pop(tenant, None)
            # Its ETag is not known: it is read whole next.
            self._heads[tenant] = _Known(head, None, now_s, now_s, now_s)
            self._on_change(known.head if known is not None else None, head)
        elif known is not None:
            del self._heads[tenant]
            self._on_change(known.head, None)

    def unconfirmed_s(self, tenant: TenantId) -> float:
        """Seconds since the store, or somebody who had just read it, last confirmed a tenant's head."""
        known = self._heads.get(tenant)
        if known is None:
            return float("inf")
        at = self._changes.current_at(tenant, known.head.revision, known.confirmed_at)
        return self._clock() - at

    def _age_s(self, tenant: TenantId) -> float:
        """Seconds since a tenant's head was last seen to be current."""
        known = self._heads.get(tenant)
        return self._clock() - known.checked_at if known is not None else float("inf")

    async def head(self, tenant: TenantId) -> TenantHead:
        """A tenant's head, from memory when its keys and state can be believed.

        Raises
        ------
        NotFound
            No such tenant.
        Unavailable
            It is not known, and the store does not answer.
        """
        return await self._head(tenant, KEYS_AFTER_TTLS)

    async def _head(self, tenant: TenantId, oldest_ttls: int = STALE_AFTER_TTLS) -> TenantHead:
        if tenant in self._missing:
            raise NotFound(f"there is no tenant {tenant}")
        known = self._heads.get(tenant)
        if known is None:
            return await self._read_shared(tenant)
        if self._now(tenant, oldest_ttls) is not None:
            return known.head
        try:
            # A store that hangs is as good as down: don't make a known tenant wait for it.
            async with asyncio.timeout(PATIENCE_S):
                return await self._read_shared(tenant)
        except (Unavailable, TimeoutError):
            # Trusted again for a while, so that not every request during an outage waits this long.
            known.checked_at = max(known.checked_at, self._clock() - self._ttl_s * oldest_ttls / 2)
            return known.head

    async def _read_shared(self, tenant: TenantId) -> TenantHead:
        """Join the tenant's read, or begin one.

        Raises
        ------
        Unavailable
            The store failed, a moment ago or now, or too many tenants wait for it already.
        """
        error = self._failed.get(tenant)
        if error is not None:
            raise copy_of(error)
        if tenant not in self._reads and len(self._reads) >= MAX_READS:
            raise Unavailable("too many tenants wait for the registry's store")
        return await self._read(tenant)

    async def _read(self, tenant: TenantId) -> TenantHead:
        return await self._reads.join(tenant, lambda: self._read_head(tenant))

    def _read_behind(self, tenant: TenantId) -> None:
        """Begin a read that nobody waits for; on failure the old answer stands."""
        if len(self._reads) < MAX_READS and tenant not in self._failed:
            self._reads.begin(tenant, lambda: self._read_head(tenant))

    async def _read_head(self, tenant: TenantId) -> TenantHead:
        known = self._heads.get(tenant)
        epoch = self._epochs.get(tenant, 0)
        self._changes.look()  # what is announced from here on counts for this head too
        began = self._clock()
        try:
            answer = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._registry.head_unless, tenant, known.etag if known is not None else None
            )
        except NotFound:
            if self._epochs.get(tenant, 0) == epoch:
                self._missing[tenant] = None
                gone = self._heads.pop(tenant, None)
                if gone is not None:
                    self._on_change(gone.head, None)
            raise
        except (Unavailable, Corrupt) as error:
            self._failed[tenant] = error
            raise
        if answer is None:
            assert known is not None, "only a conditional read can find no change"
            if self._epochs.get(tenant, 0) != epoch and tenant not in self._heads:
                raise NotFound(f"there is no tenant {tenant}")  # forgotten meanwhile: it is being erased
            known.read_at = known.confirmed_at = known.checked_at = began
            return known.head
        head, etag = answer
        if self._epochs.get(tenant, 0) != epoch:
            return head  # a refresh began since: what it reads counts, not this
        current = self._heads.get(tenant)
        if current is not None and current.head.revision > head.revision:
            return current.head  # a later read came home first
        self._heads[tenant] = _Known(head, etag, began, began, began)
        if current is None or current.head.revision != head.revision:
            self._on_change(current.head if current is not None else None, head)
        return head

    async def _record(self, head: TenantHead, number: int) -> VersionRecord:
        tenant = TenantId(head.tenant)
        key = (tenant, number, head.versions[number])
        record = self._records.get(key)
        if record is not None:
            return record
        error = self._failed.get(key)
        if error is not None:
            raise copy_of(error)
        epoch = self._epochs.get(tenant, 0)  # now: it may be forgotten before the read's first step
        return await self._record_reads.join(key, lambda: self._read_record(key, head, number, epoch))

    async def _read_record(self, key: RecordKey, head: TenantHead, number: int, epoch: int) -> VersionRecord:
        try:
            record = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._registry.record, head, number
            )
        except (Unavailable, Corrupt) as error:
            self._failed[key] = error
            raise
        if self._epochs.get(key[0], 0) == epoch or key[0] in self._heads:  # else it was erased meanwhile
            self._records[key] = record
        return record
