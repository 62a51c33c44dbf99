"""The model cache of one replica: decides what is resident, and lends it out by lease.

Rules, each with a test:

- Fetch, verify and build first; only then make room. A load that fails evicts nothing. (Only a
  device that refuses the finished model, out of memory say, comes after.)
- Only an unleased resident is evicted. When all are leased, a load waits for a lease to end.
- One load of a version at a time; the load belongs to the cache, not to the caller who asked first.
- A load hands its waiters their leases in the same step in which the model becomes resident, so
  nothing can evict it in between.
- residents + reserved + draining <= slots, at every instant.

All methods must be called on one event loop; nothing in here blocks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flatshare.cache.failures import FailureMemory
from flatshare.cache.lease import Lease, Resident
from flatshare.cache.loading import Placer, WeightsSource
from flatshare.cache.policy import EvictionPolicy, LeastRecentlyUsed
from flatshare.cache.stats import CacheStats
from flatshare.cache.tiers import ModelKey, Receipt, ResidentInfo, Tier
from flatshare.errors import DeadlineExceeded, NoRoom
from flatshare_registry.errors import Unavailable
from flatshare_registry.records import VersionRecord

__all__ = ["ModelCache"]


@dataclass(slots=True, eq=False)
class _Load:
    """A load under way and who waits for it."""

    task: asyncio.Task[None] | None = None
    waiters: list[asyncio.Future[Lease]] = field(default_factory=list)

    @property
    def abandoned(self) -> bool:
        """Whether all who waited have gone."""
        return all(waiter.done() for waiter in self.waiters)


class ModelCache:
    """Residents of one replica.

    Parameters
    ----------
    slots
        Most models on the device at a time.
    source, placer
        The two halves of a load.
    load_concurrency
        Most loads at a time; others wait.
    room_timeout_s
        Seconds that a load waits for a slot while all are leased.
    fetch_timeout_s
        Seconds that the source may take for one version; then it counts as unavailable.
    policy
        Who is evicted first.
    on_change
        Called after the set of residents changed; must not raise.
    clock, wall_clock
        Monotonic and POSIX seconds.
    """

    def __init__(
        self,
        *,
        slots: int,
        source: WeightsSource,
        placer: Placer,
        load_concurrency: int = 4,
        room_timeout_s: float = 30.0,
        fetch_timeout_s: float = 10.0,
        policy: EvictionPolicy | None = None,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.slots = slots
        self.stats = CacheStats()
        self._source = source
        self._placer = placer
        self._room_timeout_s = room_timeout_s
        self._fetch_timeout_s = fetch_timeout_s
        self._policy = policy or LeastRecentlyUsed()
        self._on_change = on_change
        self._clock = clock
        self._wall_clock = wall_clock
        self._failures = FailureMemory(clock)
        self._loading = asyncio.Semaphore(load_concurrency)
        self._residents: dict[ModelKey, Resident] = {}
        self._loads: dict[ModelKey, _Load] = {}
        self._draining: set[Resident] = set()
        self._reserved = 0
        self._generation = 0
        self._room_wanted: list[asyncio.Future[None]] = []

    # -- leasing

    def try_lease(self, record: VersionRecord) -> Lease | None:
        """A lease if the version is resident; no waiting, no load. The hot path."""
        key = ModelKey.of(record)
        resident = self._residents.get(key)
        if resident is None:
            return None
        self._policy.used(key)
        return self._grant(resident, Tier.DEVICE)

    async def lease(self, record: VersionRecord, timeout_s: float) -> Lease:
        """A lease on a version, loaded first if need be.

        Cancelling the caller, or its time-out, leaves the load running for whoever else waits.

        Raises
        ------
        DeadlineExceeded
            It was not there within ``timeout_s`` seconds.
        NoRoom
            Every slot was leased for too long. Nothing was evicted.
        Corrupt, ModelFailed, Unavailable
            The load failed, now or a short while ago. Nothing was evicted.
        """
        lease = self.try_lease(record)
        if lease is not None:
            return lease
        waiter = self._wait_for_load(record)
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except BaseException as error:
            # Cancelled or timed out, perhaps just after the load handed this waiter its lease.
            if not waiter.done():
                waiter.cancel()
            elif not waiter.cancelled() and waiter.exception() is None:
                waiter.result().release()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(f"{record.name} was not loaded within {timeout_s:g} s") from None
            raise

    async def preload(self, record: VersionRecord, timeout_s: float) -> None:
        """Make a version resident without using it; no request is counted. Raises as :meth:`lease` does."""
        with await self.lease(record, timeout_s) as lease:
            self.stats.hits[lease.tier] -= 1
            self._residents[ModelKey.of(record)].hits -= 1

    # -- removing

    def unload(self, key: ModelKey) -> bool:
        """Stop lending a version and free it as soon as its leases have ended; whether it was resident."""
        resident = self._residents.get(key)
        if resident is None:
            return False
        self._retire(resident)
        self._on_change()
        return True

    def forget_failures(self, tenant: str) -> None:
        """Try a tenant's failed versions again at the next request."""
        self._failures.forget(tenant)

    async def close(self, timeout_s: float) -> None:
        """Stop loads, then free everything; waits up to ``timeout_s`` for leases to end."""
        tasks = [load.task for load in self._loads.values() if load.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for resident in list(self._residents.values()):
            self._retire(resident)
        deadline = self._clock() + timeout_s
        while self._draining and await self._room_freed(deadline - self._clock()):
            pass
        self._on_change()

    # -- looking

    @property
    def occupied(self) -> int:
        """Slots that are taken: residents, loads that have reserved one, and what is draining."""
        return len(self._residents) + self._reserved + len(self._draining)

    def resident_records(self) -> list[VersionRecord]:
        """Versions that can be leased at once."""
        return [resident.record for resident in self._residents.values()]

    def snapshot(self) -> list[ResidentInfo]:
        """All that is held, most recently used first."""
        held = [*self._residents.values(), *self._draining]
        return [
            ResidentInfo(
                tenant=one.record.tenant,
                version=one.record.version,
                digest=one.record.digest,
                architecture=one.record.architecture,
                size_bytes=one.size_bytes,
                tier=one.tier,
                hits=one.hits,
                leases=one.leases,
                last_used_at=one.last_used_at,
                loaded_at=one.loaded_at,
            )
            for one in sorted(held, key=lambda one: -one.last_used_at)
        ]

    # -- loading

    def _wait_for_load(self, record: VersionRecord) -> asyncio.Future[Lease]:
        """Join the load of a version, beginning it if there is none."""
        key = ModelKey.of(record)
        load = self._loads.get(key)
        if load is None:
            self._failures.check(key)
            self._placer.check(record)
            load = self._loads[key] = _Load()
            # The cache holds the task: no caller's cancellation reaches it.
            load.task = asyncio.create_task(self._run_load(key, record, load), name=f"load {key}")
        waiter: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        load.waiters.append(waiter)
        return waiter

    async def _run_load(self, key: ModelKey, record: VersionRecord, load: _Load) -> None:
        try:
            resident = await self._load(record, load)
        except _Abandoned:
            pass  # nobody waits any more; whoever asks next begins anew
        except BaseException as error:
            self.stats.load_failures += 1
            failure = error if isinstance(error, Exception) else NoRoom(f"{key}: the replica is stopping")
            self._failures.remember(key, failure)
            for waiter in load.waiters:
                if not waiter.done():
                    waiter.set_exception(_copy(failure))
            if not isinstance(error, Exception):
                raise
        else:
            for waiter in load.waiters:
                if not waiter.done():
                    waiter.set_result(self._grant(resident, resident.tier))
            if not resident.leases:
                self._wake_one()  # it can be evicted for a load that waits
            self._on_change()
        finally:
            del self._loads[key]

    async def _load(self, record: VersionRecord, load: _Load) -> Resident:
        async with self._loading:
            # Callers may have gone while this waited for its turn: a flood of requests that hang up
            # must not fetch, or evict, for nobody. One that has begun is finished (promise 6).
            if load.abandoned:
                raise _Abandoned
            started = self._clock()
            try:
                async with asyncio.timeout(self._fetch_timeout_s):
                    fetched = await self._source.fetch(record)
            except TimeoutError:
                raise Unavailable(
                    f"the store did not deliver {record.name} within {self._fetch_timeout_s:g} s"
                ) from None
            prepared = await self._placer.prepare(record, fetched)
            await self._reserve(record)
            try:
                placed = await self._placer.place(record, prepared)
            except BaseException:
                self._reserved -= 1
                self._wake_one()
                raise
            self._reserved -= 1
            self.stats.loads += 1
            self.stats.load_times.add(self._clock() - started)
        # From here to the grants in _run_load nothing awaits: the slot goes from reserved to
        # resident to leased in one step.
        self._generation += 1
        key, now = ModelKey.of(record), self._wall_clock()
        resident = Resident(
            record=record,
            module=placed.module,
            size_bytes=placed.size_bytes,
            tier=fetched.tier,
            receipt=Receipt(record.tenant, record.version, record.digest, self._generation),
            loaded_at=now,
            last_used_at=now,
        )
        self._residents[key] = resident
        self._policy.admitted(key)
        return resident

    async def _reserve(self, record: VersionRecord) -> None:
        """Take a slot for a load, evicting the policy's first unleased victim if none is free."""
        deadline = self._clock() + self._room_timeout_s
        while self.occupied >= self.slots:
            victim = next((key for key in self._policy.victims() if not self._residents[key].leases), None)
            if victim is not None:
                self._retire(self._residents[victim])
                self.stats.evictions += 1
                self._on_change()
            elif not await self._room_freed(deadline - self._clock()):
                raise NoRoom(f"no slot for {record.name}: all {self.slots} are in use; retry, or add slots")
        self._reserved += 1

    # -- slots

    def _grant(self, resident: Resident, tier: Tier) -> Lease:
        resident.leases += 1
        resident.hits += 1
        resident.last_used_at = self._wall_clock()
        self.stats.hits[tier] += 1
        return Lease(resident, tier, self._released)

    def _released(self, resident: Resident) -> None:
        resident.leases -= 1
        if not resident.leases:
            if resident.retired:
                self._free(resident)
            self._wake_one()

    def _retire(self, resident: Resident) -> None:
        """No new leases; freed now, or when the last one ends. Counts until it is freed."""
        key = ModelKey.of(resident.record)
        del self._residents[key]
        self._policy.removed(key)
        resident.retired = True
        self._draining.add(resident)
        if not resident.leases:
            self._free(resident)

    def _free(self, resident: Resident) -> None:
        # Dropping the last reference frees the tensors; nobody else holds the module.
        resident.module = None
        self._draining.discard(resident)
        self._wake_one()

    def _wake_one(self) -> None:
        """A slot may have come free: let the load that has waited longest look."""
        while self._room_wanted:
            waiter = self._room_wanted.pop(0)
            if not waiter.done():
                waiter.set_result(None)
                return

    async def _room_freed(self, timeout_s: float) -> bool:
        """Wait until a slot may have come free; False when the time is over."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._room_wanted.append(waiter)
        try:
            async with asyncio.timeout(max(timeout_s, 0)):
                await waiter
        except TimeoutError:
            return waiter.done() and not waiter.cancelled()  # woken in the very moment
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake_one()  # the slot was meant for us: pass it on
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._room_wanted.remove(waiter)
        return True


class _Abandoned(Exception):
    """A load that nobody waits for any more was dropped before it began."""


def _copy(error: Exception) -> Exception:
    """A fresh instance for each waiter: a shared one would collect all their tracebacks."""
    try:
        copy = type(error)(*error.args)
    except TypeError:
        return error
    copy.__cause__ = error.__cause__
    return copy
