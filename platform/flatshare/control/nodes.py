"""Takes a node out of the cluster: its models move first, then its replicas, and nothing fails.

Ray can't take a drain back, so all that can be refused is refused before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from pydantic import BaseModel, Field

from flatshare.control.decided import AsksFleet
from flatshare.errors import FleetUnavailable
from flatshare.placement.handover import to_load
from flatshare.pool.details import ClusterNode
from flatshare_registry.errors import InvalidInput, NotFound

__all__ = ["DrainedNodeReply", "NodeDrain", "TakesNodesOut"]

logger = logging.getLogger("flatshare.control")

LOOK_S: Final = 0.5
"""Seconds between two looks at what is left on a node: Serve tells nobody."""

ANSWER_S: Final = 5.0
"""Seconds after which a caller is told how far the drain is; asking again goes on waiting. Few seconds, since
the control plane itself may be on that node."""

WARM_S: Final = 8.0
"""Seconds that others have to load what the node's replicas hold; fewer than a broadcast may take."""


class TakesNodesOut(Protocol):
    """The cluster; calls block. They raise ``Unavailable``."""

    def nodes(self) -> list[ClusterNode]:
        """Living nodes."""
        ...

    def replicas(self, node_id: str) -> list[str]:
        """What Serve runs on a node."""
        ...

    def leave(self, node_id: str) -> None:
        """Have a node take nothing more, and leave when nothing is left."""
        ...


class DrainedNodeReply(BaseModel):
    """How far a node's drain is."""

    node_id: str
    address: str
    handed_over: int = Field(description="Models that others loaded before.")
    left: list[str] = Field(
        description="Replicas, of whatever Serve runs, that are still there; empty: it is done."
    )
    took_s: float = Field(description="Seconds since it was asked for.")


@dataclass(slots=True)
class _Drain:
    node: ClusterNode
    began: float
    handed_over: int


class NodeDrain:
    """Drains nodes, one at a time. All methods must be called on one event loop.

    Parameters
    ----------
    moved
        Homes other than the ring's.
    pool
        How the names of the pool's replicas begin: ``application/deployment/``.
    """

    def __init__(
        self,
        cluster: TakesNodesOut,
        fleet: AsksFleet,
        moved: Callable[[], Mapping[str, int]],
        pool: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._fleet = fleet
        self._moved = moved
        self._pool = pool
        self._clock = clock
        self._drains: dict[str, _Drain] = {}
        self._one_at_a_time = asyncio.Lock()

    async def drain(self, node: str, *, within_s: float = ANSWER_S) -> DrainedNodeReply:
        """Begin to drain a node, and return at once; or wait until nothing is left on it, or for a while.

        A new control plane goes on with a drain that the one before it began.

        Parameters
        ----------
        node
            Its id or the beginning of it, its address, or its host's name. One that has left is known by its
            id alone.

        Raises
        ------
        NotFound
            There is no such node.
        InvalidInput
            It is the head, the name fits several nodes, or the others have no room for its replicas of the
            pool. Room for what else Serve runs there, such as steps of pipelines, is not checked.
        Unavailable
            The cluster does not answer.
        """
        deadline = self._clock() + within_s
        async with self._one_at_a_time:
            drain, is_new = await self._begun(node)
        while left := await self._left(drain.node):
            if is_new or self._clock() >= deadline:
                break
            await asyncio.sleep(LOOK_S)  # Serve tells nobody
        return DrainedNodeReply(
            node_id=drain.node.node_id,
            address=drain.node.address,
            handed_over=drain.handed_over,
            left=left,
            took_s=round(self._clock() - drain.began, 1),
        )

    async def _left(self, node: ClusterNode) -> list[str]:
        return await asyncio.to_thread(self._cluster.replicas, node.node_id)

    async def _pool_on(self, node: ClusterNode) -> set[str]:
        return {one.removeprefix(self._pool) for one in await self._left(node) if one.startswith(self._pool)}

    async def _begun(self, name: str) -> tuple[_Drain, bool]:
        if name in self._drains:  # by its id: it may have left, and another node have its address
            return self._drains[name], False
        nodes = await asyncio.to_thread(self._cluster.nodes)
        node = _named(name, nodes)
        if node.node_id in self._drains:
            return self._drains[node.node_id], False
        if node.leaving:
            self._drains[node.node_id] = _Drain(node, self._clock(), 0)
            return self._drains[node.node_id], False
        if node.is_head:
            raise InvalidInput(
                f"{node.address} is the cluster's head, with Serve's controller: it can't be drained"
            )
        leaving = await self._pool_on(node)
        # The replicas that other leaving nodes still have to give away need the same room.
        going = [name for one in nodes if one.leaving for name in await self._pool_on(one)]
        room = sum(one.room for one in nodes if one.node_id != node.node_id and not one.leaving) - len(going)
        if room < len(leaving):
            raise InvalidInput(
                f"{node.address} has {len(leaving)} replicas, and the other nodes have room for "
                f"{max(room, 0)}: add a node, or flatshare scale to fewer first"
            )
        began = self._clock()
        drain = _Drain(node, began, await self._hand_over({*leaving, *going}))
        await asyncio.to_thread(self._cluster.leave, node.node_id)
        logger.warning("node %s leaves: %d replicas go to others", node.address, len(leaving))
        self._drains[node.node_id] = drain
        return drain, True

    async def _hand_over(self, leaving: set[str]) -> int:
        """Have the replicas that stay load what the others hold; they take over what they are asked for."""
        try:
            held = await self._fleet.held()
            staying = {one.place: one.replica for one in held if one.replica not in leaving}
            if not staying or len(staying) == len(held):
                return 0
            ready = await self._fleet.warm(to_load(held, staying, self._moved()), WARM_S)
        except FleetUnavailable as error:
            logger.warning("a node goes without handing over: %s", error.message)
            return 0
        return sum(map(len, ready.values()))


def _named(name: str, nodes: list[ClusterNode]) -> ClusterNode:
    exact = [one for one in nodes if name in (one.node_id, one.address)]
    found = exact or [
        one for one in nodes if one.name == name or (len(name) >= 4 and one.node_id.startswith(name))
    ]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{one.address} ({one.node_id[:12]})" for one in found or nodes)
    if found:
        raise InvalidInput(f"{name} names several nodes: {known}")
    raise NotFound(f"there is no replica and no node {name}; nodes: {known}")
