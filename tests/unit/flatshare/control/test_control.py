"""The control plane over ASGI, on a real registry and a fleet whose replicas the test plays."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from flatshare.api.identity import Identities
from flatshare.control import fleet as fleet_module
from flatshare.control.app import RegistryHeads, create_control_app
from flatshare.control.settings import RunningSettings
from flatshare.device.memory import DeviceMemory
from flatshare.engine.quotas import QuotaKeeper
from flatshare.placement.scaling import Bounds
from flatshare.pool.details import DoorAddress, ReplicaState
from flatshare.pool.embedded_queue import EmbeddedQueue
from flatshare.replica.snapshot import ReplicaSnapshot
from flatshare.replica.usage import RequestStats
from flatshare.residency.stats import CacheStats
from flatshare.settings import Settings
from flatshare.tasks.keeper import TaskKeeper
from flatshare.tasks.records import TaskId
from flatshare.tasks.store import TaskStore
from flatshare.weights.host_tier import HostUsage
from flatshare.weights.tiers import FailedLoad, ResidentInfo, State, SwapInfo, Tier
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.records import Action, Quotas
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.stores.wrapped import StoreCounts
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights


class Answers:
    def __init__(self, results: Any) -> None:
        self.results = results

    async def results_async(self, *, return_exceptions: bool) -> Any:
        assert return_exceptions, "one replica's failure must not hide the others' answers"
        if isinstance(self.results, asyncio.Event):
            await self.results.wait()
        return self.results


class Replicas:
    """Stands where the pool's handle stands."""

    def __init__(self) -> None:
        self.calls: list[tuple[str | bool, ...]] = []
        self.stuck = False
        self.refreshed: list[object] = ["r2", "r1"]
        stats = CacheStats(loads=2, evictions=1)
        stats.hits[Tier.DEVICE], stats.hits[Tier.STORE] = 6, 2
        stats.load_times.add(0.01)
        model = ResidentInfo(
            "acme", 1, "d" * 64, "tiny", 16, 8, Tier.STORE, State.RESIDENT, False, 1, 8, 1, 2.0, 1.0
        )
        self.snapshot = ReplicaSnapshot(
            replica="r1", place=0, node="n", node_id="id", pid=1, device="cpu", slots=3, slots_used=1, started_at=0.0, settings_revision=0,
            budget_bytes=None, held_bytes=16, reserved_bytes=0, device_memory=DeviceMemory(),
            host=HostUsage("/dev/shm/x", 100, 16, 0), loading=[], load_wait_s=0.0, failed=[FailedLoad("acme", 2, "Corrupt", "gone", 9.0)], passes=5, rows=8, pass_s=0.0, lag_s=0.0, feed_age_s=None, store=StoreCounts(),
            swaps=[SwapInfo("acme", "canary", 1, 2, "")],
            ongoing=0, queued=0, refused=0, advertised=["acme"], models=[model], requests=RequestStats(), stats=stats,
        )  # fmt: skip

    def broadcast(self, method: str, *arguments: str | bool) -> Answers:
        self.calls.append((method, *arguments))
        if self.stuck:
            return Answers(asyncio.Event())
        return Answers(
            {
                "snapshot": [self.snapshot],
                "door": [DoorAddress("r2", "::1", 81, 1), DoorAddress("r1", "10.0.0.7", 80, 0)],
                "unload": [True, False],
                "unpin": [True, False],
            }.get(method, self.refreshed)
        )


class World:
    def __init__(self) -> None:
        self.registry = Registry(MemoryStore())
        self.replicas = Replicas()
        states = [ReplicaState("r1", "RUNNING", "127.0.0.1"), ReplicaState("r9", "STARTING", "127.0.0.1")]
        self.app = create_control_app(
            self.registry,
            fleet_module.Fleet(self.replicas, lambda: states),
            Identities(RegistryHeads(self.registry), None),
            RunningSettings(Settings()),
        )

    def register(self, value: float) -> None:
        self.registry.register(TenantId("acme"), tiny_weights(value), "tiny", TINY_SPECS)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=world.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def test_tenants_from_birth_to_death(world: World, client: httpx.AsyncClient) -> None:
    created = await client.post("/tenants", json={"id": "acme"})
    assert (created.status_code, created.json()["production"]) == (201, None)
    assert (await client.post("/tenants", json={"id": "acme"})).status_code == 409
    assert [one["id"] for one in (await client.get("/tenants")).json()] == ["acme"]
    world.register(1)
    shown = (await client.get("/tenants/acme")).json()
    assert (shown["versions"], shown["aliases"]) == ([1], {"production": 1})
    assert (await client.delete("/tenants/acme")).json() == {"refreshed": ["r1", "r2"], "missed": ["r9"]}
    assert (await client.get("/tenants/acme")).status_code == 404
    actions = [one["action"] for one in (await client.get("/tenants/acme/audit")).json()["entries"]]
    assert actions == ["tenant.created", "version.registered", "tenant.deleted"]


async def test_a_promotion_reaches_every_replica_at_once(world: World, client: httpx.AsyncClient) -> None:
    world.registry.create_tenant(TenantId("acme"))
    world.register(1)
    world.register(2)
    moved = await client.put("/tenants/acme/aliases/production", json={"version": 2})
    assert moved.json()["tenant"]["production"] == 2
    assert moved.json()["refreshed"] == ["r1", "r2"]
    assert world.replicas.calls[-1] == ("refresh", "acme")
    back = await client.post("/tenants/acme/aliases/production/rollback")
    assert back.json()["tenant"]["production"] == 1
    assert (await client.delete("/tenants/acme/versions/1")).status_code == 409
    assert (await client.delete("/tenants/acme/versions/2")).status_code == 200
    assert [one["version"] for one in (await client.get("/tenants/acme/versions")).json()] == [1]


async def test_a_replica_that_does_not_answer_does_not_undo_a_change(
    world: World, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "BROADCAST_TIMEOUT_S", 0.02)
    world.registry.create_tenant(TenantId("acme"))
    world.register(1)
    world.register(2)
    world.replicas.stuck = True
    moved = await client.put("/tenants/acme/aliases/production", json={"version": 2})
    assert (moved.status_code, moved.json()["refreshed"], moved.json()["missed"]) == (200, [], ["r1", "r9"])
    assert world.registry.head(TenantId("acme")).aliases == {"production": 2}
    fleet = (await client.get("/replicas")).json()
    assert (fleet["replicas"], [one["replica"] for one in fleet["not_answering"]]) == ([], ["r1", "r9"])
    preload = await client.post("/preload", json={"model": "acme", "pin": True})
    assert (preload.status_code, preload.json()["error"]["code"]) == (503, "fleet_unavailable")
    assert world.registry.pins.refs() == [], "what could not be pinned is not asked of others"


async def test_a_replica_that_dies_while_it_is_told_does_not_undo_a_change(
    world: World, client: httpx.AsyncClient
) -> None:
    world.registry.create_tenant(TenantId("acme"))
    world.register(1)
    world.register(2)
    world.replicas.refreshed = ["r2", RuntimeError("actor died")]
    moved = await client.put("/tenants/acme/aliases/production", json={"version": 2})
    assert (moved.status_code, moved.json()["refreshed"]) == (200, ["r2"])
    assert moved.json()["missed"] == ["r1", "r9"], "who could not be told is named"


async def test_the_fleet_is_shown_with_totals_and_those_that_cannot_answer(client: httpx.AsyncClient) -> None:
    document = (await client.get("/replicas")).json()
    assert document["replicas"][0]["failed"] == [
        {"tenant": "acme", "version": 2, "kind": "Corrupt", "error": "gone", "at": 9.0}
    ]
    (replica,) = document["replicas"]
    assert (replica["replica"], replica["state"], replica["slots_used"], replica["slots"]) == (
        "r1",
        "RUNNING",
        1,
        3,
    )
    assert replica["models"][0]["tenant"] == "acme"
    assert document["not_answering"] == [{"replica": "r9", "state": "STARTING", "node_ip": "127.0.0.1"}]
    totals = document["totals"]
    assert (totals["requests"], totals["hit_rate"]) == (
        8,
        {"device": 0.75, "host": 0.0, "peer": 0.0, "store": 0.25},
    )
    assert totals["load_ms_p50"] == pytest.approx(10, rel=0.1)


async def test_preload_and_unload(world: World, client: httpx.AsyncClient) -> None:
    world.registry.create_tenant(TenantId("acme"))
    world.register(1)
    assert (await client.post("/preload", json={"model": "acme:production"})).status_code == 200
    assert world.replicas.calls[-1] == ("preload", "acme", False)
    assert (await client.post("/preload", json={"model": "acme", "pin": True})).status_code == 200
    assert world.replicas.calls[-1] == ("preload", "acme", True)
    assert [str(ref) for ref in world.registry.pins.refs()] == ["acme"], "replicas that start later know it"
    assert (await client.post("/unpin", json={"model": "acme"})).json() == {"unpinned": 1}
    assert (await client.post("/unload", json={"model": "acme@1"})).json() == {"unloaded": 1}

    assert world.registry.pins.refs() == [], "unpinned and unloaded is pinned for nobody"

    # The tenant's log tells who asked for each, and is still one chain.
    entries = (await client.get("/tenants/acme/audit")).json()["entries"][-4:]
    assert [(one["action"], one["detail"]) for one in entries] == [
        ("fleet.preload", {"model": "acme", "pin": "no"}),
        ("fleet.preload", {"model": "acme", "pin": "yes"}),
        ("fleet.unpin", {"model": "acme"}),
        ("fleet.unload", {"model": "acme@1"}),
    ]
    assert all(one["actor"] and one["request_id"] for one in entries)
    assert (await client.get("/tenants/acme/audit/verify")).json()["whole"]


@pytest.mark.parametrize("path", ["/preload", "/unpin", "/unload"])
async def test_what_can_not_be_noted_is_not_done(world: World, client: httpx.AsyncClient, path: str) -> None:
    reply = await client.post(path, json={"model": "nobody"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    assert world.replicas.calls == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/tenants", {"id": "../up"}, 400, "invalid_model_ref"),
        ("POST", "/tenants", {}, 400, "bad_input"),
        ("POST", "/tenants", {"id": 5}, 400, "bad_input"),
        ("GET", "/tenants/nobody", None, 404, "not_found"),
        ("GET", "/tenants/Bad!", None, 400, "invalid_model_ref"),
        ("GET", "/tenants/acme/versions/x", None, 400, "bad_input"),
        ("PUT", "/tenants/nobody/aliases/production", {"version": 1}, 404, "not_found"),
        ("PUT", "/tenants/acme/aliases/production", {"version": "latest"}, 400, "bad_input"),
        ("PUT", "/tenants/acme/aliases/production", {"version": True}, 400, "bad_input"),
        ("POST", "/preload", {"model": "a b"}, 400, "invalid_model_ref"),
        ("GET", "/nope", None, 404, "no_such_route"),
        ("PATCH", "/tenants", None, 405, "method_not_allowed"),
    ],
)
async def test_errors_are_in_the_one_form(
    client: httpx.AsyncClient, method: str, path: str, body: object, status: int, code: str
) -> None:
    reply = await client.request(method, path, json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


async def test_its_openapi_documents_every_route(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert operation.get("description"), f"{method} {path} has no description"
            assert "404" in operation["responses"]


@pytest.mark.parametrize("path", ["/tenants/", "/tenants/acme/", "/docs/", "/replicas/"])
async def test_a_trailing_slash_is_no_redirect(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.get(path)
    assert (reply.status_code, reply.headers.get("location")) == (404, None)
    assert reply.json()["error"]["code"] == "no_such_route"


async def test_the_hint_names_the_docs_of_this_plane(world: World) -> None:
    transport = httpx.ASGITransport(app=world.app, root_path="/admin")
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for method, path in (("GET", "/admin/nope"), ("PATCH", "/admin/tenants")):
            reply = await client.request(method, path)
            assert "GET /admin/docs" in reply.json()["error"]["message"]


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 4000, "0", "-1", "100000000"])
async def test_numbers_that_are_no_version_are_refused(
    world: World, client: httpx.AsyncClient, number: str
) -> None:
    world.registry.create_tenant(TenantId("acme"))
    world.register(1)
    json_type = {"content-type": "application/json"}
    body = f'{{"version": {number}}}'
    for reply in (
        await client.get(f"/tenants/acme/versions/{number}"),
        await client.delete(f"/tenants/acme/versions/{number}"),
        await client.put("/tenants/acme/aliases/production", content=body, headers=json_type),
    ):
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_input"), reply.text[:200]
        assert len(reply.text) < 600
    for method, path, body in (
        ("POST", "/tenants/acme/keys", f'{{"lifetime_s": {number}}}'),
        ("POST", "/tenants/acme/keys/acme.x/rotate", f'{{"grace_s": {number}}}'),
        ("PUT", "/tenants/acme/quotas", f'{{"quotas": {{"burst": {number}}}}}'),
    ):
        reply = await client.request(method, path, content=body, headers=json_type)
        assert reply.status_code < 500, reply.text[:200]


async def test_the_queue_of_tasks_is_shown_where_there_is_one(
    world: World, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    none = await client.get("/tasks")
    assert (none.status_code, none.json()["error"]["code"]) == (404, "no_tasks")
    queue = EmbeddedQueue(tmp_path / "q.sqlite", 9, 9)
    keeper = TaskKeeper(TaskStore(world.registry.store), queue, Consumers(), Bounds(0, 4), 4, 45.0)
    app = create_control_app(
        world.registry, fleet_module.Fleet(world.replicas, lambda: []),
        Identities(RegistryHeads(world.registry), None), RunningSettings(Settings()), task_keeper=keeper,
    )  # fmt: skip
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        at_first = {"answers": False, "due": None, "under_way": None, "oldest_s": None, "consumers": None}
        bounds = {"min_consumers": 0, "max_consumers": 4}
        assert (await client.get("/tasks")).json() == at_first | bounds
        queue.put(TaskId.new(TenantId("acme")))
        await keeper.tick()
        shown = (await client.get("/tasks")).json()
        assert shown.pop("oldest_s") < 5
        assert shown == {"answers": True, "due": 1, "under_way": 0, "consumers": 2} | bounds


class Consumers:
    """Serve, with two of them."""

    def wanted(self) -> int:
        return 2

    def scale(self, replicas: int) -> None:
        raise AssertionError(replicas)


async def test_quotas_show_what_replicas_hold_a_tenant_to(world: World) -> None:
    """With the very function of the replicas, and the share of a replica's places that nobody wrote down."""
    settings = Settings(
        max_ongoing_requests=10, max_queued_requests=30, tenant_share=0.25,
        plans={"default": Quotas(requests_per_s=9.0), "gold": Quotas(concurrent_requests=33)},
    )  # fmt: skip
    app = create_control_app(
        world.registry,
        fleet_module.Fleet(world.replicas, lambda: []),
        Identities(RegistryHeads(world.registry), None),
        RunningSettings(settings),
    )
    keeper = QuotaKeeper(settings.plans, concurrent_requests=settings.default_quotas.concurrent_requests)
    acme = TenantId("acme")
    world.registry.create_tenant(acme)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for own, plan, wanted in (
            ({}, None, 10), ({"burst": 5}, None, 10), ({}, "gold", 33), ({"concurrent_requests": 2}, "gold", 2),
        ):  # fmt: skip
            answer = await client.put("/tenants/acme/quotas", json={"quotas": own, "plan": plan})
            shown = (await client.get("/tenants/acme/quotas")).json()["effective"]
            assert answer.json()["effective"] == shown
            assert shown["concurrent_requests"] == wanted
            assert Quotas(**shown) == keeper.limits(world.registry.head(acme))


async def test_settings_change_in_place_and_what_can_not_is_refused_whole(
    world: World, client: httpx.AsyncClient
) -> None:
    world.registry.create_tenant(TenantId("acme"))
    new = {"plans": {"gold": {"requests_per_s": 50}}, "tenant_share": "0.5"}
    reply = await client.patch("/settings", json={"settings": new})
    assert (reply.json()["revision"], reply.json()["settings"]["tenant_share"]) == (1, 0.5)
    assert reply.json()["missed"] == ["r9"], "it starts, and looks by itself"
    assert "gold" in (await client.get("/plans")).json()["plans"]
    put = await client.put("/tenants/acme/quotas", json={"quotas": {}, "plan": "gold"})
    assert put.json()["effective"]["requests_per_s"] == 50
    shown = (await client.get("/settings")).json()
    for wrong, message in (
        ({"tenant_share": 0.7, "slots": 3}, "slots can't change in place: flatshare rollout"),
        ({"tenant_share": 0.7, "nothing": 3}, "there is no setting nothing"),
        ({"tenant_share": 2}, "less than or equal to 1"),
        ({"plans": {"gold": {"requests_per_s": -1}}}, "gold.requests_per_s: "),
        ({"plans": "no JSON"}, "plans: "),
    ):
        refused = await client.patch("/settings", json={"settings": wrong})
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
    assert (await client.get("/settings")).json() == shown
    fleet = (await client.get("/replicas")).json()
    assert fleet["settings_revision"] == 1
    assert [one["settings_revision"] for one in fleet["replicas"]] == [0], "the test's replica never follows"


async def test_a_change_that_can_not_be_kept_is_none(world: World) -> None:
    told: list[float] = []

    def keep(change: Callable[[Settings], Settings]) -> tuple[Settings, int]:
        if change(Settings()).tenant_share > 0.5:
            raise Unavailable("the cluster does not answer")
        return change(Settings()), 7

    running = RunningSettings(Settings(), 6, keep, lambda new: told.append(new.tenant_share))
    fleet = fleet_module.Fleet(world.replicas, lambda: [])
    with pytest.raises(Unavailable):
        await running.change({"tenant_share": 0.9}, fleet)
    assert (running.revision, running.settings, told) == (6, Settings(), [])
    await running.change({"tenant_share": 0.4}, fleet)
    assert (running.revision, running.settings.tenant_share, told) == (7, 0.4, [0.4])


async def test_a_rollback_that_is_sent_again_does_not_undo_itself(
    world: World, client: httpx.AsyncClient
) -> None:
    world.registry.create_tenant(TenantId("acme"))
    for value in (1, 2, 3):
        world.register(value)
    path = "/tenants/acme/aliases/production"
    await client.put(path, json={"version": 2})
    for _ in range(2):
        reply = await client.post(f"{path}/rollback", json={"expected": 2})
        assert (reply.status_code, reply.json()["tenant"]["production"]) == (200, 1)
    await client.put(path, json={"version": 3})
    reply = await client.post(f"{path}/rollback", json={"expected": 2})
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "alias_moved")
    assert "retry-after" not in reply.headers, "no waiting helps"
    for body in ({"expected": 0}, {"expected": "x"}, ["x"]):
        assert (await client.post(f"{path}/rollback", json=body)).status_code == 400
    for wanted in (1, 3):  # without it, as ever
        assert (await client.post(f"{path}/rollback")).json()["tenant"]["production"] == wanted


async def test_one_idempotency_key_makes_one_key(world: World, client: httpx.AsyncClient) -> None:
    world.registry.create_tenant(TenantId("acme"))
    headers = {"idempotency-key": "0b7f2c9e-7a60-4b0e-a7f5-6a1f3c1d9f00"}
    made = await client.post("/tenants/acme/keys", json={}, headers=headers)
    again = await client.post("/tenants/acme/keys", json={}, headers=headers)
    assert (made.status_code, again.status_code) == (201, 409)
    assert again.json()["error"]["code"] == "already_exists"
    assert made.json()["id"] in again.json()["error"]["message"]
    assert made.json()["key"].split("_", 2)[2] not in again.text
    rotate = f"/tenants/acme/keys/{made.json()['id']}/rotate"
    rotated = await client.post(rotate, json={}, headers=headers)
    assert (rotated.status_code, (await client.post(rotate, json={}, headers=headers)).status_code) == (
        201,
        409,
    )
    assert len((await client.get("/tenants/acme/keys")).json()) == 2
    for bad in ("", "x" * 256):
        reply = await client.post("/tenants/acme/keys", json={}, headers={"idempotency-key": bad})
        assert reply.status_code == 400


async def test_the_log_is_shown_by_pages(world: World, client: httpx.AsyncClient) -> None:
    world.registry.create_tenant(TenantId("acme"))
    for value in range(1, 130):
        world.registry.note(TenantId("acme"), Action.FLEET_UNLOAD, {"model": f"acme@{value}"})
    first = (await client.get("/tenants/acme/audit")).json()
    assert [one["revision"] for one in first["entries"]] == list(range(31, 131)), "the newest, oldest first"
    second = (await client.get("/tenants/acme/audit", params={"before": first["next"]})).json()
    assert [one["revision"] for one in second["entries"]] == list(range(1, 31))
    assert second["next"] is None
    few = (await client.get("/tenants/acme/audit", params={"limit": 2})).json()
    assert [one["revision"] for one in few["entries"]] == [129, 130]
    for query in (
        {"limit": 0},
        {"limit": 1001},
        {"limit": "9" * 5000},
        {"before": "../x"},
        {"before": "9" * 26},
    ):
        status = (await client.get("/tenants/acme/audit", params=query)).status_code
        assert status == (200 if query == {"before": "9" * 26} else 400)


async def test_a_log_is_verified_once_at_a_time(
    world: World, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is read, in a thread that goes on when the caller leaves."""
    world.registry.create_tenant(TenantId("acme"))
    begun, go_on = threading.Event(), threading.Event()
    verify = world.registry.verify_audit

    def slow(tenant: TenantId) -> list[str]:
        begun.set()
        assert go_on.wait(30)
        return verify(tenant)

    monkeypatch.setattr(world.registry, "verify_audit", slow)
    first = asyncio.create_task(client.get("/tenants/acme/audit/verify"))
    await asyncio.to_thread(begun.wait, 30)
    second = await client.get("/tenants/acme/audit/verify")
    assert (second.status_code, second.json()["error"]["code"]) == (429, "over_concurrent_requests")
    go_on.set()
    assert (await first).json()["whole"]
    assert (await client.get("/tenants/acme/audit/verify")).json()["whole"]


async def test_service_discovery_finds_each_replicas_own_metrics(client: httpx.AsyncClient) -> None:
    found = (await client.get("/metrics/targets")).json()
    path, name = {"__metrics_path__": "/-/metrics"}, "__meta_flatshare_replica"
    assert found == [
        {"targets": ["10.0.0.7:80"], "labels": {**path, name: "r1"}},
        {"targets": ["[::1]:81"], "labels": {**path, name: "r2"}},
    ]
