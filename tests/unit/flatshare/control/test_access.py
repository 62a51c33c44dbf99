"""Who may do what on the control plane, with authentication on; route by route: tests/contract/test_access_matrix.py."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from flatshare.api.identity import Identities
from flatshare.control import access
from flatshare.control.access import BURST, MAX_UNDER_WAY, Gate
from flatshare.control.app import RegistryHeads
from flatshare.errors import ServeError
from flatshare_registry import Scope, TenantId
from flatshare_registry.identity import STORE_HEADER

from ....contract.planes import Control

LOOK, LOOK_OWN = ("GET", "/tenants", None), ("GET", "/tenants/acme", None)
CHANGE, CHANGE_OWN = (
    ("POST", "/tenants", {"id": "new"}),
    ("PUT", "/tenants/acme/aliases/canary", {"version": 3}),
)


@pytest.fixture
def control(tmp_path: Path) -> Control:
    return Control(tmp_path)


async def status(control: Control, who: str, what: tuple[str, str, object]) -> int:
    method, path, body = what
    transport = httpx.ASGITransport(app=control.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return (await client.request(method, path, headers=control.keys.headers(who), json=body)).status_code


@pytest.mark.parametrize(
    ("who", "look", "look_own", "change", "change_own"),
    [
        ("admin", 200, 200, 201, 200),
        ("viewer", 200, 200, 403, 403),
        ("manage", 403, 200, 403, 200),
        ("both", 403, 200, 403, 200),
        ("predict", 403, 403, 403, 403),
        ("other tenant's", 403, 404, 403, 404),
        ("no key", 401, 401, 401, 401),
        ("bad key", 401, 401, 401, 401),
        ("bad admin", 401, 401, 401, 401),
    ],
)
async def test_each_role_may_what_it_is_for(
    control: Control, who: str, look: int, look_own: int, change: int, change_own: int
) -> None:
    for what, wanted in ((LOOK, look), (LOOK_OWN, look_own), (CHANGE, change), (CHANGE_OWN, change_own)):
        before = control.state()
        assert await status(control, who, what) == wanted, what
        if wanted >= 400:
            assert control.state() == before


@pytest.mark.parametrize("who", ["admin", "viewer"])
async def test_operators_have_no_limit_that_one_could_use_up_for_the_others(
    control: Control, who: str
) -> None:
    statuses = Counter([await status(control, who, LOOK_OWN) for _ in range(3 * BURST)])
    assert statuses == {200: 3 * BURST}


async def test_a_tenants_requests_have_a_rate_and_each_tenant_its_own(control: Control) -> None:
    statuses = Counter([await status(control, "manage", LOOK_OWN) for _ in range(2 * BURST)])
    assert statuses[200] >= BURST and statuses[429] > 0 and set(statuses) == {200, 429}
    assert await status(control, "both", LOOK_OWN) == 429, "another key of the tenant is no other tenant"
    assert await status(control, "other tenant's", ("GET", "/tenants/globex", None)) == 200


async def test_requests_that_ended_are_under_way_no_more(control: Control) -> None:
    for _ in range(MAX_UNDER_WAY + 1):
        assert await status(control, "manage", ("PUT", "/tenants/acme/aliases/canary", {"version": 99})) in (
            404,
            422,
        )


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/tenants", "/tenants/acme", "/nowhere"])
@pytest.mark.parametrize("who", ["no key", "admin"])
async def test_a_head_is_answered_as_a_get_or_refused_and_never_an_internal_error(
    control: Control, path: str, who: str
) -> None:
    get, head = (
        await status(control, who, ("GET", path, None)),
        await status(control, who, ("HEAD", path, None)),
    )
    assert head in (get, 405)
    if path == "/openapi.json":
        assert head == 200


async def test_one_tenant_has_so_many_requests_under_way_and_no_more(control: Control) -> None:
    """They are held inside the application: each with its place, until it is answered."""
    app, go = FastAPI(openapi_url=None), asyncio.Event()
    inside: list[str] = []

    @app.get("/tenants/{tenant}")
    async def look(tenant: str) -> str:
        inside.append(tenant)
        await go.wait()
        return tenant

    identities = Identities(RegistryHeads(control.registry), control.keys.operators)
    transport = httpx.ASGITransport(app=Gate(app, identities, lambda: "a" * 32))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        def ask(who: str, tenant: str = "acme") -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(client.get(f"/tenants/{tenant}", headers=control.keys.headers(who)))

        held = [ask("manage" if number % 2 else "both") for number in range(MAX_UNDER_WAY)]
        while len(inside) < MAX_UNDER_WAY:
            await asyncio.sleep(0.001)
        refused = await ask("manage")
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            429, f"tenant acme has {MAX_UNDER_WAY} requests of this kind under way",
        )  # fmt: skip
        others = [ask("other tenant's", "globex"), *(ask("admin") for _ in range(2 * MAX_UNDER_WAY))]
        while len(inside) < 3 * MAX_UNDER_WAY + 1:
            await asyncio.sleep(0.001)
        go.set()
        answers = await asyncio.gather(*held, *others)
        assert {one.status_code for one in answers} == {200}
        for _ in range(MAX_UNDER_WAY + 1):
            assert (await ask("manage")).status_code == 200, "their places are free again"


def test_an_application_with_a_route_that_no_rule_names_is_not_begun(control: Control) -> None:
    app = FastAPI(openapi_url=None)
    app.get("/tenants")(lambda: "named")
    identities = Identities(RegistryHeads(control.registry), control.keys.operators)
    Gate(app, identities, lambda: "a" * 32)
    app.post("/tenants/{tenant}/everything")(lambda tenant: tenant)
    with pytest.raises(ServeError, match=r"without a rule of access.*/tenants/\{tenant\}/everything"):
        Gate(app, identities, lambda: "a" * 32)


async def test_a_compressed_body_is_refused_by_its_coding_and_changes_nothing(control: Control) -> None:
    before = control.state()
    headers = {**control.keys.headers("admin"), "content-encoding": "gzip"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=control.app), base_url="http://test"
    ) as client:
        reply = await client.post("/tenants", headers=headers, json={"id": "new"})
    assert reply.status_code == 415 and "Content-Encoding 'gzip'" in reply.json()["error"]["message"]
    assert control.state() == before


async def test_a_refusal_says_what_the_key_is_for(control: Control) -> None:
    transport = httpx.ASGITransport(app=control.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for who, method, path, message in (
            ("viewer", "POST", "/tenants/acme/refresh", "a viewer's key may look, and change nothing"),
            ("viewer", "POST", "/tenants/acme/suspend", "a viewer's key may look, and change nothing"),
            ("both", "POST", "/tenants/acme/suspend", "this is for the platform's operators"),
            ("both", "GET", "/replicas", "this is for the platform's operators"),
        ):
            reply = await client.request(method, path, headers=control.keys.headers(who))
            assert (reply.status_code, reply.json()["error"]["message"]) == (403, message)


async def test_who_was_given_a_used_id_reads_the_log_from_its_own_beginning(control: Control) -> None:
    """Key labels of the customer who had the id before are that customer's."""
    acme = TenantId("acme")
    control.registry.delete_tenant(acme)
    control.clock.advance(1)
    control.registry.create_tenant(acme)
    own = control.registry.tenancy.create_key(acme, [Scope.MANAGE], label="mine").text
    transport = httpx.ASGITransport(app=control.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        async def actions(headers: dict[str, str]) -> list[str]:
            reply = await client.get("/tenants/acme/audit", headers=headers)
            return [entry["action"] for entry in reply.json()["entries"]]

        assert await actions({"x-api-key": own}) == ["tenant.created", "key.created"]
        assert len(await actions(control.keys.headers("admin"))) > 5


async def test_the_document_waits_for_no_store(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up` asks for it until it answers: a platform starts, and serves what its nodes have, while its store is down."""
    monkeypatch.setattr(access, "STORE_PATIENCE_S", 0.05)
    go, looks = threading.Event(), []

    def look() -> str:
        looks.append(1)
        assert go.wait(30)
        return "a" * 32

    app = FastAPI(openapi_url="/openapi.json", docs_url=None, redoc_url=None)
    transport = httpx.ASGITransport(app=Gate(app, Identities(RegistryHeads(control.registry), None), look))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for _ in range(5):
            reply = await client.get("/openapi.json")
            assert reply.status_code == 200
            assert STORE_HEADER not in reply.headers
        assert len(looks) == 1, "a store that hangs must not take a thread for each request"
        go.set()
        while STORE_HEADER not in (await client.get("/openapi.json")).headers:
            pass
