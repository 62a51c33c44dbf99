"""Every route of both planes x every kind of caller: the expected status. A route without a row fails here.

In one process, over ASGI, with authentication on; the replicas behind the control plane are played.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from flatshare.api.openapi import DOCS_PATHS
from flatshare.control.access import BURST, RULES, Access
from flatshare.control.deployment import CONTROL_PREFIX
from flatshare.control.ui import UI_PATHS
from flatshare.edge.configuration import OPEN_PATHS

from .planes import MODEL, Control, Data, data_plane

IMAGE = np.zeros((28, 28), dtype=np.uint8).tobytes()

WHO = (
    "no key", "bad key", "junk", "expired", "revoked", "other tenant's", "predict", "manage", "both",
    "admin", "viewer", "bad admin",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What a route answers to whom; who is not named gets 401.

    Attributes
    ----------
    stranger
        Another tenant's key, whatever its scopes.
    """

    stranger: int
    predict: int
    manage: int
    both: int
    admin: int
    viewer: int
    request: dict[str, Any]

    def expected(self, who: str) -> int:
        return {
            "other tenant's": self.stranger, "predict": self.predict, "manage": self.manage, "both": self.both,
            "admin": self.admin, "viewer": self.viewer,
        }.get(who, 401)  # fmt: skip


def everybody(status: int = 200, **request: Any) -> None:
    """Documented as open: see OPEN."""


PREDICT = {"stranger": 404, "predict": 200, "manage": 403, "both": 200, "admin": 200, "viewer": 403}
DATA_OPEN = {("GET", path) for path in (
    *DOCS_PATHS, "/v2", "/v2/health/live", "/v2/health/ready",
)}  # fmt: skip
_OCTETS = {"content": IMAGE, "headers": {MODEL: "acme", "content-type": "application/octet-stream"}}
_LINES = {
    "content": json.dumps({"image": np.zeros((28, 28)).tolist()}),
    "headers": {MODEL: "acme", "content-type": "application/x-ndjson"},
}
_OCTETS_OF_A_TASK = {"content": IMAGE, "headers": {**_OCTETS["headers"], "x-task-path": "/classify"}}
_PIXELS = {"json": {"image": [[[0] * 28] * 28]}, "headers": {MODEL: "acme"}}
_TENSOR = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 28, 28], "data": [0.0] * 784}]}
DATA: dict[tuple[str, str], Row] = {
    ("POST", "/predict"): Row(**PREDICT, request=_OCTETS),
    ("POST", "/"): Row(**PREDICT, request=_OCTETS),
    ("POST", "/classify"): Row(**PREDICT, request=_OCTETS),
    ("POST", "/predict/stream"): Row(**PREDICT, request=_LINES),
    ("POST", "/tasks"): Row(
        stranger=404, predict=202, manage=403, both=202, admin=202, viewer=403, request=_OCTETS_OF_A_TASK
    ),
    ("GET", "/tasks"): Row(**PREDICT, request={"params": {"tenant": "acme"}}),
    ("GET", "/tasks/{task_id}"): Row(**PREDICT, request={}),
    ("GET", "/tasks/{task_id}/result"): Row(**PREDICT, request={}),
    ("POST", "/tasks/{task_id}/replay"): Row(
        stranger=404, predict=400, manage=403, both=400, admin=400, viewer=403, request={}
    ),
    ("DELETE", "/tasks/{task_id}"): Row(**PREDICT, request={}),
    ("GET", "/pipelines"): Row(200, 200, 200, 200, 200, 200, {}),  # names of what is installed, no tenant's
    ("POST", "/pipelines/{name}"): Row(**PREDICT, request=_PIXELS),
    ("GET", "/v2/models/{ref}"): Row(**PREDICT, request={}),
    ("GET", "/v2/models/{ref}/ready"): Row(**PREDICT, request={}),
    ("POST", "/v2/models/{ref}/infer"): Row(**PREDICT, request={"json": _TENSOR}),
    ("GET", "/v2/models/{ref}/versions/{version}"): Row(**PREDICT, request={}),
    ("GET", "/v2/models/{ref}/versions/{version}/ready"): Row(**PREDICT, request={}),
    ("POST", "/v2/models/{ref}/versions/{version}/infer"): Row(**PREDICT, request={"json": _TENSOR}),
}


def view(**request: Any) -> Row:
    return Row(403, 403, 403, 403, 200, 200, request)


def change(status: int = 200, **request: Any) -> Row:
    return Row(403, 403, 403, 403, status, 403, request)


def view_own(**request: Any) -> Row:
    return Row(404, 403, 200, 200, 200, 200, request)


def change_own(status: int = 200, **request: Any) -> Row:
    return Row(404, 403, status, status, status, 403, request)


CONTROL_OPEN = {("GET", path) for path in (*DOCS_PATHS, *UI_PATHS)}
CONTROL: dict[tuple[str, str], Row] = {
    ("GET", "/tenants"): view(),
    ("POST", "/tenants"): change(201, json={"id": "new"}),
    ("GET", "/tenants/{tenant}"): view_own(),
    ("DELETE", "/tenants/{tenant}"): change(),
    ("POST", "/tenants/{tenant}/erase"): change(),
    ("POST", "/tenants/{tenant}/suspend"): change(),
    ("POST", "/tenants/{tenant}/resume"): change(),
    ("POST", "/tenants/{tenant}/refresh"): change_own(),
    ("GET", "/tenants/{tenant}/audit"): view_own(),
    ("GET", "/tenants/{tenant}/audit/verify"): view_own(),
    ("GET", "/tenants/{tenant}/keys"): view_own(),
    ("POST", "/tenants/{tenant}/keys"): change_own(201, json={}),
    ("POST", "/tenants/{tenant}/keys/{key_id}/rotate"): change_own(201, json={}),
    ("DELETE", "/tenants/{tenant}/keys/{key_id}"): change_own(),
    ("GET", "/tenants/{tenant}/quotas"): view_own(),
    ("PUT", "/tenants/{tenant}/quotas"): change(json={"quotas": {"burst": 5}}),
    ("GET", "/tenants/{tenant}/versions"): view_own(),
    ("GET", "/tenants/{tenant}/versions/{version}"): view_own(),
    ("DELETE", "/tenants/{tenant}/versions/{version}"): change_own(),
    ("PUT", "/tenants/{tenant}/aliases/{alias}"): change_own(json={"version": 2}),
    ("DELETE", "/tenants/{tenant}/aliases/{alias}"): change_own(),
    ("POST", "/tenants/{tenant}/aliases/{alias}/rollback"): change_own(),
    ("GET", "/plans"): view(),
    ("GET", "/replicas"): view(),
    ("GET", "/metrics"): view(),
    ("GET", "/metrics/targets"): view(),
    ("GET", "/history"): view(),
    ("POST", "/replicas/{replica}/drain"): change(404),
    ("POST", "/nodes/{node}/drain"): change(404),
    ("GET", "/settings"): view(),
    ("PATCH", "/settings"): change(json={"settings": {"tenant_share": 0.5}}),
    ("GET", "/tasks"): view(),
    ("GET", "/scaling"): view(),
    ("PUT", "/scaling"): change(json={"min_replicas": 1, "max_replicas": 3}),
    ("POST", "/preload"): change(json={"model": "acme"}),
    ("POST", "/unpin"): change(json={"model": "acme"}),
    ("POST", "/unload"): change(json={"model": "acme"}),
}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals are slow on purpose; test_identity.py measures that."""
    monkeypatch.setattr("flatshare.api.identity.REFUSAL_S", 0.0)


# -- data plane


@pytest.fixture(scope="module")
def data() -> Iterator[Data]:
    with data_plane() as made:
        yield made


def routes(app: Any) -> set[tuple[str, str]]:
    return {(method, route.path) for route in app.routes for method in route.methods if method != "HEAD"}


def test_every_route_of_the_data_plane_has_a_row(data: Data) -> None:
    app = data.app
    assert routes(app._app) == DATA.keys() | DATA_OPEN
    assert {("POST", path) for path in app._routes} <= DATA.keys(), "the hot routes too"


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("route", sorted(DATA), ids=" ".join)
async def test_data_plane(data: Data, route: tuple[str, str], who: str) -> None:
    app, keys = data.app, data.keys
    method, path = route
    row = DATA[route]
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for style in ("bearer", "x-api-key"):
            request = {
                **row.request,
                "headers": {**row.request.get("headers", {}), **keys.headers(who, style)},
            }
            reply = await client.request(
                method, path.format(ref="acme", version=1, name="images", task_id=data.task), **request
            )
            assert reply.status_code == row.expected(who), reply.text
            if reply.status_code == 401:
                assert reply.headers["www-authenticate"] == "Bearer"
            assert "x" * 43 not in reply.text


@pytest.mark.parametrize("route", sorted(DATA_OPEN), ids=" ".join)
async def test_open_routes_of_the_data_plane(data: Data, route: tuple[str, str]) -> None:
    transport = httpx.ASGITransport(app=data.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.request(*route)).status_code == 200


# -- control plane


async def ask(control: Control, route: tuple[str, str], who: str, style: str = "bearer") -> httpx.Response:
    method, path = route
    url = path.format(
        tenant="acme", version=3, alias="canary", key_id=control.keys.victim, replica="none", node="none"
    )
    transport = httpx.ASGITransport(app=control.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        request = CONTROL[route].request if route in CONTROL else {}
        return await client.request(method, url, headers=control.keys.headers(who, style), **request)


@pytest.fixture
def control(tmp_path: Path) -> Control:
    return Control(tmp_path)


def test_every_route_of_the_control_plane_has_a_row(tmp_path: Path) -> None:
    assert routes(Control(tmp_path).app._app) == CONTROL.keys() | CONTROL_OPEN == RULES.keys()


def test_the_edge_knows_what_is_answered_without_a_key() -> None:
    """Else a bad key shown there would count as one that the control plane took."""
    for (_, path), access in RULES.items():
        assert (access is Access.OPEN) == f"{CONTROL_PREFIX}{path}".startswith(OPEN_PATHS)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("route", sorted(CONTROL), ids=" ".join)
async def test_control_plane(control: Control, route: tuple[str, str], who: str) -> None:
    before = control.state()
    expected = CONTROL[route].expected(who)
    reply = await ask(control, route, who)
    assert reply.status_code == expected, reply.text
    if expected >= 400:
        assert control.state() == before, "who may not, changes nothing"
        assert (await ask(control, route, who, "x-api-key")).status_code == expected
    for text in control.keys.texts.values():
        assert text is None or text.split("_", 2)[2] not in reply.text, "no reply has a secret that exists"


@pytest.mark.parametrize("route", sorted(CONTROL_OPEN), ids=" ".join)
async def test_open_routes_of_the_control_plane(control: Control, route: tuple[str, str]) -> None:
    assert (await ask(control, route, "no key")).status_code == 200


async def test_what_is_not_ones_own_looks_like_what_is_not_there(control: Control) -> None:
    """Another tenant's key gets, letter by letter, what an unknown tenant's name gets."""
    transport = httpx.ASGITransport(app=control.app)
    headers = {**control.keys.headers("other tenant's"), "x-request-id": "same"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("", "/keys", "/versions", "/versions/1", "/audit", "/quotas"):
            there = await client.get(f"/tenants/acme{path}", headers=headers)
            nowhere = await client.get(f"/tenants/nope{path}", headers=headers)
            assert (there.status_code, there.text.replace("acme", "nope")) == (404, nowhere.text)


async def test_one_tenants_keys_can_not_occupy_the_control_plane(control: Control) -> None:
    statuses = Counter(
        [(await ask(control, ("GET", "/tenants/{tenant}"), "manage")).status_code for _ in range(BURST + 10)]
    )
    assert statuses[429] >= 5
    assert statuses[200] >= BURST
    assert (await ask(control, ("GET", "/tenants/{tenant}"), "admin")).status_code == 200
    assert (await ask(control, ("GET", "/tenants/{tenant}"), "other tenant's")).status_code == 404


# -- authentication off: this machine's own callers, and no other site's page

PAGES = {
    "another host": {"host": "evil.example"},
    "a name that resolves to here": {"host": "rebound.evil.example:8000"},
    "another origin": {"origin": "https://evil.example"},
    "another port's page": {"origin": "http://localhost:3000", "sec-fetch-site": "same-site"},
    "a form or a link": {"sec-fetch-site": "cross-site"},
}
OWN = [{}, {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}]


TASK = "acme.01JD8ZQ6E4W7YB1R2N9K3M5T0V"


async def ask_page(app: Any, route: tuple[str, str], page: dict[str, str], **request: Any) -> httpx.Response:
    method, path = route
    url = path.format(
        tenant="acme",
        version=1,
        name="images",
        task_id=TASK,
        alias="canary",
        key_id="acme.none",
        ref="acme",
        replica="none",
        node="none",
    )
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        request["headers"] = {**request.get("headers", {}), **page}
        return await client.request(method, url, **request)


@pytest.fixture(scope="module")
def open_data() -> Iterator[Data]:
    with data_plane(auth=False) as made:
        yield made


@pytest.mark.parametrize("route", sorted(DATA.keys() | DATA_OPEN), ids=" ".join)
async def test_without_keys_no_page_of_another_site_reaches_the_data_plane(
    open_data: Data, route: tuple[str, str]
) -> None:
    request, wanted = (DATA[route].request, DATA[route].predict) if route in DATA else ({}, 200)
    if "{task_id}" in route[1]:
        wanted = 404  # there is none of this id
    for page in PAGES.values():
        reply = await ask_page(open_data.app, route, page, **request)
        assert (reply.status_code, "not_local" in reply.text) == (403, True)
    for own in OWN:
        reply = await ask_page(open_data.app, route, own, **request)
        assert reply.status_code == wanted, reply.text


@pytest.mark.parametrize("route", sorted(RULES), ids=" ".join)
async def test_without_keys_no_page_of_another_site_reaches_the_control_plane(
    tmp_path: Path, route: tuple[str, str]
) -> None:
    control = Control(tmp_path, auth=False)
    before = control.state()
    request = CONTROL[route].request if route in CONTROL else {}
    for page in PAGES.values():
        reply = await ask_page(control.app, route, page, **request)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "not_local")
    assert control.state() == before


@pytest.mark.parametrize("own", OWN, ids=str)
async def test_without_keys_this_machines_own_callers_are_the_operator(
    tmp_path: Path, own: dict[str, str]
) -> None:
    control = Control(tmp_path, auth=False)
    assert (await ask_page(control.app, ("POST", "/tenants/{tenant}/suspend"), own)).status_code == 200
    assert (await ask_page(control.app, ("GET", "/docs"), own)).status_code == 200
    nowhere = await ask_page(control.app, ("GET", "/nope"), PAGES["another host"])
    assert nowhere.status_code == 403, "not even what is not there"


async def test_the_docs_fetch_nothing_from_elsewhere(control: Control, data: Data) -> None:
    for app, root in ((data.app, ""), (control.app, "/admin")):
        transport = httpx.ASGITransport(app=app, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            page = await client.get(f"{root}/docs")
            assert "://" not in page.text, "blank in a network without a way out"
            links = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
            assert sorted(links) == [f"{root}/docs/{name}" for name in
                                     ("favicon.png", "swagger-ui-bundle.js", "swagger-ui.css")]  # fmt: skip
            kinds = [
                (await client.get(link)).headers["content-type"].partition(";")[0] for link in sorted(links)
            ]
            assert kinds == ["image/png", "text/javascript", "text/css"]
            assert (await client.get(f"{root}/openapi.json")).json()["openapi"].startswith("3.")
