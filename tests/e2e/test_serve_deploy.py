"""`serve deploy` of what `flatshare config` prints, on a cluster that `ray start` made; then an edge, and a request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .conftest import random_rows
from .ray_cluster import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.end()


def test_what_config_prints_is_served_and_served_anew_with_other_settings(cluster: Cluster) -> None:
    cluster.deploy(FLATSHARE_SLOTS="3")
    before = cluster.replicas()
    assert len(before) == 3, "two of the pool, and the control plane"
    platform, rows = cluster.platform, random_rows(2)
    with cluster.edge():
        assert platform.http.get(f"{platform.url}/tenants").status_code in (401, 404)
        assert httpx.get(f"{platform.url}/admin/tenants").status_code == 401, "keys came from the file"
        platform.add("acme", 7)
        answer = platform.predict("acme", rows)
        assert answer.json() == {"predicted_label": platform.right("acme@1", rows)}
        cluster.deploy(FLATSHARE_SLOTS="4")
        deadline = time.monotonic() + 60
        while {one["slots"] for one in platform.fleet()["replicas"]} != {4} or cluster.replicas() & before:
            assert time.monotonic() < deadline, "every process was replaced"
            time.sleep(0.5)  # their end shows only by looking
        assert platform.predict("acme", rows).json() == answer.json()
