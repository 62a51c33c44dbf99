"""The fleet: all replicas of the pool, seen together, and told things together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from flatshare.errors import FleetUnavailable
from flatshare.placement.load import Held, ReplicaLoad
from flatshare.pool.details import DoorAddress, ReplicaState
from flatshare.replica.receipt import EraseReceipt, HostReceipt
from flatshare.replica.snapshot import ReplicaSnapshot
from flatshare.residency.stats import CacheStats
from flatshare_registry.errors import RegistryError, Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.records import TenantHead

__all__ = ["Fleet", "FleetView", "Told"]

logger = logging.getLogger("flatshare.control")

BROADCAST_TIMEOUT_S: Final = 10.0
"""Seconds that all replicas have to answer a broadcast; one that does not is starting, stopping or stuck."""


STATES_TIMEOUT_S: Final = 5.0
"""Seconds that Serve's controller has to say which replicas exist."""


class Broadcasts(Protocol):
    """What the fleet asks of a ``DeploymentHandle``."""

    def broadcast(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method on every running replica."""
        ...


@dataclass(frozen=True, slots=True)
class Told:
    """Which replicas did what the fleet was told, and which did not.

    Attributes
    ----------
    reached
        Names of replicas that did what they were told, sorted.
    missed
        Names of existing replicas that did not, sorted: Serve passes no broadcast to a replica that starts,
        updates or stops. None when Serve could not say which replicas exist.
    """

    reached: tuple[str, ...]
    missed: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class FleetView:
    """The fleet at one moment.

    Attributes
    ----------
    snapshots
        Of replicas that answered.
    states
        Serve's word on every replica, also those that can't answer yet.
    totals
        Sums over ``snapshots``.
    """

    snapshots: list[ReplicaSnapshot]
    states: dict[str, ReplicaState]
    totals: CacheStats


class Fleet:
    """All replicas of the pool.

    Parameters
    ----------
    handle
        A handle on the pool.
    read_states
        Reads Serve's word on the replicas; blocking, called in a thread.
    read_head
        Reads a tenant's head, deleted or not; likewise. None: replicas are not sent the head, and are told to
        read it.
    """

    def __init__(
        self,
        handle: Broadcasts,
        read_states: Callable[[], list[ReplicaState]],
        read_head: Callable[[TenantId], TenantHead] | None = None,
    ) -> None:
        self._handle = handle
        self._read_states = read_states
        self._read_head = read_head

    async def view(self) -> FleetView:
        """Ask everybody. When the replicas do not answer in time, there are states but no snapshots."""
        reading = asyncio.create_task(self._states())
        try:
            found = await self._broadcast("snapshot")
        except FleetUnavailable:
            found = []
        states = await reading
        snapshots = sorted(
            (one for one in found if isinstance(one, ReplicaSnapshot)),
            key=lambda one: (one.node, one.replica),
        )
        return FleetView(
            snapshots,
            {one.replica: one for one in states},
            CacheStats.total([one.stats for one in snapshots]),
        )

    async def refresh(self, tenant: str) -> Told:
        """Have every replica read a tenant anew.

        They are sent the tenant's head: a replica that can't reach the store still learns of a revoked key.
        Never fails, because it follows a change that is already stored: a replica that was not reached, or
        could not read, sees the change within its view's TTL.
        """
        facts: list[str] = []
        if self._read_head is not None:
            try:
                facts.append((await asyncio.to_thread(self._read_head, TenantId(tenant))).encode().decode())
            except RegistryError as error:
                logger.warning("replicas are not told what %s is now: %s", tenant, error.message)
        return await self._tell("refresh", tenant, *facts)

    async def follow_settings(self) -> Told:
        """Have every replica take over changed settings. Never fails: each looks now and then, too."""
        return await self._tell("follow_settings")

    async def fence(self, tenant: str) -> Told:
        """Have every replica refuse a tenant for a while, requests under way included. Never fails."""
        return await self._tell("fence", tenant)

    async def erase(self, tenant: str) -> list[EraseReceipt]:
        """Have every replica erase a tenant; receipts of those that answered."""
        try:
            return [one for one in await self._broadcast("erase", tenant) if isinstance(one, EraseReceipt)]
        except FleetUnavailable:
            return []

    async def erase_host(self, digests: list[str]) -> list[HostReceipt]:
        """Have every node overwrite and remove tensors; a receipt of each replica that answered.

        Raises
        ------
        FleetUnavailable
            Not all answered in time, or nobody could be asked.
        """
        found = await self._broadcast("erase_host", digests)
        return [one for one in found if isinstance(one, HostReceipt)]

    async def may_answer(self) -> list[str]:
        """Names of the replicas that may answer a request: all that exist, except those that are starting.

        A replica that updates or stops gets no broadcast, and still answers on its port.

        Raises
        ------
        FleetUnavailable
            Serve can't say.
        """
        try:
            states = await self._states()
        except Unavailable as error:
            raise FleetUnavailable(f"nobody can say which replicas exist: {error.message}") from error
        return sorted(one.replica for one in states if one.state != "STARTING")

    async def preload(self, model_ref: str, *, pin: bool = False) -> Told:
        """Make a model resident on every replica, and keep it there if ``pin``.

        Raises
        ------
        Exception
            What the first replica that failed raised.
        FleetUnavailable
            Not all replicas answered in time, or nobody could be asked; loads that had begun go on.
        """
        return await self._told(_all_well(await self._broadcast("preload", model_ref, pin)))

    async def unpin(self, model_ref: str) -> int:
        """Let a model be evicted again; on how many replicas it was pinned. Raises as :meth:`preload`."""
        return sum(_all_well(await self._broadcast("unpin", model_ref)))

    async def unload(self, model_ref: str) -> int:
        """Free a model everywhere; on how many replicas it was resident. Raises as :meth:`preload`."""
        return sum(_all_well(await self._broadcast("unload", model_ref)))

    async def loads(self) -> list[ReplicaLoad]:
        """How busy each replica was lately; of those that answered.

        Raises
        ------
        FleetUnavailable
            They did not answer in time, or nobody could be asked.
        """
        return [one for one in await self._broadcast("load") if isinstance(one, ReplicaLoad)]

    async def doors(self) -> list[DoorAddress]:
        """Where each replica listens itself. Raises as :meth:`loads`."""
        return [one for one in await self._broadcast("door") if isinstance(one, DoorAddress)]

    async def held(self) -> list[Held]:
        """What each replica holds. Raises as :meth:`loads`."""
        return [one for one in await self._broadcast("held") if isinstance(one, Held)]

    async def warm(self, wanted: Mapping[str, Sequence[str]], within_s: float) -> dict[str, list[str]]:
        """Have replicas load models in advance; by replica, those of them that it holds now.

        Parameters
        ----------
        wanted
            Refs by replica.
        within_s
            Seconds; fewer than a broadcast may take. Raises as :meth:`loads`.
        """
        told = {name: list(refs) for name, refs in wanted.items()}
        answers = await self._broadcast("warm", told, within_s)
        return dict(one for one in answers if isinstance(one, tuple))

    async def _tell(self, method: str, *facts: str) -> Told:
        try:
            answers = await self._broadcast(method, *facts)
        except FleetUnavailable as error:
            logger.warning("%s %s: %s", method, "".join(facts[:1]), error.message)
            answers = []
        return await self._told(answers)

    async def _told(self, answers: list[Any]) -> Told:
        """Which of the existing replicas answered with their names."""
        reached = {one for one in answers if isinstance(one, str)}
        try:
            states = await self._states()
        except Unavailable:
            return Told(tuple(sorted(reached)), None)
        return Told(tuple(sorted(reached)), tuple(sorted({one.replica for one in states} - reached)))

    async def _states(self) -> list[ReplicaState]:
        """Serve's word on every replica.

        Raises
        ------
        Unavailable
            It does not come, or is late: a controller that hangs must not hold up the caller of a change.
        """
        try:
            async with asyncio.timeout(STATES_TIMEOUT_S):
                return await asyncio.to_thread(self._read_states)
        except TimeoutError:
            raise Unavailable(f"Serve's controller did not answer within {STATES_TIMEOUT_S:g} s") from None

    async def _broadcast(
        self, method: str, *arguments: str | bool | float | list[str] | dict[str, list[str]]
    ) -> list[Any]:
        """Every running replica's result, or the exception that it raised.

        Raises
        ------
        FleetUnavailable
            They did not all answer in time, or nobody could be asked.
        """
        try:
            async with asyncio.timeout(BROADCAST_TIMEOUT_S):
                answers = self._handle.broadcast(method, *arguments)
                results: list[Any] = await answers.results_async(return_exceptions=True)
                return results
        except TimeoutError:
            raise FleetUnavailable(f"not all replicas answered within {BROADCAST_TIMEOUT_S:g} s") from None
        except Exception as error:  # at zero replicas, and while Serve stops: Ray has a dozen kinds for it
            raise FleetUnavailable(f"no replica can be told now ({type(error).__name__})") from error


def _all_well(results: list[Any]) -> list[Any]:
    """The results, if none is an exception."""
    for one in results:
        if isinstance(one, BaseException):
            raise one
    return results
