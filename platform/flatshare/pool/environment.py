"""The environment that Ray must start with: Ray reads its flags when it is imported.

``prepare`` runs before the first ``import ray`` of a program that starts Ray; the same variables go
into the runtime environment of every Serve process, so that they also hold on a cluster that was
started by somebody else. ``tests/contract`` checks that Ray 2.60 reads each of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

__all__ = ["prepare", "serve_environment", "variables_of"]

HANDLE_MESSAGE_BYTES: Final = 80 * 1024**2
"""Largest argument of a handle call, in bytes; Ray's own limit of 4 MiB is 1,300 images."""


PASSED_ON: Final = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Where S3 is, from ``up`` to replicas on a cluster that was started elsewhere. Not credentials: a
runtime environment can be read by everybody on the cluster; nodes have roles or their own."""


TOKENS: Final = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables in which an operator names a cluster's token; naming one also turns token mode on."""

QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's three metrics servers listen on all interfaces and ask for no token; their labels include ids of
    # models, and so names of tenants. An impossible port switches two of them off.
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
"""What we switch off in a cluster that we start. An operator who wants one of these sets its variable."""

LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


def serve_environment(edge: Literal["haproxy", "serve"]) -> dict[str, str]:
    """Variables for every Serve process (controller, proxies, replicas).

    Parameters
    ----------
    edge
        ``haproxy``: replicas listen themselves (direct ingress). ``serve``: only the proxy does.
    """
    return {
        # User code, router and replica share one event loop, logs are buffered, handles use gRPC.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1" if edge == "haproxy" else "0",
        "RAY_SERVE_PROXY_USE_GRPC": "1",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(HANDLE_MESSAGE_BYTES),
        # The edge stops sending to a replica as soon as Serve drops it from its targets (it looks
        # twice a second), so 30 s of draining would only make every update slow.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "3",
    }


def variables_of(edge: Literal["haproxy", "serve"], given: Mapping[str, str]) -> dict[str, str]:
    """Variables for Serve's processes; those that the given environment sets win."""
    chosen = {name: given.get(name, value) for name, value in serve_environment(edge).items()}
    chosen |= _without_proxies(given)
    return chosen | {name: given[name] for name in PASSED_ON if name in given}


def prepare(
    edge: Literal["haproxy", "serve"],
    token_file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Set this process's variables before it imports ray; returns those for Serve's processes.

    What the operator set already wins.

    Parameters
    ----------
    token_file
        Holds the cluster's token; used when the operator says nothing about Ray's authentication.
    """
    given = dict(os.environ if environment is None else environment)
    chosen = variables_of(edge, given)
    os.environ.update({name: value for name, value in chosen.items() if name not in PASSED_ON})
    # A driver of ours calls handles from plain threads too, which needs the router's own loop.
    os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"
    if "RAY_AUTH_MODE" not in given:
        if token_file is not None and not any(name in given for name in TOKENS):
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)
        if token_file is not None or any(name in given for name in TOKENS):
            os.environ["RAY_AUTH_MODE"] = "token"
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Ray runs its workers at nice 15; replicas answer customers, and must not stand behind
    # whatever else the machine does. Read by the raylet that we start.
    os.environ.setdefault("RAY_worker_niceness", "0")
    return chosen


def _without_proxies(given: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep calls within the cluster away from the proxies that the environment names.

    Handles are gRPC calls to a node's address, and gRPC asks ``https_proxy`` and ``http_proxy`` for that too
    (grpc, ``doc/environment_variables.md``); an empty ``grpc_proxy`` means none. HTTP on loopback is ours.
    """
    named = [
        name for text in (given.get("no_proxy"), given.get("NO_PROXY")) for name in (text or "").split(",")
    ]
    hosts = ",".join(dict.fromkeys([*(name.strip() for name in named if name.strip()), *LOOPBACK]))
    return {"grpc_proxy": given.get("grpc_proxy", ""), "no_proxy": hosts, "NO_PROXY": hosts}
