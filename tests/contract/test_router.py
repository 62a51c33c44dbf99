"""Our router inside Ray's own machinery: placed requests, no memory kept, nobody blocked."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest

from flatshare.pool.router import HomeReplicaRouter


class FakeReplica:
    """As much of a RunningReplica as routers look at."""

    def __init__(self, name: str, models: set[str] | None = None) -> None:
        self.replica_id = ReplicaID(name, DeploymentID("d", "a"))
        self.node_id = "node"
        self.availability_zone = None
        self.multiplexed_model_ids = models or set()
        self.max_ongoing_requests = 10
        self.routing_stats: dict[str, Any] = {}
        self.replica_metadata: dict[str, Any] = {}
        self.queue_len = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queue_len

    def push_proxy_handle(self, handle: object) -> None: ...


def make_router(*replicas: FakeReplica) -> HomeReplicaRouter:
    router = HomeReplicaRouter(
        deployment_id=DeploymentID("d", "a"),
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
    )
    router.initialize_state()
    router.update_replicas(list(replicas))
    return router


def request(model: str, number: int = 0) -> PendingRequest:
    metadata = RequestMetadata(
        request_id=f"{model}-{number}", internal_request_id=f"{model}-{number}", multiplexed_model_id=model
    )
    return PendingRequest(args=[], kwargs={}, metadata=metadata)


async def place(router: HomeReplicaRouter, model: str, number: int = 0) -> str:
    replica = await asyncio.wait_for(router._choose_replica_for_request(request(model, number)), 30)
    return str(replica.replica_id.unique_id)


async def test_a_model_keeps_its_home_and_models_spread() -> None:
    router = make_router(*[FakeReplica(f"r{n}") for n in range(4)])
    homes = {}
    for model in (f"m{n}" for n in range(40)):
        places = {await place(router, model, again) for again in range(3)}
        assert len(places) == 1
        homes[model] = places.pop()
    assert len(set(homes.values())) == 4


async def test_a_warm_replica_wins_over_a_cold_home() -> None:
    replicas = [FakeReplica(f"r{n}") for n in range(3)]
    router = make_router(*replicas)
    home = await place(router, "m")
    warm = next(one for one in replicas if one.replica_id.unique_id != home)
    warm.multiplexed_model_ids = {"m"}
    router.update_replicas(list(replicas))
    assert await place(router, "m", 1) == warm.replica_id.unique_id


async def test_a_full_home_spills_and_blocks_nobody() -> None:
    replicas = [FakeReplica(f"r{n}") for n in range(2)]
    router = make_router(*replicas)
    home = await place(router, "m")
    for one in replicas:
        if one.replica_id.unique_id == home:
            one.queue_len = one.max_ongoing_requests
            router.replica_queue_len_cache.update(one.replica_id, one.queue_len)
    placed = await asyncio.gather(*[place(router, "m", number) for number in range(1, 9)])
    assert set(placed) == {one.replica_id.unique_id for one in replicas} - {home}


async def test_no_finished_request_is_kept() -> None:
    router = make_router(FakeReplica("r0"), FakeReplica("r1"))
    for number in range(300):
        pending = request(f"junk-{number}")
        replica = await asyncio.wait_for(router._choose_replica_for_request(pending), 30)
        router.on_request_routed(pending, replica.replica_id, None)
    assert len(router._pending_requests_by_model_id) == 0


@pytest.mark.parametrize("count", [1, 2])
async def test_requests_without_a_model_are_placed_too(count: int) -> None:
    assert await place(make_router(*[FakeReplica(f"r{n}") for n in range(count)]), "") in ("r0", "r1")
