"""What Serve's instance details say: replicas' states, and where they listen. Pure reading of a document.

The schema (``ServeInstanceDetails``) is public in Ray; the fields that we use are pinned by
``tests/contract/test_ray_multiplex.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

__all__ = [
    "ClusterNode",
    "DoorAddress",
    "ReplicaState",
    "Target",
    "app_status",
    "replica_states",
    "replicas_on",
    "targets",
]


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """Where one replica takes HTTP itself (direct ingress).

    Attributes
    ----------
    name
        The replica's actor name: unique, and new at each start.
    """

    name: str
    ip: str
    port: int


@dataclass(frozen=True, slots=True)
class DoorAddress:
    """Where one replica's own listener is, as the replica says.

    Attributes
    ----------
    place
        Its number on the ring of homes (``placement.ring``): Serve's rank, which a replacement takes over.
    """

    replica: str
    host: str
    port: int
    place: int


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """Serve's word on one replica: STARTING, RUNNING, STOPPING ..."""

    replica: str
    state: str
    node_ip: str


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node of the cluster.

    Attributes
    ----------
    room
        Replicas of the pool that could be placed there besides.
    leaving
        It was told to leave: nothing more is placed there.
    """

    node_id: str
    address: str
    name: str
    is_head: bool
    room: int
    leaving: bool = False


def replicas_on(details: dict[str, Any], node_id: str) -> list[str]:
    """Replicas on a node, of every application, by application, deployment and name; sorted."""
    return sorted(
        f"{app}/{deployment}/{one['replica_id']}"
        for app, found in details["applications"].items()
        for deployment, about in found["deployments"].items()
        for one in about["replicas"]
        if one.get("node_id") == node_id
    )


def app_status(details: dict[str, Any], app: str) -> tuple[str, str]:
    """Status and message of an application; NOT_STARTED when there is none."""
    found = details["applications"].get(app)
    return (_text(found["status"]), str(found["message"])) if found else ("NOT_STARTED", "")


def replica_states(details: dict[str, Any], app: str, deployment: str) -> list[ReplicaState]:
    """All replicas of a deployment, whatever their state."""
    found = details["applications"].get(app, {}).get("deployments", {}).get(deployment, {})
    return [
        ReplicaState(str(one["replica_id"]), _text(one["state"]), str(one.get("node_ip") or ""))
        for one in found.get("replicas", [])
    ]


REPLICA_NAME: Final = "SERVE_REPLICA::"
"""How the name of every replica's actor begins."""


def targets(details: dict[str, Any], app: str) -> list[Target]:
    """Where an application's replicas take HTTP, sorted by name; empty without direct ingress or replicas.

    At zero replicas Serve lists its own proxy as the application's target; that is no replica.
    """
    return sorted(
        Target(str(one["name"]), str(one["ip"]), int(one["port"]))
        for group in details["target_groups"]
        if group["app_name"] == app and _text(group["protocol"]) == "HTTP"
        for one in group["targets"]
        if str(one["name"]).startswith(REPLICA_NAME)
    )


def _text(value: object) -> str:
    """A field that Ray gives as a string enum, as text."""
    return str(getattr(value, "value", value))
