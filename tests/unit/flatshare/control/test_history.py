"""The last hour: what came between two looks, whoever came or went."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest

from flatshare.control.history import POINTS, History
from flatshare.replica.snapshot import ReplicaSnapshot
from flatshare.replica.usage import RequestStats
from flatshare.residency.stats import CacheStats
from flatshare.weights.tiers import Tier

from .test_metrics import replica


def counted(name: str, device: int, store: int, slow: int = 0) -> ReplicaSnapshot:
    stats, requests = CacheStats(), RequestStats(busiest=[("acme", 1.5), (f"only-{name}", 1.0)])
    stats.hits[Tier.DEVICE], stats.hits[Tier.STORE] = device, store
    for number in range(device):
        requests.durations[Tier.DEVICE].add(1.0 if number < slow else 0.002)
    return dataclasses.replace(replica(name), stats=stats, requests=requests)


def test_points_are_of_what_came_between_looks() -> None:
    now = [100.0]
    history = History(cast("Any", None), lambda: now[0])
    history.add([counted("r1", 50, 50)])
    assert history.reply.points[0].requests_per_s == 0 and history.reply.points[0].device is None
    now[0] = 110.0
    history.add([counted("r1", 80, 60), counted("r2", 1000, 1000)])  # what a new one had counted is no news
    point = history.reply.points[1]
    assert (point.requests_per_s, point.device) == (4.0, 0.75)
    assert point.p50 == pytest.approx(2, rel=0.1)
    assert [(one.tenant, one.requests_per_s) for one in history.reply.tenants] == [
        ("acme", 3.0), ("only-r1", 1.0), ("only-r2", 1.0),
    ]  # fmt: skip
    history.add([counted("r2", 1000, 1000)])  # r1 is gone
    assert history.reply.points[2].device is None
    for _ in range(POINTS):
        history.add([])
    assert len(history.reply.points) == POINTS and history.reply.tenants == []
