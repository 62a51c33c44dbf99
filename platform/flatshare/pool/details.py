"""What Serve's controller says of running applications: replicas' states, and where they listen.

Read from the controller itself, so that no dashboard is needed. ``get_serve_details`` is the call
behind Ray's public REST ``GET /api/serve/applications/``; its schema (``ServeInstanceDetails``) is
public. Pinned by ``tests/contract/test_ray_details.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.serve.context import _get_global_client

from flatshare_registry.errors import Unavailable

__all__ = ["ReplicaState", "Target", "app_status", "read_details", "replica_states", "targets"]


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
class ReplicaState:
    """Serve's word on one replica: STARTING, RUNNING, STOPPING ..."""

    replica: str
    state: str
    node_ip: str


def read_details() -> dict[str, Any]:
    """Serve's instance details. Blocks for one actor call.

    Raises
    ------
    Unavailable
        Serve is not running, or its controller does not answer.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        raise Unavailable("Ray Serve is not running")
    try:
        details: dict[str, Any] = client.get_serve_details()
    except Exception as error:  # ray raises a dozen kinds for a dead or busy controller
        raise Unavailable(f"Serve's controller does not answer: {type(error).__name__}") from error
    return details


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


def targets(details: dict[str, Any], app: str) -> list[Target]:
    """Where an application's replicas take HTTP, sorted by name; empty without direct ingress or replicas."""
    return sorted(
        Target(str(one["name"]), str(one["ip"]), int(one["port"]))
        for group in details["target_groups"]
        if group["app_name"] == app and _text(group["protocol"]) == "HTTP"
        for one in group["targets"]
    )


def _text(value: object) -> str:
    """A field that Ray gives as a string enum, as text."""
    return str(getattr(value, "value", value))
