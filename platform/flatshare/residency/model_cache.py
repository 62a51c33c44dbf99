"""The model cache of one replica: loads what is asked for, and lends it out by lease.

``residency.py`` keeps what is on the device, and decides what is evicted; ``loads.py`` runs the loads.

Rules, each with a test:

- Fetch, verify, build and try out first; only then make room. A load that fails evicts nothing.
  (Only one failure can come after that: the device refuses the finished model, out of memory say.)
- Victims are chosen as a set, among residents without lease and pin, before any of them goes. If the
  set can't make room nothing is evicted, and the load waits for a lease to end.
- One load of a version at a time; the load belongs to the cache, not to the caller who asked first.
- A load hands its waiters their leases in the same step in which the model becomes resident, so
  nothing can evict it in between.
- What is taken, in slots and in bytes, never exceeds what there is (``ledger.py``).
- Loads from the node's own files have places of their own: a store that hangs holds up none of them.
- Places for loads go round the tenants that wait; a tenant that is over its cap evicts its own models, and
  nobody evicts another below its floor (``tenant_limits.py``).

All methods must be called on one event loop; nothing in here blocks it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container
from contextlib import AbstractContextManager

from flatshare.errors import DeadlineExceeded, DeviceBroken
from flatshare.residency.failures import FailureMemory
from flatshare.residency.lease import Erased, Lease
from flatshare.residency.ledger import Ledger
from flatshare.residency.loads import Loads
from flatshare.residency.policy import EvictionPolicy, LeastRecentlyUsed
from flatshare.residency.residency import Residency
from flatshare.residency.stats import CacheStats
from flatshare.residency.tenant_limits import NO_BOUNDS, BoundsOf
from flatshare.weights.loader import Loader
from flatshare.weights.tiers import FailedLoad, ModelKey, ResidentInfo, State
from flatshare_registry.records import VersionRecord

__all__ = ["ModelCache"]


class ModelCache:
    """Residents of one replica.

    Parameters
    ----------
    ledger
        Slots and bytes; this cache's own.
    loader
        The two halves of a load.
    load_concurrency
        Most loads from the store at a time; others wait.
    room_timeout_s
        Seconds that a load waits for room while all is leased or pinned.
    fetch_timeout_s
        Seconds that the store may take for one version; then it counts as unavailable.
    policy
        Which model is evicted first.
    bounds_of
        A tenant's cap and floor on the device.
    on_change
        Called after the set of residents changed; must not raise.
    clock, wall_clock
        Monotonic and POSIX seconds.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        loader: Loader,
        load_concurrency: int = 4,
        room_timeout_s: float = 30.0,
        fetch_timeout_s: float = 10.0,
        policy: EvictionPolicy | None = None,
        bounds_of: BoundsOf = lambda tenant: NO_BOUNDS,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.ledger = ledger
        self.stats = CacheStats()
        self._loader = loader
        self._on_change = on_change
        self._clock = clock
        self._failures = FailureMemory(clock, wall_clock)
        self._erasures: dict[str, Erased] = {}
        self._residency = Residency(
            ledger,
            policy or LeastRecentlyUsed(),
            bounds_of,
            stats=self.stats,
            scrub=loader.scrub,
            overwrites=loader.overwrites_what_leaves,
            on_change=on_change,
            wall_clock=wall_clock,
        )
        self._loads = Loads(
            self._residency,
            loader,
            self._failures,
            self.stats,
            load_concurrency=load_concurrency,
            room_timeout_s=room_timeout_s,
            fetch_timeout_s=fetch_timeout_s,
            on_change=on_change,
            clock=clock,
        )

    # -- leasing

    def try_lease(self, record: VersionRecord) -> Lease | None:
        """A lease if the version is resident; no waiting, no load. The hot path."""
        return self._residency.lend(ModelKey.of(record))

    async def lease(self, record: VersionRecord, timeout_s: float) -> Lease:
        """A lease on a version, loaded first if need be.

        Cancelling the caller, or its time-out, leaves the load running for whoever else waits.

        Raises
        ------
        WouldBeLate
            The turn of its load would come after ``timeout_s``. Raised at once.
        DeadlineExceeded
            It was not loaded within ``timeout_s`` seconds.
        NoRoom, ResidentOverQuota
            It was loaded, and all that could have made room for it was in use. Nothing was evicted.
        Corrupt, ModelFailed, Unavailable
            The load failed, now or a short while ago. Nothing was evicted.
        """
        lease = self.try_lease(record)
        if lease is not None:
            return lease
        waiter = self._loads.join(record, timeout_s)
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
                if self._loads.wants_room(ModelKey.of(record)):
                    raise self._residency.no_room(record, self._loader.check(record)) from None
                raise DeadlineExceeded(f"{record.name} was not loaded within {timeout_s:g} s") from None
            raise

    async def preload(self, record: VersionRecord, timeout_s: float, *, pin: bool = False) -> None:
        """Make a version resident without using it; no request is counted. Raises as :meth:`lease` does.

        Parameters
        ----------
        pin
            Also keep it until :meth:`unpin` or :meth:`unload`.

        Raises
        ------
        NoRoom
            Pinning it would leave no slot, or less than half the bytes, for everybody else.
        """
        key = ModelKey.of(record)
        if pin:
            self._residency.check_pin(key, self._loader.check(record))
        with await self.lease(record, timeout_s) as lease:
            self.stats.hits[lease.tier] -= 1
            resident = lease.resident
            assert resident is not None, "the lease is held"
            resident.hits -= 1
            if pin and resident.state is State.RESIDENT:
                self._residency.check_pin(key, resident.parts)  # others may have been pinned meanwhile
                resident.pinned = True

    def unpin(self, key: ModelKey) -> bool:
        """Let a version be evicted again; whether it was pinned."""
        resident = self._residency.find(key)
        if resident is None or not resident.pinned:
            return False
        resident.pinned = False
        self._residency.room.wake()
        return True

    def protected(self, key: ModelKey) -> AbstractContextManager[None]:
        """Within this, a version is evicted after all others: its successor is on the way."""
        return self._residency.protected(key)

    # -- removing

    def unload(self, key: ModelKey) -> bool:
        """Stop lending a version and free it as soon as its leases have ended; whether it was here.

        Also ends a pin or a quarantine.
        """
        here = [one for one in self._residency.held() if ModelKey.of(one.record) == key]
        # A slot in quarantine first: the version may have been loaded anew beside it.
        for state in (State.QUARANTINED, State.RESIDENT):
            for resident in here:
                if resident.state is state:
                    self._residency.leave(resident)
                    self._on_change()
                    return True
        return False

    def withdraw(self, key: ModelKey) -> None:
        """A version was deleted: free it, and let a load of it that is under way come to nothing."""
        self._loads.withdraw(key)
        self._failures.hide(key)
        self.unload(key)

    def quarantine(self, lease: Lease) -> None:
        """Take the slot of a lease out of use: it failed an isolation check.

        Nobody gets the slot again until an operator unloads the version; a later request for the
        version loads it anew, into another slot.
        """
        resident = lease.resident
        if resident is None or resident.state is State.QUARANTINED:
            return
        self._residency.quarantine(resident)
        self.stats.quarantined += 1
        self._on_change()

    def condemn(self, lease: Lease, error: Exception) -> None:
        """A model failed its probe with its first rows: free it, and remember why it can't be served."""
        key = ModelKey.of(lease.record)
        if lease.resident is not None and self._residency.find(key) is lease.resident:
            self._residency.leave(lease.resident)
            self._on_change()
        self.stats.probes_failed += 1
        self._loader.distrust(lease.record)
        self._failures.remember(key, error)
        self._failures.show(key, error)

    def distrust(self, digest: str) -> list[tuple[VersionRecord, bool]]:
        """A tensor is not what it was: free every model that holds it, once its leases have ended.

        Returns
        -------
        list
            Versions that went, and whether they were pinned: a pin ends with its model.
        """
        residents = self._residency.lendable()
        gone = [one for one in residents if any(part.digest == digest for part in one.parts)]
        for resident in gone:
            self._residency.leave(resident)
            self._loader.distrust(resident.record)
        self._loader.let_go()
        if gone:
            self._on_change()
        return [(one.record, one.pinned) for one in gone]

    def erase(self, tenant: str) -> Erased:
        """Free and overwrite all of a tenant's models, and let none of its loads under way become resident.

        Returns
        -------
        Erased
            What went and what was overwritten; both grow while leases end (:meth:`erased`).
        """
        self._loads.erase(tenant)
        told = self._erasures.setdefault(tenant, Erased())
        self._loader.stop(tenant)
        self._loader.let_go()
        for resident in self._residency.held():
            if resident.record.tenant == tenant and resident.erased is None:
                resident.erased = told
                told.models += 1
                self._residency.leave(resident)
        self._failures.forget(tenant)
        self._failures.hide_all(tenant)
        self._on_change()
        return told

    async def erased(self, tenant: str, timeout_s: float) -> bool:
        """Wait until nothing of an erased tenant is left; returns whether nothing is.

        Loads under way count, and so do the threads of abandoned loads, which go on. Memory that could not be
        overwritten counts until the process ends.
        """
        deadline = self._clock() + timeout_s

        def gone() -> bool:
            return not any(one.record.tenant == tenant for one in self._residency.held())

        if not await self._loads.ended(tenant, deadline):
            return False
        if not await self._loader.ended(tenant, deadline - self._clock()):
            return False
        self._loader.let_go()  # what these loads have prepared
        if not gone() and not await self._residency.room.wait(gone, deadline - self._clock()):
            return False
        told = self._erasures.get(tenant)
        if (told is not None and told.failed) or tenant in self._loads.not_overwritten:
            return False
        try:
            async with asyncio.timeout(max(deadline - self._clock(), 0)):
                await self._loader.settle()
        except (TimeoutError, DeviceBroken):
            return False
        return True

    def forget_failures(self, tenant: str) -> None:
        """Try a tenant's failed versions again at the next request."""
        self._failures.forget(tenant)

    async def close(self, timeout_s: float) -> None:
        """Stop loads and begin no more, then free everything; waits up to ``timeout_s`` for leases to end."""
        await self._loads.close()
        for resident in self._residency.lendable():
            self._residency.leave(resident)
        deadline = self._clock() + timeout_s
        await self._residency.room.wait(
            lambda: not any(one.leases for one in self._residency.held()), deadline - self._clock()
        )
        self._on_change()

    # -- looking

    @property
    def slots(self) -> int:
        """Most models at a time."""
        return self.ledger.slots

    @property
    def occupied(self) -> int:
        """Slots that are taken: by residents, by loads, by what is draining or in quarantine."""
        return self.ledger.slots_taken

    @property
    def loading(self) -> list[ModelKey]:
        """Versions that are being loaded, or wait for their turn."""
        return self._loads.keys

    @property
    def refused(self) -> int:
        """Loads that were refused a turn because it would have come too late."""
        return self._loads.refused

    @property
    def wait_s(self) -> float:
        """Seconds that another load from the store would wait for its turn, at the present rate."""
        return self._loads.wait_s

    @property
    def failed(self) -> list[FailedLoad]:
        """Versions whose last load failed, the latest first."""
        return self._failures.last()

    def hide_failed(self, tenant: str, versions: Container[int]) -> None:
        """Show failed loads of a tenant's versions no more, but for these: the others are gone."""
        for one in self.failed:
            if one.tenant == tenant and one.version not in versions:
                self._failures.hide(ModelKey(one.tenant, one.version))

    def is_loading(self, record: VersionRecord) -> bool:
        """Whether a load of a version is under way that others can join."""
        return ModelKey.of(record) in self._loads

    def is_resident(self, key: ModelKey) -> bool:
        """Whether a version can be leased at once."""
        return self._residency.find(key) is not None

    def record_of(self, key: ModelKey) -> VersionRecord | None:
        """The record of a version that can be leased at once."""
        resident = self._residency.find(key)
        return resident.record if resident is not None else None

    def is_pinned(self, key: ModelKey) -> bool:
        """Whether a version is here and never evicted."""
        resident = self._residency.find(key)
        return resident is not None and resident.pinned

    def resident_records(self) -> list[VersionRecord]:
        """Versions that can be leased at once."""
        return [resident.record for resident in self._residency.lendable()]

    def leases(self) -> dict[ModelKey, int]:
        """Versions that requests hold now, and how many each."""
        return {ModelKey.of(one.record): one.leases for one in self._residency.lendable() if one.leases > 0}

    def uses(self) -> list[tuple[VersionRecord, int, float, float]]:
        """What can be leased: its record, requests since it was loaded, when it was loaded, and last used.

        For callers that ask every second; :meth:`snapshot` also adds up every model's tensors.
        """
        return [(one.record, one.hits, one.loaded_at, one.last_used_at) for one in self._residency.lendable()]

    def snapshot(self) -> list[ResidentInfo]:
        """All that is held and why, most recently used first."""
        return self._residency.snapshot()
