"""``/tasks`` over ASGI: taken at once, run as the consumer does, asked for by who may."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save

from flatshare.api.app import create_app
from flatshare.api.identity import Identities, OperatorKeys, Role
from flatshare.api.tasks import Tasks
from flatshare.callback_rules import CallbackRules
from flatshare.errors import TooManyTasks
from flatshare.pool.inside import InsideIdentities, answered
from flatshare.tasks.callbacks import CallbackSender
from flatshare.tasks.records import TaskId
from flatshare.tasks.runner import Asked, Reply, TaskRunner
from flatshare.tasks.store import TaskStore
from flatshare_registry import Scope, TenantId
from flatshare_registry.errors import Unavailable
from flatshare_registry.ids import PRODUCTION
from flatshare_registry.keys import new_key

from .conftest import NETWORK, World

PIXELS = np.random.default_rng(1).integers(0, 256, (3, 28, 28), dtype=np.uint8)
LARGEST = 4_000_000
RULES = CallbackRules.parse("hooks.acme.com")
READY = NETWORK.preprocess(PIXELS)
MODEL = "serve_multiplexed_model_id"


class Queue:
    def __init__(self) -> None:
        self.waiting: list[TaskId] = []
        self.full = self.away = False

    def put(self, task: TaskId) -> None:
        if self.away:
            raise Unavailable("the queue is away")
        self.waiting.append(task)

    def check_room(self, tenant: TenantId) -> None:
        if self.full:
            raise TooManyTasks(f"tenant {tenant} has too many")


class Place:
    """A data plane that takes tasks, and a consumer that runs them when told."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.queue = Queue()
        self.store = TaskStore(world.registry.store)
        admin = new_key("ADMIN")
        self.admin = {"authorization": f"Bearer {admin.text}"}
        common: dict[str, Any] = {"replica": "r1", "max_body_bytes": 150_000, "max_rows": 8}
        self.app = create_app(
            world.service, Identities(world.heads, OperatorKeys.of({Role.ADMIN: admin.text}), clock=world.wall_clock),
            tasks=Tasks(self.store, self.queue, RULES, LARGEST), **common,
        )  # fmt: skip
        inside = create_app(
            world.service, InsideIdentities(), replica="r1", max_body_bytes=LARGEST, max_rows=1000
        )

        async def ask(asked: Asked) -> Reply:
            return await answered(inside, asked)

        self.runner = TaskRunner(self.store, world.registry.head, ask, CallbackSender(RULES))

    def key(self, tenant: str, *scopes: Scope) -> dict[str, str]:
        made = self.world.registry.tenancy.create_key(TenantId(tenant), scopes or (Scope.PREDICT,))
        return {"authorization": f"Bearer {made.text}"}

    async def run_all(self) -> None:
        while self.queue.waiting:
            assert await self.runner.run(self.queue.waiting.pop(0)) is None


@pytest.fixture
def place(world: World) -> Place:
    return Place(world)


@pytest.fixture
async def client(place: Place) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=place.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


def npy() -> bytes:
    out = io.BytesIO()
    np.save(out, READY)
    return out.getvalue()


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/predict", "application/json", json.dumps({"image": READY.tolist()}).encode()),
        ("/predict", "application/x-npy", npy()),
        ("/classify", "application/octet-stream", PIXELS.tobytes()),
    ],
)
async def test_a_task_is_answered_as_its_route_would(
    place: Place, client: httpx.AsyncClient, path: str, kind: str, body: bytes
) -> None:
    headers = {**place.key("acme"), MODEL: "acme", "content-type": kind}
    at_once = await client.post(path, content=body, headers=headers)
    taken = await client.post("/tasks", content=body, headers={**headers, "x-task-path": path})
    assert (taken.status_code, taken.json()["state"]) == (202, "queued")
    assert taken.headers["location"] == f"/tasks/{taken.json()['id']}"
    await place.run_all()
    shown = (await client.get(taken.headers["location"], headers=headers)).json()
    assert (shown["state"], shown["result"], shown["version"]) == ("done", at_once.json(), 1)
    assert shown["digest"] == at_once.headers["x-flatshare-digest"]
    result = await client.get(shown["result_url"], headers=headers)
    assert (result.content, result.headers["content-type"]) == (at_once.content, "application/json")


async def test_a_compressed_body_is_kept_in_plain(place: Place, client: httpx.AsyncClient) -> None:
    import gzip

    headers = {
        **place.key("acme"),
        MODEL: "acme",
        "content-type": "application/json",
        "content-encoding": "gzip",
    }
    body = json.dumps({"image": READY.tolist()}).encode()
    taken = await client.post("/tasks", content=gzip.compress(body), headers=headers)
    assert place.store.body(place.store.read(TaskId.parse(taken.json()["id"]))) == body
    await place.run_all()
    shown = (await client.get(taken.headers["location"], headers=headers)).json()
    assert shown["result"] == {"predicted_label": place.world.right("acme", READY)}


async def test_what_the_route_would_refuse_is_a_failed_task_with_its_words(
    place: Place, client: httpx.AsyncClient
) -> None:
    headers = {**place.key("acme"), MODEL: "acme"}
    taken = await client.post("/tasks", json={"image": PIXELS.tolist()}, headers=headers)
    await place.run_all()
    shown = (await client.get(taken.headers["location"], headers=headers)).json()
    assert (shown["state"], shown["code"]) == ("failed", "bad_input")
    assert "/classify" in shown["error"]
    missing = await client.get(f"{taken.headers['location']}/result", headers=headers)
    assert (missing.status_code, missing.json()["error"]["message"].endswith("it is failed")) == (404, True)
    dead = await client.get("/tasks?state=failed", headers=headers)
    assert [one["id"] for one in dead.json()["tasks"]] == [shown["id"]]
    again = await client.post(f"{taken.headers['location']}/replay", headers=headers)
    assert (again.json()["state"], len(place.queue.waiting)) == ("queued", 1)


async def test_nobody_sees_or_changes_another_tenants_tasks(place: Place, client: httpx.AsyncClient) -> None:
    mine, other = place.key("acme"), place.key("globex")
    manage = place.key("acme", Scope.MANAGE)
    taken = await client.post("/tasks", json={"image": READY.tolist()}, headers={**mine, MODEL: "acme"})
    path = taken.headers["location"]
    for method, where in (
        ("GET", path), ("GET", f"{path}/result"), ("DELETE", path), ("POST", f"{path}/replay"),
    ):  # fmt: skip
        assert (await client.request(method, where, headers=other)).status_code == 404
        assert (await client.request(method, where, headers=manage)).status_code == 403
        assert (await client.request(method, where)).status_code == 401
    assert (await client.get("/tasks?tenant=acme", headers=other)).status_code == 404
    assert (await client.get("/tasks", headers=other)).json() == {"tasks": [], "next": None}
    assert (await client.get("/tasks", headers=place.admin)).status_code == 400
    assert len((await client.get("/tasks?tenant=acme", headers=place.admin)).json()["tasks"]) == 1
    assert (await client.get(path, headers=place.admin)).json()["state"] == "queued"
    for wrong in ("x", "acme.x", "acme.01JD8ZQ6E4W7YB1R2N9K3M5T0V", "..%2f..%2fx"):
        assert (await client.get(f"/tasks/{wrong}", headers=mine)).status_code == 404


async def test_what_may_not_be_taken_is_not(place: Place, client: httpx.AsyncClient) -> None:
    headers = {**place.key("acme"), MODEL: "acme"}
    body = {"image": READY.tolist()}
    place.queue.full = True
    full = await client.post("/tasks", json=body, headers=headers)
    assert (full.status_code, full.json()["error"]["code"]) == (429, "over_queued_tasks")
    place.queue.full = False
    for changed, status in (
        ({**headers, MODEL: "globex"}, 404), ({MODEL: "acme"}, 401),
        ({**headers, "x-task-path": "/admin/tenants"}, 400), ({**headers, "x-task-path": "/tasks"}, 400),
    ):  # fmt: skip
        assert (await client.post("/tasks", json=body, headers=changed)).status_code == status
    assert (await client.post("/tasks", content=b"x" * 200_000, headers=headers)).status_code == 413
    assert not list(place.store.open()) and not place.queue.waiting


async def test_a_queue_that_is_away_costs_no_task_and_a_suspended_tenant_sees_none(
    place: Place, client: httpx.AsyncClient
) -> None:
    headers = {**place.key("acme"), MODEL: "acme"}
    place.queue.away = True
    taken = await client.post("/tasks", json={"image": READY.tolist()}, headers=headers)
    assert (taken.status_code, place.queue.waiting) == (202, [])
    assert [str(task) for task, _ in place.store.open()] == [taken.json()["id"]]
    waiting = await client.get(f"{taken.headers['location']}/result", headers=headers)
    assert (waiting.status_code, waiting.headers["retry-after"]) == (202, "1")
    place.world.registry.tenancy.suspend(TenantId("acme"))
    await place.world.heads.refresh(TenantId("acme"))
    for path in (taken.headers["location"], "/tasks", f"{taken.headers['location']}/result"):
        assert (await client.get(path, headers=headers)).status_code == 403
    # The operator still looks into them.
    listed = await client.get("/tasks?tenant=acme", headers=place.admin)
    assert [one["id"] for one in listed.json()["tasks"]] == [taken.json()["id"]]
    dropped = await client.delete(f"{taken.headers['location']}?drop=true", headers=place.admin)
    assert dropped.status_code == 200


async def test_one_idempotency_key_makes_one_task(place: Place, client: httpx.AsyncClient) -> None:
    headers = {**place.key("acme"), MODEL: "acme", "idempotency-key": "once"}
    body = {"image": READY.tolist()}
    first, again = [await client.post("/tasks", json=body, headers=headers) for _ in range(2)]
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    await place.run_all()
    third = await client.post("/tasks", json=body, headers=headers)
    assert (third.json()["id"], third.json()["state"]) == (first.json()["id"], "done")
    other = await client.post("/tasks", json={"image": READY[:1].tolist()}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "already_exists")
    elsewhere = await client.post(
        "/tasks", json=body, headers={**headers, **place.key("globex"), MODEL: "globex"}
    )
    assert elsewhere.json()["id"] != first.json()["id"], "keys are a tenant's own"


async def test_a_version_is_resolved_when_it_runs_or_pinned_when_it_was_taken(
    place: Place, client: httpx.AsyncClient
) -> None:
    headers = {**place.key("acme"), MODEL: "acme"}
    body = {"image": READY.tolist()}
    later = await client.post("/tasks", json=body, headers=headers)
    once = {**headers, "x-task-version": "pinned", "idempotency-key": "once"}
    pinned = await client.post("/tasks", json=body, headers=once)
    assert (later.json()["model"], pinned.json()["model"]) == ("acme", "acme@1")
    registry = place.world.registry
    torch.manual_seed(77)
    weights = save(dict(NETWORK.build().state_dict()))
    registry.register(TenantId("acme"), weights, NETWORK.name, NETWORK.tensors, alias=PRODUCTION)
    await place.world.heads.refresh(TenantId("acme"))
    await place.world.service.resolver._swaps.settled("acme", 5)
    await place.run_all()
    shown = [
        (await client.get(one.headers["location"], headers=headers)).json()["version"]
        for one in (later, pinned)
    ]
    assert shown == [2, 1]


async def test_a_cancelled_task_is_not_run_and_a_dropped_one_is_gone(
    place: Place, client: httpx.AsyncClient
) -> None:
    headers = {**place.key("acme"), MODEL: "acme"}
    one, two = [
        await client.post("/tasks", json={"image": READY.tolist()}, headers=headers) for _ in range(2)
    ]
    assert (await client.delete(one.headers["location"], headers=headers)).json()["state"] == "cancelled"
    assert (await client.delete(f"{two.headers['location']}?drop=true", headers=headers)).status_code == 200
    await place.run_all()
    assert (await client.get(one.headers["location"], headers=headers)).json()["state"] == "cancelled"
    assert (await client.get(two.headers["location"], headers=headers)).status_code == 404


async def test_where_no_tasks_are_taken_it_says_so(world: World, place: Place) -> None:
    transport = httpx.ASGITransport(app=world.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        reply = await client.post("/tasks", json={}, headers={MODEL: "acme"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "no_tasks")


async def test_a_callback_goes_where_it_may_and_is_the_keys_own(
    place: Place, client: httpx.AsyncClient
) -> None:
    headers = {**place.key("acme"), MODEL: "acme"}
    hook = {"x-task-callback": "https://hooks.acme.com/done"}
    body = {"image": READY.tolist()}
    taken = await client.post("/tasks", json=body, headers={**headers, **hook})
    assert taken.json()["callback"] == {"url": hook["x-task-callback"], "state": "owed", "attempts": 0}
    for changed, words in (
        ({**headers, "x-task-callback": "https://169.254.169.254/"}, "not allowed"),
        ({**place.admin, MODEL: "acme", **hook}, "tenant's key"),
    ):
        refused = await client.post("/tasks", json=body, headers=changed)
        assert refused.status_code == 400 and words in refused.json()["error"]["message"]
    once = {**headers, "idempotency-key": "once"}
    assert (await client.post("/tasks", json=body, headers=once)).status_code == 202
    other = await client.post("/tasks", json=body, headers={**once, **hook})
    assert other.status_code == 409, "another callback is another request"


async def test_a_task_may_be_longer_than_a_request_unless_it_is_json(
    place: Place, client: httpx.AsyncClient
) -> None:
    pixels = np.tile(PIXELS, (200, 1, 1))
    headers = {**place.key("acme"), MODEL: "acme", "content-type": "application/octet-stream"}
    assert (await client.post("/classify", content=pixels.tobytes(), headers=headers)).status_code == 413
    taken = await client.post(
        "/tasks", content=pixels.tobytes(), headers={**headers, "x-task-path": "/classify"}
    )
    assert taken.status_code == 202
    await place.run_all()
    shown = (await client.get(taken.headers["location"], headers=headers)).json()
    right = place.world.right("acme", NETWORK.preprocess(pixels))
    assert shown["result"] == {"predicted_label": right} and len(right) == 600
    for content, kind in (
        (b"0" * (LARGEST + 1), "application/octet-stream"),
        (b" " * 200_000, "application/json"),
    ):
        refused = await client.post("/tasks", content=content, headers={**headers, "content-type": kind})
        assert refused.status_code == 413
    assert "application/x-npy" in refused.json()["error"]["message"]


async def test_an_input_that_the_store_holds_is_answered_and_must_stay_as_it_was(
    place: Place, client: httpx.AsyncClient
) -> None:
    tenant = TenantId("acme")
    place.store.inputs.put(tenant, "digits.npy", npy())
    headers = {**place.key("acme"), MODEL: "acme", "content-type": "application/x-npy"}
    named = {**headers, "x-task-input": "digits.npy"}
    taken, later = [await client.post("/tasks", headers=named) for _ in range(2)]
    assert taken.status_code == 202
    task = place.queue.waiting.pop(0)
    assert await place.runner.run(task) is None
    shown = (await client.get(taken.headers["location"], headers=headers)).json()
    assert shown["result"] == {"predicted_label": place.world.right("acme", READY)}
    place.store.inputs.put(tenant, "digits.npy", npy() + b"x")
    await place.run_all()
    changed = (await client.get(later.headers["location"], headers=headers)).json()
    assert (changed["state"], changed["code"]) == ("failed", "invalid_input") and "was changed" in changed[
        "error"
    ]
    for name, words in (("other.npy", "there is no stored input"), ("../globex/x", "the name of a stored input"),
                        ("a/b", "the name of a stored input")):  # fmt: skip
        refused = await client.post("/tasks", headers={**headers, "x-task-input": name})
        assert refused.status_code == 400 and words in refused.json()["error"]["message"]
    both = await client.post("/tasks", content=b"x", headers=named)
    assert both.status_code == 400
    place.store.inputs.put(tenant, "large.npy", b"x" * (LARGEST + 1))
    assert (await client.post("/tasks", headers={**headers, "x-task-input": "large.npy"})).status_code == 400
    theirs = await client.post(
        "/tasks", headers={**place.key("globex"), MODEL: "globex", "x-task-input": "digits.npy"}
    )
    assert theirs.status_code == 400, "another tenant's input is none of theirs"
