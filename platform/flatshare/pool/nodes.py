"""The cluster's nodes: who is there, what is free on each, and taking one out.

Ray's own word for it is "drain": nothing new is placed on the node, Serve starts its replicas anew on others
and ends them here once those run. Ray ends the node when nothing at all is left on it, objects included. It
can't be taken back. The call is Ray's ``GcsClient.drain_node``, which no public API of 2.60 has; it is pinned
by ``tests/contract/test_ray_nodes.py``.
"""

from __future__ import annotations

import time
from typing import Any, Final

import ray
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is compiled
from ray.core.generated import autoscaler_pb2

from flatshare.pool.controller import read_details
from flatshare.pool.details import ClusterNode, replicas_on
from flatshare_registry.errors import Unavailable

__all__ = ["RayNodes"]

HEAD: Final = "node:__internal_head__"
"""A resource of the head alone."""

DEADLINE_S: Final = 24 * 3600
"""Seconds after which Ray may end what is left on a node: long, since each replica ends by itself before."""


class RayNodes:
    """The nodes of the connected cluster. All methods block.

    Parameters
    ----------
    cpus, gpus
        What one replica of the pool takes.
    """

    def __init__(self, cpus: float, gpus: float) -> None:
        self._cpus = cpus
        self._gpus = gpus

    def nodes(self) -> list[ClusterNode]:
        """Living nodes, with the room that each has for more replicas of the pool.

        Raises
        ------
        Unavailable
            The cluster does not say.
        """
        try:
            known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray gives it no types
            free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
            leaving = self._client().get_draining_nodes()
        except Exception as error:  # ray raises a dozen kinds when its head is away
            raise Unavailable(
                f"the cluster does not say which nodes it has: {type(error).__name__}"
            ) from error
        return [
            ClusterNode(
                node_id=str(one["NodeID"]),
                address=str(one["NodeManagerAddress"]),
                name=str(one["NodeManagerHostname"]),
                is_head=HEAD in one["Resources"],
                room=self._room(free.get(str(one["NodeID"]), {})),
                leaving=str(one["NodeID"]) in leaving,
            )
            for one in known
            if one["Alive"]
        ]

    def replicas(self, node_id: str) -> list[str]:
        """Replicas of whatever Serve runs that are on a node. Raises as :meth:`nodes`."""
        return replicas_on(read_details(), node_id)

    def leave(self, node_id: str) -> None:
        """Have a node take nothing more, and leave when nothing is left. Raises as :meth:`nodes`."""
        reason = autoscaler_pb2.DrainNodeReason.Value(  # type: ignore[attr-defined]  # made as it is imported
            "DRAIN_NODE_REASON_PREEMPTION"
        )
        until = int((time.time() + DEADLINE_S) * 1000)
        try:
            accepted, why = self._client().drain_node(node_id, reason, "flatshare drain", until)
        except Exception as error:  # as above
            raise Unavailable(
                f"the cluster was not told that a node leaves: {type(error).__name__}"
            ) from error
        if not accepted:
            raise Unavailable(f"Ray does not let the node go: {why}")

    @staticmethod
    def _client() -> Any:
        return GcsClient(address=ray.get_runtime_context().gcs_address)

    def _room(self, free: dict[str, float]) -> int:
        wanted = {"CPU": self._cpus, "GPU": self._gpus}
        return min(
            (int(free.get(name, 0.0) / each + 1e-4) for name, each in wanted.items() if each), default=1_000
        )
