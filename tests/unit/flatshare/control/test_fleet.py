"""The fleet knows whom it did not reach: Serve's broadcast skips who updates or stops, and fails when nobody runs."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from flatshare.control import erasure as erasure_module
from flatshare.control import fleet as fleet_module
from flatshare.control.erasure import Erasure
from flatshare.control.erasure_record import Signer
from flatshare.control.fleet import Fleet, Told
from flatshare.errors import FleetUnavailable
from flatshare.pool.details import ReplicaState
from flatshare.replica.receipt import EraseReceipt, HostReceipt
from flatshare_registry import Registry, TenantId
from flatshare_registry.errors import Unavailable
from flatshare_registry.heads import decode_head
from flatshare_registry.records import TenantHead
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights

ACME = TenantId("acme")


class DeploymentUnavailableError(Exception):
    """As Serve's of that name: no relative of any class that we know."""


class Pool:
    """Replicas by name and Serve's word; a broadcast reaches those that run, and says nothing of the others."""

    def __init__(self, **states: str) -> None:
        self.states = states
        self.raises_at = "results"
        self.calls: list[str] = []
        self.details_down = False
        self.broken: set[str] = set()

    def read(self) -> list[ReplicaState]:
        if self.details_down:
            raise Unavailable("Serve's controller does not answer")
        return [ReplicaState(name, state, "127.0.0.1") for name, state in self.states.items()]

    def broadcast(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        running = [name for name, state in self.states.items() if state == "RUNNING"]
        if not running and self.raises_at == "call":
            raise DeploymentUnavailableError("no replicas")

        def result(name: str) -> Any:
            if name in self.broken:
                return RuntimeError("actor died")
            return {
                "erase": EraseReceipt(name, f"node-{name}", "cpu", 1, 10, clean=True, at=1.0),
                "erase_host": HostReceipt(name, f"node-{name}", "n", (), (), 0, 1.0),
                "unpin": True, "unload": True,
            }.get(method, name)  # fmt: skip

        class Answers:
            async def results_async(self, *, return_exceptions: bool) -> list[Any]:
                if not running:
                    raise DeploymentUnavailableError("no replicas")
                return [result(name) for name in running]

        return Answers()


@pytest.mark.parametrize("raises_at", ["call", "results"])
async def test_nobody_runs(raises_at: str) -> None:
    pool = Pool(r1="STARTING")
    pool.raises_at = raises_at
    fleet = Fleet(pool, pool.read)
    assert await fleet.refresh("acme") == Told((), ("r1",)), (
        "it follows a change that has landed: never fails"
    )
    assert await fleet.fence("acme") == Told((), ("r1",))
    assert await fleet.erase("acme") == []
    assert (await fleet.view()).snapshots == []
    for asking in (fleet.preload("acme"), fleet.unpin("acme"), fleet.unload("acme"), fleet.erase_host([])):
        with pytest.raises(FleetUnavailable, match="DeploymentUnavailableError"):
            await asking


async def test_who_updates_stops_or_failed_is_missed() -> None:
    pool = Pool(r1="RUNNING", r2="UPDATING", r3="STOPPING", r4="STARTING", r5="RUNNING")
    pool.broken = {"r5"}
    fleet = Fleet(pool, pool.read)
    assert await fleet.refresh("acme") == Told(("r1",), ("r2", "r3", "r4", "r5"))
    assert await fleet.fence("acme") == Told(("r1",), ("r2", "r3", "r4", "r5"))
    pool.broken = set()
    assert await fleet.preload("acme") == Told(("r1", "r5"), ("r2", "r3", "r4"))
    assert await fleet.may_answer() == ["r1", "r2", "r3", "r5"], (
        "a replica that starts has answered nobody yet"
    )


async def test_when_serve_is_not_to_be_asked_who_was_missed_is_not_known() -> None:
    pool = Pool(r1="RUNNING")
    pool.details_down = True
    assert await Fleet(pool, pool.read).refresh("acme") == Told(("r1",), None)


async def test_a_controller_that_hangs_holds_up_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "STATES_TIMEOUT_S", 0.02)
    pool, go_on = Pool(r1="RUNNING"), threading.Event()

    def hangs() -> list[ReplicaState]:
        go_on.wait(30)
        return []

    fleet = Fleet(pool, hangs)
    try:
        assert await fleet.refresh("acme") == Told(("r1",), None)
        with pytest.raises(FleetUnavailable, match="did not answer within"):
            await fleet.may_answer()
    finally:
        go_on.set()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Pool, Erasure, Registry]:
    monkeypatch.setattr(erasure_module, "ASK_AGAIN_S", 0.0)
    registry = Registry(MemoryStore(), actor="me")
    registry.create_tenant(ACME)
    registry.register(ACME, tiny_weights(1.0), "tiny", TINY_SPECS)
    pool = Pool(r1="RUNNING", r2="UPDATING")
    return pool, Erasure(registry, Fleet(pool, pool.read), Signer(tmp_path / "key")), registry


async def asked(pool: Pool, times: int) -> None:
    wanted = pool.calls.count("erase") + times
    while pool.calls.count("erase") < wanted:
        await asyncio.sleep(0)


@pytest.mark.parametrize(("state", "later"), [("UPDATING", "RUNNING"), ("STOPPING", None)])
async def test_an_erasure_waits_for_who_could_not_be_reached(
    world: tuple[Pool, Erasure, Registry], state: str, later: str | None
) -> None:
    pool, erasure, _ = world
    pool.states["r2"] = state
    running = asyncio.create_task(erasure.run(ACME, "me"))
    await asked(pool, 5)
    assert not running.done(), "r2 may still answer"
    if later is None:
        del pool.states["r2"]
    else:
        pool.states["r2"] = later
    record = await running
    assert [one["replica"] for one in record["replicas"]] == (["r1"] if later is None else ["r1", "r2"])


async def test_an_erasure_without_their_receipts_ends_at_its_deadline(
    world: tuple[Pool, Erasure, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, erasure, _ = world
    monkeypatch.setattr(erasure_module, "REPLICAS_TIMEOUT_S", 0.0)
    with pytest.raises(FleetUnavailable, match="no receipt from r2"):
        await erasure.run(ACME, "me")
    assert "erase_host" not in pool.calls


async def test_with_no_replica_at_all_nodes_can_not_be_cleaned(
    world: tuple[Pool, Erasure, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, erasure, registry = world
    pool.states = {}
    monkeypatch.setattr(erasure_module, "HOSTS_TIMEOUT_S", 0.0)
    with pytest.raises(FleetUnavailable, match="run the erasure again"):
        await erasure.run(ACME, "me")
    assert registry.last_entry(ACME).action == "tenant.erased", "the tombstone stands"
    pool.states = {"r3": "RUNNING"}
    assert [one["replica"] for one in (await erasure.run(ACME, "me"))["replicas"]] == ["r3"]


async def test_replicas_are_told_what_a_tenant_is_now() -> None:
    """A revocation must not depend on each replica's own way to the store."""
    registry = Registry(MemoryStore())
    tenant = TenantId("acme")
    registry.create_tenant(tenant)
    key = registry.tenancy.create_key(tenant)
    told: list[tuple[Any, ...]] = []

    class Handle:
        def broadcast(self, method: str, *arguments: Any) -> Any:
            told.append((method, *arguments))
            raise RuntimeError("nobody runs")

    fleet = Fleet(Handle(), lambda: [], registry.any_head)
    registry.tenancy.revoke_key(tenant, key.id)
    await fleet.refresh(tenant)
    registry.delete_tenant(tenant)
    await fleet.refresh(tenant)
    heads = [decode_head(tenant, text.encode()) for _, _, text in told]
    assert [(head.keys, head.state.exists) for head in heads] == [({}, True), ({}, False)]

    def unreachable(tenant: TenantId) -> TenantHead:
        raise Unavailable("down")

    await Fleet(Handle(), lambda: [], unreachable).refresh(tenant)
    assert told[-1] == ("refresh", "acme")
