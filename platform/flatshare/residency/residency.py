"""What is on a device, what holds it, and what is evicted: slots and bytes, leases, pins, floors, eviction.

Knows nothing of where models come from; ``model_cache.py`` loads them and hands them over.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping

from flatshare.errors import DeviceFull, NeverFits, NoRoom, ResidentOverQuota
from flatshare.models.stages import Model
from flatshare.residency.lease import Lease, Resident
from flatshare.residency.ledger import Ledger
from flatshare.residency.policy import EvictionPolicy
from flatshare.residency.room import RoomQueue
from flatshare.residency.stats import CacheStats
from flatshare.residency.tenant_limits import BoundsOf, own_victims, spare_floors
from flatshare.weights.loader import Placed
from flatshare.weights.tiers import LeaseTag, ModelKey, Part, ResidentInfo, State, Tier
from flatshare_registry.records import VersionRecord

__all__ = ["NoMemoryNow", "NoRoomNow", "Residency"]

logger = logging.getLogger("flatshare.residency")


class NoRoomNow(NoRoom):
    """A load is ready, but nothing that may be evicted makes room for it at this moment."""

    def __init__(self) -> None:
        super().__init__("no room now; retry")


class NoMemoryNow(NoRoomNow):
    """The same, although the ledger has room: the device has none.

    Attributes
    ----------
    frees
        How often memory had come free until then.
    """

    def __init__(self, frees: int) -> None:
        super().__init__()
        self.frees = frees


class Residency:
    """The models on one device. Must be used on one event loop; nothing in here waits.

    Parameters
    ----------
    ledger
        Slots and bytes.
    policy
        Which model is evicted first.
    bounds_of
        A tenant's cap and floor on the device.
    stats
        Counted in: hits and evictions.
    scrub
        Overwrites those parts of a model that nobody else has; returns how many bytes.
    overwrites
        Whether that is done at each eviction, not only at an erasure.
    on_change
        Called after models were evicted; must not raise.
    wall_clock
        POSIX seconds.

    Attributes
    ----------
    room
        Where loads wait for a lease to end.
    frees
        How often memory came free: residents that went, and loads that ended.
    """

    def __init__(
        self,
        ledger: Ledger,
        policy: EvictionPolicy,
        bounds_of: BoundsOf,
        *,
        stats: CacheStats,
        scrub: Callable[[Model, Collection[Part]], int],
        overwrites: bool = False,
        on_change: Callable[[], None],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.ledger = ledger
        self.policy = policy
        self.stats = stats
        self._residents: dict[ModelKey, Resident] = {}  # what can be leased
        self._leaving: dict[int, Resident] = {}  # what can no longer be leased and still takes its slot
        self.room = RoomQueue()
        self._share_of = bounds_of
        self._scrub = scrub
        self._overwrites = overwrites
        self._on_change = on_change
        self._wall_clock = wall_clock
        self._protected: dict[ModelKey, int] = {}
        self._generation = 0
        self.frees = 0

    # -- who is here

    def find(self, key: ModelKey) -> Resident | None:
        """A version that can be leased at once."""
        return self._residents.get(key)

    def lendable(self) -> list[Resident]:
        """All that can be leased at once."""
        return list(self._residents.values())

    def held(self) -> list[Resident]:
        """All that takes a slot: what can be leased, what is draining, what is in quarantine."""
        return [*self._residents.values(), *self._leaving.values()]

    # -- lending

    def lend(self, key: ModelKey) -> Lease | None:
        """A lease on a version, if it can be leased at once. The hot path."""
        resident = self._residents.get(key)
        if resident is None:
            return None
        self.policy.used(key)
        return self.grant(resident, Tier.DEVICE)

    def grant(self, resident: Resident, tier: Tier) -> Lease:
        """A lease on a resident, for a request that found it in this tier."""
        resident.leases += 1
        resident.hits += 1
        resident.last_used_at = self._wall_clock()
        self.stats.hits[tier] += 1
        return Lease(resident, tier, self._released)

    def _released(self, resident: Resident) -> None:
        resident.leases -= 1
        if not resident.leases:
            self.free_if_unleased(resident)
            self.room.wake()

    # -- coming and going

    def admit(self, record: VersionRecord, placed: Placed, tier: Tier) -> Resident:
        """A placed model, whose reservation is settled, becomes resident.

        Nothing may await between here and the leases of the waiting requests: the slot goes from reserved to
        resident to leased in one step.
        """
        self._generation += 1
        key, now = ModelKey.of(record), self._wall_clock()
        resident = Resident(
            record=record,
            model=placed.model,
            parts=placed.parts,
            tier=tier,
            tag=LeaseTag(record.tenant, record.version, record.digest, self._generation),
            probe_due=not placed.proven,
            loaded_at=now,
            last_used_at=now,
        )
        self._residents[key] = resident
        self.policy.admitted(key)
        return resident

    @contextlib.contextmanager
    def protected(self, key: ModelKey) -> Iterator[None]:
        """Within this, a version is evicted after all others: its successor is on the way."""
        self._protected[key] = self._protected.get(key, 0) + 1
        try:
            yield
        finally:
            self._protected[key] -= 1
            if not self._protected[key]:
                del self._protected[key]

    def retire(self, resident: Resident, *, evicted: bool) -> None:
        """Grant no new leases; free it now, or when the last lease ends. It counts until it is freed."""
        key = ModelKey.of(resident.record)
        del self._residents[key]
        self.policy.removed(key, evicted=evicted)
        resident.state = State.DRAINING
        self._leaving[id(resident)] = resident
        self.free_if_unleased(resident)

    def quarantine(self, resident: Resident) -> None:
        """Take a slot out of use until an operator unloads its version: it may not be what it says."""
        if resident.state is State.RESIDENT:
            self.retire(resident, evicted=False)
        resident.state = State.QUARANTINED

    def leave(self, resident: Resident) -> None:
        """Remove a model, whatever it is held for: free it now, or when its last lease ends."""
        if resident.state is State.RESIDENT:
            self.retire(resident, evicted=False)
        elif resident.state is State.QUARANTINED:
            resident.state = State.DRAINING
            self.free_if_unleased(resident)

    def free_if_unleased(self, resident: Resident) -> None:
        """Let go of a draining model whose last lease has ended."""
        if resident.leases or resident.state is not State.DRAINING:
            return
        erased = resident.erased
        if resident.model is not None and (erased is not None or self._overwrites):
            try:
                size = self._scrub(resident.model, self.ledger.own_parts(resident.parts))
                if erased is not None:
                    erased.overwritten_bytes += size
            except Exception:  # the device failed: free slot and bytes all the same, and report it
                logger.exception("%s could not be overwritten", resident.record.name)
                if erased is not None:
                    erased.failed = True
        # Dropping the last reference frees the tensors; nobody else holds the model.
        resident.model = None
        del self._leaving[id(resident)]
        self.ledger.drop(resident.parts)
        self.ledger.free_slot()
        self.frees += 1
        self.room.wake()

    # -- making room

    def make_room(self, tenant: str, new_bytes: int, *, slots: int, whole_bytes: int) -> None:
        """Evict what must go to make this much fit, or nothing.

        Parameters
        ----------
        whole_bytes
            Bytes that count towards the tenant's cap.

        Raises
        ------
        NoRoomNow
            Evicting all that may go would not be enough.
        ResidentOverQuota
            The model is more than the tenant's whole cap.
        """
        if self._share_of(tenant).cap_bytes is None and self.ledger.fits(slots, new_bytes):
            return
        keys = self.candidates(tenant)
        own = self.own_victims(tenant, whole_bytes, keys)
        if own is None:
            raise NoRoomNow
        keys = [*own, *(key for key in keys if key not in own)]
        chosen = self.ledger.choose_victims(
            [self._residents[key].parts for key in keys], new_bytes, slots=slots
        )
        if chosen is None:
            raise NoRoomNow
        for key in dict.fromkeys([*own, *(keys[index] for index in chosen)]):
            self.retire(self._residents[key], evicted=True)
            self.stats.evictions += 1
        self._on_change()

    def evict_next(self, tenant: str) -> None:
        """Evict the next victim, since the device has no memory for a model of a tenant.

        Raises
        ------
        NoMemoryNow
            All that is here is in use, or on its way here.
        DeviceFull
            Nothing is here that could go, now or when a lease ends.
        """
        keys = self.candidates(tenant)
        if not keys:
            if self.ledger.reserved_bytes or any(one.leases for one in self.held()):
                raise NoMemoryNow(self.frees)
            raise DeviceFull("the device has no memory for a model, and holds none that could go; retry")
        self.retire(self._residents[keys[0]], evicted=True)
        self.stats.evictions += 1
        self._on_change()

    def own_victims(self, tenant: str, size_bytes: int, keys: list[ModelKey]) -> list[ModelKey] | None:
        """A tenant's own models that must go for its cap; None when these are in use.

        Raises
        ------
        ResidentOverQuota
            The model is more than the whole cap.
        """
        cap = self._share_of(tenant).cap_bytes
        return own_victims(tenant, size_bytes, cap, keys, self._residents, self._leaving.values())

    def could_fit(self, tenant: str, claimed: Mapping[Part, int], *, refused_at: int | None = None) -> bool:
        """Whether a load that waits for room would find it if it tried again.

        Parameters
        ----------
        refused_at
            The device had no memory for it (:attr:`NoMemoryNow.frees`): memory must have come free since
            then, or there must be a model to evict, whatever the ledger says.
        """
        if refused_at == self.frees and not self.candidates(tenant):
            return False
        if self.own_victims(tenant, sum(claimed.values()), self.candidates(tenant)) is None:
            return False
        new_bytes = self.ledger.missing_bytes(claimed)
        if self.ledger.fits(1, new_bytes, whole=True):  # a load tries all of the budget before it waits
            return True
        parts = [self._residents[key].parts for key in self.candidates(tenant)]
        return self.ledger.choose_victims(parts, new_bytes, slots=1, keep=claimed, whole=True) is not None

    def candidates(self, tenant: str) -> list[ModelKey]:
        """Models that may go for a model of this tenant, in order; those with a successor on the way last."""
        keys = [key for key in self.policy.victims() if self._evictable(key)]
        keys.sort(key=lambda key: key in self._protected)
        return spare_floors(
            keys, self._residents, self._share_of, tenant, self.ledger.slots, self.ledger.budget_bytes
        )

    def no_room(self, record: VersionRecord, claimed: Mapping[Part, int]) -> Exception:
        """The error for those who wait for a version, if all that could make room for it is in use."""
        tenant = record.tenant
        if self.own_victims(tenant, sum(claimed.values()), self.candidates(tenant)) is None:
            return ResidentOverQuota(
                f"no room for {record.name}: all that tenant {tenant} may keep on a device is in use"
            )
        return NoRoom(
            f"no room for {record.name}: all {self.ledger.slots} slots, or their bytes, are in use or "
            "pinned; retry, or add slots"
        )

    def check_ever_fits(self, record: VersionRecord, parts: Mapping[Part, int]) -> None:
        """Refuse what is larger than the whole budget (promise 9).

        Raises
        ------
        NeverFits
            It is.
        """
        budget, size = self.ledger.budget_bytes, sum(parts.values())
        if budget is not None and size > budget:
            raise NeverFits(
                f"{record.name} takes {size} bytes on the device; a replica's budget is {budget} bytes"
            )

    def check_pin(self, key: ModelKey, parts: Mapping[Part, int]) -> None:
        """Refuse one pin too many.

        Raises
        ------
        NoRoom
            It would leave no slot, or less than half the bytes, for everybody else.
        """
        pinned = [one for other, one in self._residents.items() if one.pinned and other != key]
        if len(pinned) + 1 >= self.ledger.slots:
            raise NoRoom(
                f"pinning {key} would leave none of {self.ledger.slots} slots for other models; unpin some"
            )
        budget = self.ledger.budget_bytes
        together = {part: size for one in pinned for part, size in one.parts.items()} | dict(parts)
        if budget is not None and sum(together.values()) > budget // 2:
            raise NoRoom(f"pinning {key} would take more than half of the {budget} bytes; unpin some")

    def _evictable(self, key: ModelKey) -> bool:
        resident = self._residents[key]
        return not resident.leases and not resident.pinned

    # -- looking

    def snapshot(self) -> list[ResidentInfo]:
        """All that is held and why, most recently used first."""
        return [
            ResidentInfo(
                tenant=one.record.tenant,
                version=one.record.version,
                digest=one.record.digest,
                architecture=one.record.architecture,
                size_bytes=one.size_bytes,
                own_bytes=self.ledger.own_bytes(one.parts),
                tier=one.tier,
                state=one.state,
                pinned=one.pinned,
                generation=one.tag.generation,
                hits=one.hits,
                leases=one.leases,
                last_used_at=one.last_used_at,
                loaded_at=one.loaded_at,
            )
            for one in sorted(self.held(), key=lambda one: -one.last_used_at)
        ]
