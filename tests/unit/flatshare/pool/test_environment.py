"""The environment that Ray must start with."""

import os

import pytest

from flatshare.pool.environment import prepare, serve_environment


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """``prepare`` writes this process's environment on purpose; give it back afterwards."""
    for name in (*serve_environment("haproxy"), "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "RAY_AUTH_MODE",
                 "RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness"):  # fmt: skip
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)


def test_the_edge_decides_on_direct_ingress() -> None:
    assert prepare("haproxy", {})["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "1"
    assert prepare("serve", {})["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_what_the_operator_set_wins() -> None:
    chosen = prepare("haproxy", {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "60"})
    assert chosen["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == "60"
    assert os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == "60"


def test_replicas_are_told_where_s3_is_but_no_secret() -> None:
    given = {"AWS_ENDPOINT_URL": "http://s3", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_ACCESS_KEY_ID": "me"}
    chosen = prepare("haproxy", given)
    assert chosen["AWS_ENDPOINT_URL"] == "http://s3"
    assert "hunter2" not in chosen.values()
    assert "me" not in chosen.values()
