"""Loads under way in one replica: each belongs to the cache, not to the caller who asked first.

Fetch, verify, build and try out first; only then make room. A load that fails evicts nothing, and one that
finds no room holds nothing while it waits. Loads from the node's own files have permits of their own: a store
that hangs holds up none of them. All methods must be called on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

from flatshare.errors import DeviceFull, IsolationBroken, NoRoom, ProbeFailed, WouldBeLate
from flatshare.residency.failures import FailureMemory
from flatshare.residency.fair_semaphore import FairSemaphore
from flatshare.residency.lease import Lease, Resident
from flatshare.residency.load import Abandoned, Load, let_go
from flatshare.residency.residency import NoMemoryNow, NoRoomNow, Residency
from flatshare.residency.stats import CacheStats
from flatshare.telemetry.tracing import part
from flatshare.weights.loader import Held, Loader, Placed, Prepared
from flatshare.weights.tiers import ModelKey, Part
from flatshare_registry.errors import Unavailable
from flatshare_registry.records import VersionRecord

__all__ = ["LOCAL_CONCURRENCY", "Loads"]

logger = logging.getLogger("flatshare.residency")

LOCAL_CONCURRENCY: Final = 2
"""Loads from the node's own files at a time: they cost CPU, not waiting."""

STORE_RESTS_S: Final = 2.0
"""Seconds for which nobody asks a store that has just let a load time out."""


class Loads:
    """Loads of one replica.

    Parameters
    ----------
    residency
        Takes the loaded models, and makes room for them.
    loader
        The two halves of a load.
    failures
        What is remembered of loads that failed.
    load_concurrency
        Most loads from the store at a time; others wait.
    room_timeout_s
        Seconds that a load waits for room while all is leased or pinned.
    fetch_timeout_s
        Seconds that the store may take for one version; then it counts as unavailable.
    on_change
        Called after the set of residents changed; must not raise.

    Attributes
    ----------
    refusals
        How often the device had no memory for what the ledger had room for.
    not_overwritten
        Tenants of loads that left something behind.
    """

    def __init__(
        self,
        residency: Residency,
        loader: Loader,
        failures: FailureMemory,
        stats: CacheStats,
        *,
        load_concurrency: int,
        room_timeout_s: float,
        fetch_timeout_s: float,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ledger = residency.ledger
        self.stats = stats
        self._residency = residency
        self._loader = loader
        self._failures = failures
        self._room_timeout_s = room_timeout_s
        self._fetch_timeout_s = fetch_timeout_s
        self._on_change = on_change
        self._clock = clock
        self._loading = FairSemaphore(load_concurrency, clock=clock)
        self._loading_local = FairSemaphore(LOCAL_CONCURRENCY, clock=clock)
        self._loads: dict[ModelKey, Load] = {}
        self._store_rests_until = float("-inf")
        self._closed = False
        self.refusals = 0
        self.not_overwritten: set[str] = set()

    def __contains__(self, key: ModelKey) -> bool:
        return key in self._loads

    @property
    def keys(self) -> list[ModelKey]:
        """Versions that are being loaded, or wait for their turn."""
        return list(self._loads)

    @property
    def refused(self) -> int:
        """Loads that were refused a turn because it would have come too late."""
        return self._loading.refused + self._loading_local.refused

    @property
    def wait_s(self) -> float:
        """Seconds that another load from the store would wait for its turn, at the present rate."""
        return self._loading.wait_s()

    def wants_room(self, key: ModelKey) -> bool:
        """Whether a version is ready, and waits for leases of others to end."""
        load = self._loads.get(key)
        return load is not None and load.wants_room

    def withdraw(self, key: ModelKey) -> None:
        """A version is gone: a load of it that is under way comes to nothing."""
        if key in self._loads:
            self._loads[key].erased = True

    def erase(self, tenant: str) -> None:
        """A tenant is gone: none of its loads under way becomes resident."""
        for key in self._loads:
            if key.tenant == tenant:
                self.withdraw(key)

    async def ended(self, tenant: str, deadline: float) -> bool:
        """Wait until a tenant has no load under way, or until the deadline; returns whether it has none."""
        while loads := [load.task for key, load in self._loads.items() if key.tenant == tenant and load.task]:
            done, _ = await asyncio.wait(loads, timeout=max(deadline - self._clock(), 0))
            if not done:
                return False
        return True

    async def close(self) -> None:
        """Stop what is under way, and begin no more."""
        self._closed = True
        loads = list(self._loads.values())
        tasks = [load.task for load in loads if load.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for load in loads:
            load.fail(NoRoom("the replica is stopping"))  # one that was cancelled before its first step
        self._loads.clear()

    def join(self, record: VersionRecord, timeout_s: float) -> asyncio.Future[Lease]:
        """Join the load of a version, beginning it if there is none.

        Parameters
        ----------
        timeout_s
            Seconds for which it will be waited for.
        """
        key = ModelKey.of(record)
        load = self._loads.get(key)
        if load is not None:
            load.check_erased(record)
        else:
            if self._closed:
                raise NoRoom("the replica is stopping")
            self._failures.check(key)
            claimed = self._loader.check(record)
            self._residency.check_ever_fits(record, claimed)
            load = self._loads[key] = Load()
            # The cache holds the task: no caller's cancellation reaches it.
            load.task = asyncio.create_task(self._run_load(key, record, claimed, load), name=f"load {key}")
        load.until = max(load.until, self._clock() + timeout_s)
        waiter: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        load.waiters.append(waiter)
        return waiter

    async def _run_load(
        self, key: ModelKey, record: VersionRecord, claimed: Mapping[Part, int], load: Load
    ) -> None:
        try:
            with part("load", {"flatshare.version": record.name}) as span:
                resident = await self._load(record, claimed, load)
                span.set_attribute("flatshare.tier", resident.tier.value)
        except Abandoned:
            pass  # nobody waits any more; whoever asks next begins anew
        except BaseException as error:
            if not isinstance(error, WouldBeLate):  # it has not begun
                self.stats.load_failures += 1
                self.stats.probes_failed += isinstance(error, ProbeFailed)
                if not load.erased and not isinstance(error, NoRoom):  # which says nothing of the version
                    self._failures.show(key, error)
            let_go(error)
            failure = error if isinstance(error, Exception) else NoRoom(f"{key}: the replica is stopping")
            self._failures.remember(key, failure)
            load.fail(failure)
            del failure
            if not isinstance(error, Exception):
                raise
        else:
            for waiter in load.waiters:
                if not waiter.done():
                    waiter.set_result(self._residency.grant(resident, resident.tier))
            self._on_change()
        finally:
            if self._loads.get(key) is load:
                del self._loads[key]
            # What this load held, or its resident without a lease, may be room for another.
            self._residency.frees += 1
            self._residency.room.wake()

    async def _load(self, record: VersionRecord, claimed: Mapping[Part, int], load: Load) -> Resident:
        """Try until there is room, or the time for that is over.

        A load that waits for room holds nothing: neither a place, nor parts that others could free,
        nor the tensors that it prepared. It begins again when there is room for it, and then finds its
        bytes on the node.
        """
        deadline: float | None = None
        tenant = record.tenant
        while True:
            try:
                resident = await self._attempt(
                    record, claimed, load, self._loading_local, self._loader.prepare_local
                )
                if resident is None:
                    resident = await self._attempt(record, claimed, load, self._loading, self._prepare)
                assert resident is not None, "the store answers or raises"
                return resident
            except NoRoomNow as error:
                could_fit = partial(
                    self._residency.could_fit,
                    tenant,
                    claimed,
                    refused_at=error.frees if isinstance(error, NoMemoryNow) else None,
                )
            deadline = self._clock() + self._room_timeout_s if deadline is None else deadline
            load.wants_room = True
            if self._clock() >= deadline or not await self._residency.room.wait(
                could_fit, deadline - self._clock()
            ):
                raise self._residency.no_room(record, claimed)
            load.wants_room = False

    async def _prepare(self, record: VersionRecord, held: Held) -> Prepared:
        if self._clock() < self._store_rests_until:
            raise Unavailable(
                f"the store did not answer others a moment ago; {record.name} was not asked for"
            )
        began = self._clock()
        try:
            async with asyncio.timeout(self._fetch_timeout_s):
                return await self._loader.prepare(record, held, self._fetch_timeout_s)
        except (TimeoutError, Unavailable) as error:
            if self._clock() - began >= self._fetch_timeout_s / 2:
                # It hangs rather than refuses. Loads that wait for a place to ask it would each wait as long,
                # one after the other. They fail now; after a while the store is asked again.
                self._store_rests_until = self._clock() + STORE_RESTS_S
            if isinstance(error, Unavailable):
                raise
            raise Unavailable(
                f"the store did not deliver {record.name} within {self._fetch_timeout_s:g} s"
            ) from None

    async def _attempt(
        self,
        record: VersionRecord,
        claimed: Mapping[Part, int],
        load: Load,
        places: FairSemaphore,
        prepare: Callable[[VersionRecord, Held], Awaitable[Prepared | None]],
    ) -> Resident | None:
        """Load in one of the two ways; None if that way can't deliver the bytes.

        Raises
        ------
        NoRoomNow
            It is ready, but what is leased or pinned leaves no room.
        WouldBeLate
            Its turn would come after all who wait for it have gone.
        """
        places.check_in_time(load.until - self._clock(), record.tenant)
        async with places.hold(None, record.tenant):
            # Callers may have gone while this waited for its turn: a flood of requests that hang up
            # must not fetch, or evict, for nobody. One that has begun is finished (promise 6).
            if load.abandoned:
                raise Abandoned
            # What the device has already is held from here on, so that nothing evicts it meanwhile.
            held = self._loader.hold(record)
            counted = self.ledger.hold_present(held)
            # Keep only counted parts: the rest is held by another load alone, which may have it overwritten.
            held = {part: tensor for part, tensor in held.items() if part in counted}
            prepared: Prepared | None = None
            try:
                started = self._clock()
                prepared = await prepare(record, held)
                if prepared is None:
                    return None
                load.check_erased(record)
                placed = await self._place(record, prepared, claimed, held, counted)
                if load.erased:
                    self.ledger.drop(counted)  # else its own parts would seem to have another holder, too
                    counted = {}
                    own = self.ledger.own_parts(placed.parts)
                    self._overwrite(record, partial(self._loader.scrub, placed.model, own))
                    self.ledger.drop(placed.parts)
                    self.ledger.free_slot()
                load.check_erased(record)
                self.stats.loads += 1
                self._failures.hide(ModelKey.of(record))
                self.stats.load_times.add(self._clock() - started)
                return self._residency.admit(record, placed, prepared.tier)
            except BaseException as error:
                let_go(error)  # so that a model made by this load no longer uses what is overwritten next
                raise
            finally:
                last = self.ledger.own_parts(counted)
                if last and (load.erased or self._loader.overwrites_what_leaves):
                    # Their other holder has gone meanwhile, and this load kept them from being overwritten.
                    made = prepared.model if prepared is not None else None
                    self._overwrite(record, partial(self._loader.scrub_held, held, last, made))
                self.ledger.drop(counted)

    def _overwrite(self, record: VersionRecord, scrub: Callable[[], int]) -> None:
        """Overwrite what a load leaves behind; what can't be is told to an erasure of its tenant."""
        try:
            scrub()
        except Exception:  # whatever the device says: the ledger must go on
            logger.exception("what a load of %s left could not be overwritten", record.name)
            self.not_overwritten.add(record.tenant)

    async def _place(
        self,
        record: VersionRecord,
        prepared: Prepared,
        claimed: Mapping[Part, int],
        held: Held,
        counted: Mapping[Part, int],
    ) -> Placed:
        """Make room, put the model there, and count what it really takes."""
        # Set aside all that will be copied, even what another model has brought here meanwhile.
        new_bytes = sum(size for part, size in claimed.items() if part not in counted)
        whole_bytes = sum(claimed.values())
        refusals = 0
        while True:
            try:
                self._residency.make_room(record.tenant, new_bytes, slots=1, whole_bytes=whole_bytes)
            except NoRoomNow:
                if not self.ledger.restore():
                    raise
                continue  # an earlier refusal by the device is no reason to refuse a load: ask it again
            before = self.refusals
            try:
                placed = await self._place_in_room(record, prepared, held, new_bytes)
            except DeviceFull:
                if self.refusals != before:
                    # Another load was refused while this one held the memory that it now gives back.
                    self._residency.frees += 1
                    self._residency.room.wake()
                # The ledger has room but the device has not: its allocator has cut it, or others have it.
                # Evict one model after the other until it fits, so that no load that could be served is
                # refused for ever.
                refusals += 1
                self.refusals += 1
                self._residency.evict_next(record.tenant)
                continue
            if refusals:
                self.ledger.lower()
            else:
                self.ledger.raise_again()
            return placed

    async def _place_in_room(
        self, record: VersionRecord, prepared: Prepared, held: Held, new_bytes: int
    ) -> Placed:
        reservation = self.ledger.reserve(new_bytes)
        placed: Placed | None = None
        try:
            placed = await self._loader.place(record, prepared, held)
            if placed.model.digest != record.digest:
                raise IsolationBroken(f"{record.name} was loaded with other weights")
            self._residency.check_ever_fits(record, placed.parts)
            more = self.ledger.missing_bytes(placed.parts) - reservation.bytes
            if more > 0:
                try:
                    self._residency.make_room(record.tenant, more, slots=0, whole_bytes=more)
                except NoRoomNow as error:
                    raise NoRoom(f"{record.name} takes {more} bytes more than it claimed; retry") from error
                self.ledger.grow(reservation, reservation.bytes + more)
        except BaseException:
            self.ledger.cancel(reservation)
            if placed is not None and self._loader.overwrites_what_leaves:
                absent = self.ledger.absent_parts(placed.parts)
                self._overwrite(record, partial(self._loader.scrub, placed.model, absent))
            raise
        self.ledger.settle(reservation, placed.parts)
        return placed
