"""The environment that Ray must start with."""

import os
from pathlib import Path

import pytest

from flatshare.pool.environment import QUIET, prepare, serve_environment


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """``prepare`` writes this process's environment on purpose; give it back afterwards."""
    for name in (*serve_environment("haproxy"), "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "RAY_AUTH_MODE",
                 "RAY_AUTH_TOKEN_PATH", "RAY_worker_niceness", "grpc_proxy", "no_proxy", "NO_PROXY", *QUIET):  # fmt: skip
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)


def test_the_edge_decides_on_direct_ingress() -> None:
    assert prepare("haproxy", environment={})["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "1"
    assert prepare("serve", environment={})["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"


def test_a_cluster_has_a_token_unless_the_operator_says_otherwise() -> None:
    prepare("haproxy", Path("/state/ray.token"), {})
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"]) == ("token", "/state/ray.token")


@pytest.mark.parametrize(
    "given", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": "/mine"}, {"RAY_AUTH_TOKEN": "x"}]
)
def test_the_operators_own_token_wins(given: dict[str, str]) -> None:
    prepare("haproxy", Path("/state/ray.token"), given)
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert os.environ.get("RAY_AUTH_MODE") == (None if "RAY_AUTH_MODE" in given else "token")


def test_calls_within_the_cluster_pass_no_proxy() -> None:
    """Handles are gRPC calls to the node's address, and gRPC asks http_proxy too."""
    chosen = prepare(
        "haproxy", environment={"http_proxy": "http://proxy:3128", "no_proxy": "corp.example, 10.0.0.0/8"}
    )
    assert chosen["grpc_proxy"] == os.environ["grpc_proxy"] == ""
    assert chosen["no_proxy"] == chosen["NO_PROXY"] == "corp.example,10.0.0.0/8,127.0.0.1,localhost,::1"
    assert prepare("haproxy", environment={"grpc_proxy": "http://mesh:1"})["grpc_proxy"] == "http://mesh:1"


def test_metrics_servers_without_a_token_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("haproxy", environment={})
    assert os.environ["RAY_enable_metrics_collection"] == "0"
    monkeypatch.setenv("RAY_enable_metrics_collection", "1")
    prepare("haproxy")
    assert os.environ["RAY_enable_metrics_collection"] == "1"


def test_what_the_operator_set_wins() -> None:
    chosen = prepare("haproxy", environment={"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "60"})
    assert chosen["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == "60"
    assert os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == "60"


def test_replicas_are_told_where_s3_is_but_no_secret() -> None:
    given = {"AWS_ENDPOINT_URL": "http://s3", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_ACCESS_KEY_ID": "me"}
    chosen = prepare("haproxy", environment=given)
    assert chosen["AWS_ENDPOINT_URL"] == "http://s3"
    assert "hunter2" not in chosen.values()
    assert "me" not in chosen.values()
