"""What Serve's instance details say, read from documents of the form that Ray 2.60 gives."""

from __future__ import annotations

from typing import Any

from flatshare.pool.details import ReplicaState, Target, replica_states, targets


def group(app: str, protocol: str, *names: str) -> dict[str, Any]:
    listed = [
        {"name": name, "ip": "127.0.0.1", "port": 30000 + number, "instance_id": "x"}
        for number, name in enumerate(names)
    ]
    return {"app_name": app, "protocol": protocol, "route_prefix": "/", "targets": listed}


def test_at_zero_replicas_serves_own_proxy_is_no_replica() -> None:
    """Serve then lists its proxy, so that a request wakes the application; it is not where a model lives."""
    proxy = "SERVE_CONTROLLER_ACTOR:SERVE_PROXY_ACTOR-0123456789abcdef"
    replica = "SERVE_REPLICA::flatshare#ClassifierPool#9yyec1bu"
    assert targets({"target_groups": [group("flatshare", "HTTP", proxy)]}, "flatshare") == []
    document = {
        "target_groups": [
            group("flatshare", "HTTP", proxy, replica),
            group("flatshare", "gRPC", replica),
            group("other", "HTTP", "SERVE_REPLICA::other#Pool#x"),
        ]
    }
    assert targets(document, "flatshare") == [Target(replica, "127.0.0.1", 30001)]


def test_replicas_in_every_state_are_read() -> None:
    listed = [
        {"replica_id": name, "state": state, "node_ip": None}
        for name, state in (("a", "RUNNING"), ("b", "STOPPING"))
    ]
    document = {"applications": {"flatshare": {"deployments": {"Pool": {"replicas": listed}}}}}
    assert replica_states(document, "flatshare", "Pool") == [
        ReplicaState("a", "RUNNING", ""), ReplicaState("b", "STOPPING", ""),
    ]  # fmt: skip
    assert replica_states({"applications": {}}, "flatshare", "Pool") == []
