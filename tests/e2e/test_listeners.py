"""Who can reach what: each listening socket of a running platform is on loopback, or asks for the token."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import grpc
import httpx
import psutil
from tests.e2e.conftest import Platform, processes_of

SERVICES = (
    "ray.rpc.NodeInfoGcsService/CheckAlive",
    "ray.rpc.NodeManagerService/GetResourceLoad",
    "ray.rpc.ObjectManagerService/Push",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.ReporterService/ReportOCMetrics",
    "ray.serve.ASGIService/HandleRequest",
)
"""One call of each service that a process of Ray 2.60 offers: each port offers some of them."""

LOOPBACK = ("127.0.0.1", "::1")


def answers_without_a_token(host: str, port: int) -> set[str]:
    """What each kind of call gets that shows nothing: codes of gRPC, or statuses of HTTP."""
    found: set[str] = set()
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for service in SERVICES:
            try:
                channel.unary_unary(f"/{service}")(b"", timeout=10)
                found.add("OK")
            except grpc.RpcError as error:
                found.add(error.code().name)
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    break  # it does not speak gRPC
    try:
        found.add(str(httpx.get(f"http://{host}:{port}/", timeout=10, trust_env=False).status_code))
    except httpx.RemoteProtocolError:
        pass  # it does not speak HTTP/1
    return found - {"UNIMPLEMENTED", "UNAVAILABLE"}


def test_every_socket_is_on_loopback_or_asks_for_the_token(platform: Platform) -> None:
    seen: dict[str, set[str]] = {}
    for process in processes_of(platform):
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in LOOPBACK:
                host, port = connection.laddr.ip, connection.laddr.port
                near = "127.0.0.1" if host in ("::", "0.0.0.0") else host
                seen[f"{process.name()} {host}:{port}"] = answers_without_a_token(near, port)
    assert len(seen) > 5, "Ray's own ports are on all interfaces: this test would not see them go"
    assert {name: got for name, got in seen.items() if got not in ({"UNAUTHENTICATED"}, {"401"})} == {}


def test_the_token_is_this_users_alone(platform: Platform) -> None:
    folder = Path(platform.environment["XDG_STATE_HOME"]) / "flatshare"
    assert stat.S_IMODE((folder / "ray.token").stat().st_mode) == 0o600
    token = (folder / "ray.token").read_text().strip()
    for process in processes_of(platform):
        assert token not in " ".join(process.cmdline())
        assert token not in process.environ().values()


def test_sockets_that_are_files_lie_in_folders_of_this_user_alone(platform: Platform) -> None:
    """Ray's own folder, /tmp/ray, can be written by everybody: who puts a socket there is a worker's raylet."""
    paths = {
        Path(connection.laddr)
        for process in processes_of(platform)
        for connection in process.net_connections("unix")
        if isinstance(connection.laddr, str) and connection.laddr.startswith("/")
    }
    assert len(paths) > 3, "the raylet, the object store, HAProxy's two: this test would not see them go"
    closed = [path for path in paths if any(is_closed(folder) for folder in path.parents)]
    assert sorted(paths) == sorted(closed)


def is_closed(folder: Path) -> bool:
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o077
