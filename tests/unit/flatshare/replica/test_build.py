"""``replica/build.py`` and ``holdings.py``: a replica without Ray, and what the control plane may ask of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import torch
from safetensors.torch import save

from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.models.architecture import architecture
from flatshare.replica.build import Replica
from flatshare.replica.identity import ReplicaIdentity
from flatshare.settings import Settings
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import NotFound
from flatshare_registry.ids import PRODUCTION, ModelRef, TenantId
from flatshare_registry.records import Quotas
from flatshare_registry.stores.memory import MemoryStore

NETWORK = architecture("mnist-cnn")
ACME = TenantId("acme")
ROWS = np.zeros((1, 1, 28, 28), np.float32)


def settings() -> Settings:
    return Settings(slots=2, host_dir="off", device="cpu")


@pytest.fixture
def registry() -> Registry:
    registry = Registry(MemoryStore())
    registry.create_tenant(ACME)
    for seed in (1, 2):
        torch.manual_seed(seed)
        registry.register(ACME, save(dict(NETWORK.build().state_dict())), NETWORK.name, NETWORK.tensors)
    return registry


@pytest.fixture
async def replica(registry: Registry) -> AsyncIterator[Replica]:
    replica = Replica.build(settings(), registry.store, identity=ReplicaIdentity("r1", "host", "n1"))
    yield replica
    await replica.close()


async def labels(replica: Replica, ref: str) -> tuple[int, list[int]]:
    with await replica.service.enter(LOCAL_OPERATOR, ModelRef.parse(ref)) as ticket:
        prediction = await replica.service.predict(ticket, lambda network: ROWS)
    return prediction.version.version, prediction.label_list()


async def test_four_lines_make_a_replica_that_answers(registry: Registry) -> None:
    began = time.perf_counter()
    replica = Replica.build(settings(), registry.store)
    took_s = time.perf_counter() - began
    assert (await labels(replica, "acme"))[0] == 1
    await replica.close()
    assert took_s < 0.5, "it reads nothing and loads nothing"


def test_nothing_of_ray_or_fastapi_comes_with_it() -> None:
    code = (
        "import sys; import flatshare.replica.build;"
        "print([name for name in sys.modules if name.split('.')[0] in ('ray', 'fastapi', 'starlette', 'uvicorn')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


async def test_a_snapshot_names_the_place_and_what_is_held(replica: Replica) -> None:
    await replica.preload("acme@2", pin=True)
    found = await replica.snapshot({"acme@2"})
    assert (found.replica, found.node, found.node_id) == ("r1", "host", "n1")
    assert [(one.tenant, one.version, one.pinned) for one in found.models] == [("acme", 2, True)]
    assert found.advertised == ["acme@2"]
    assert replica.held_ids() == {"acme@2"}
    assert await replica.unpin("acme@2")
    assert not await replica.unpin("acme@2")
    assert await replica.unload("acme@2")
    assert replica.held_ids() == set()


async def test_a_refresh_sees_what_was_promoted(replica: Replica, registry: Registry) -> None:
    assert (await labels(replica, "acme"))[0] == 1
    registry.set_alias(ACME, PRODUCTION, 2)
    assert await replica.refresh("acme") == "r1"
    assert (await labels(replica, "acme"))[0] == 2


async def test_what_is_held_is_told_when_it_changes(registry: Registry) -> None:
    told: list[set[str]] = []
    replica = Replica.build(settings(), registry.store, on_change=lambda: told.append(replica.held_ids()))
    await labels(replica, "acme")
    assert told[-1] == {"acme", "acme@1"}
    await replica.unload("acme")
    assert told[-1] == set()
    await replica.close()


async def test_a_fenced_tenant_is_not_answered_and_an_erased_one_is_gone(replica: Replica) -> None:
    await labels(replica, "acme")
    assert replica.fence("acme") == "r1"
    with pytest.raises(NotFound):
        await labels(replica, "acme")
    receipt = await replica.erase("acme")
    assert (receipt.replica, receipt.node_id, receipt.models, receipt.clean) == ("r1", "n1", 1, True)
    assert replica.held_ids() == set()
    host = await replica.erase_host(["a" * 64])
    assert (host.replica, host.removed) == ("r1", ())


async def test_pins_of_the_fleet_are_restored_at_the_start(registry: Registry) -> None:
    registry.pins.add(ModelRef.parse("acme@2"))
    replica = Replica.build(settings(), registry.store)
    replica.start()
    assert replica._restoring is not None
    await replica._restoring
    assert [(one.version, one.pinned) for one in replica.cache.snapshot()] == [(2, True)]
    await replica.close()


async def test_holdings_are_by_the_refs_that_requests_name_latest_first(replica: Replica) -> None:
    await labels(replica, "acme@2")
    await labels(replica, "acme")
    held = replica.holdings.held(3)
    assert (held.replica, held.place, held.slots) == ("r1", 3, 2)
    assert held.models == ["acme", "acme@2"]


async def test_its_load_says_what_is_popular_and_that_requests_came(replica: Replica) -> None:
    replica.meter.look()
    await labels(replica, "acme")
    for _ in range(3):
        await labels(replica, "acme@2")
    load = replica.holdings.load(1)
    assert (load.replica, load.place) == ("r1", 1)
    assert load.also == {"acme": ["acme@1"]}
    assert list(load.popular) == ["acme@2", "acme"] and load.popular["acme@2"] > load.popular["acme"] > 0
    assert load.requests_per_s > 0 and load.idle_s < 5


async def test_warming_loads_what_it_can_and_the_first_is_evicted_last(replica: Replica) -> None:
    assert set(await replica.holdings.warm(["acme", "nobody", "acme@2"], 10)) == {"acme", "acme@2"}
    assert await replica.holdings.warm([], 10) == []
    assert {record.version for record in replica.cache.resident_records()} == {1, 2}


async def test_changed_settings_hold_from_the_next_request_on_and_older_news_changes_nothing(
    replica: Replica,
) -> None:
    before = replica.settings
    plans = {"default": Quotas(concurrent_requests=1)}
    replica.take_settings(Settings(plans=plans, slots=99, tenant_share=0.5), 2)
    assert replica.settings == before.model_copy(update={"plans": plans, "tenant_share": 0.5}), "and no slots"
    replica.take_settings(Settings(), 1)
    assert (await replica.snapshot(set())).settings_revision == 2
    head = await replica.heads.head(TenantId("acme"))
    assert replica.service.quotas.limits(head).concurrent_requests == 1
