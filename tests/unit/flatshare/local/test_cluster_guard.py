"""A cluster without a token: told, and not opened to others. Real gRPC servers stand for Ray's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from flatshare.errors import LocalError
from flatshare.local.cluster_guard import asks_for_token, check_cluster
from flatshare.settings import load_settings
from flatshare_registry.testing.ports import free_ports


class Answers(grpc.GenericRpcHandler):
    def __init__(self, code: grpc.StatusCode | None) -> None:
        self.code = code

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if self.code is not None:
                context.abort(self.code, "no")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def cluster() -> Iterator[Callable[[grpc.StatusCode | None], str]]:
    servers: list[grpc.Server] = []

    def start(code: grpc.StatusCode | None) -> str:
        server = grpc.server(ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((Answers(code),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def test_a_cluster_with_a_token_is_silent(
    cluster: Callable[[grpc.StatusCode | None], str], caplog: pytest.LogCaptureFixture
) -> None:
    address = cluster(grpc.StatusCode.UNAUTHENTICATED)
    assert asks_for_token(address)
    check_cluster(address, load_settings(host="0.0.0.0"))
    assert caplog.records == []


@pytest.mark.parametrize("code", [None, grpc.StatusCode.UNIMPLEMENTED])
def test_one_without_is_told_and_not_opened(
    cluster: Callable[[grpc.StatusCode | None], str],
    caplog: pytest.LogCaptureFixture,
    code: grpc.StatusCode | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    address = cluster(code)
    with caplog.at_level(logging.WARNING):
        check_cluster(address, load_settings(host="127.0.0.1"))
    assert "asks callers for no token" in caplog.text
    with pytest.raises(LocalError, match="RAY_AUTH_MODE=token"):
        check_cluster(address, load_settings(host="0.0.0.0"))
    check_cluster(address, load_settings(host="0.0.0.0", trust_ray_network=True))


def test_nothing_there_is_said_so() -> None:
    (port,) = free_ports(1)
    with pytest.raises(LocalError, match="no Ray cluster answers"):
        asks_for_token(f"127.0.0.1:{port}")
