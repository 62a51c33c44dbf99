"""What the edge's configuration depends on besides its targets."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

__all__ = ["EdgeOptions", "quoted"]


@dataclass(frozen=True, slots=True)
class EdgeOptions:
    """What the configuration depends on besides targets.

    Attributes
    ----------
    socket
        Path of the admin socket, in a folder that only this user can enter.
    fallback_port
        Serve's own proxy on loopback: takes requests while no replica is up.
    max_body_bytes
        Beyond it 413.
    retry_body_bytes
        Longest body that is sent again when a replica dies.
    request_timeout_s
        A replica's own limit; the edge waits a little longer.
    tls_cert
        PEM file with which TLS ends here; empty for plain HTTP.
    max_connections_per_address
        Connections of one client at a time; more are closed at once.
    access_log
        Where a line for each request goes: ``stdout``, or the ``host:port`` of a UDP receiver. Empty:
        nowhere.
    spans
        Socket that receives a line for each sampled request; None: no request is sampled.
    trace_ratio
        Share of the requests that are sampled.
    metrics_port
        Where HAProxy's own counters can be read, on loopback; 0: nowhere.
    trusted_proxies
        Networks of load balancers in front of this edge: their ``x-forwarded-for`` says where a request
        comes from.
    hard_stop_after_s
        Seconds for which an old worker goes on after a reload: a stream lasts as long as its client likes.
    max_old_workers
        Reloads after which an old worker ends even if it has streams: each worker takes memory of its own.
    tasks
        Whether the pool takes tasks: then ``Prefer: respond-async`` makes one.
    max_task_bytes
        As ``max_body_bytes``, of a task's input.
    threads
        HAProxy's own. One does 8,000 of our requests/s. Two, on two cores that the replicas need for
        themselves, cost 5 % of the throughput in wake-ups (four alternating turns: 1,427 and 1,516
        requests/s).
    """

    host: str
    port: int
    socket: Path
    fallback_port: int
    max_body_bytes: int
    retry_body_bytes: int
    request_timeout_s: float
    tls_cert: str = ""
    max_connections_per_address: int = 1024
    max_connections: int = 4096
    threads: int = 1
    access_log: str = ""
    spans: Path | None = None
    trace_ratio: float = 0.0
    metrics_port: int = 0
    trusted_proxies: tuple[str, ...] = ()
    hard_stop_after_s: float = 3600
    max_old_workers: int = 32
    tasks: bool = False
    max_task_bytes: int = 64 * 1024**2


def quoted(path: Path | str) -> str:
    """As one word: HAProxy reads quotes as a shell does."""
    return shlex.quote(str(path))
