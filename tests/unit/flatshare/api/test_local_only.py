"""Authentication off: this machine's own programs and pages may call; no page of another site, by any of its tricks."""

from __future__ import annotations

import httpx
import pytest

from flatshare.api.identity import OperatorKeys, Role
from flatshare.api.local_only import check_local
from flatshare.errors import NotLocal

from .conftest import World

GOOD = [
    {},
    {"host": "localhost"},
    {"host": "localhost:8000"},
    {"host": "LOCALHOST:8000"},
    {"host": "127.0.0.1:8000"},
    {"host": "127.8.9.10"},
    {"host": "[::1]:8000"},
    {"host": "[::1]"},
    {"host": "[0:0:0:0:0:0:0:1]:80"},
    {"host": "localhost:8000", "origin": "http://localhost:8000", "sec-fetch-site": "same-origin"},
    {"host": "127.0.0.1:8000", "origin": "https://127.0.0.1:8000"},
    {"host": "localhost:8000", "sec-fetch-site": "none"},
]
BAD = [
    {"host": "evil.example"},
    {"host": "rebound.evil.example:8000"},
    {"host": "localhost.evil.example"},
    {"host": "localhost@evil.example"},
    {"host": "127.0.0.1.evil.example"},
    {"host": "127.1"},
    {"host": "128.0.0.1"},
    {"host": "0.0.0.0:8000"},
    {"host": "0"},
    {"host": "2130706433"},
    {"host": "192.168.1.7:8000"},
    {"host": "[::2]"},
    {"host": "[::]:8000"},
    {"host": "[::ffff:10.0.0.1]"},
    {"host": "::1"},
    {"host": ""},
    {"host": "localhost:8000", "origin": "https://evil.example"},
    {"host": "localhost:8000", "origin": "null"},
    {"host": "localhost:8000", "origin": ""},
    {"host": "localhost:8000", "origin": "http://localhost:3000"},
    {"host": "localhost:8000", "origin": "http://127.0.0.1:8000"},
    {"host": "localhost:8000", "origin": "chrome-extension://localhost:8000"},
    {"host": "localhost:8000", "origin": "http://[bad"},
    {"origin": "http://localhost:8000"},
    {"host": "localhost:8000", "sec-fetch-site": "cross-site"},
    {"host": "localhost:8000", "sec-fetch-site": "same-site"},
    {"host": "localhost:8000", "sec-fetch-site": ""},
]


@pytest.mark.parametrize("headers", GOOD, ids=str)
def test_this_machines_own(headers: dict[str, str]) -> None:
    check_local(headers)


@pytest.mark.parametrize("headers", BAD, ids=str)
def test_another_sites_page(headers: dict[str, str]) -> None:
    with pytest.raises(NotLocal, match="authentication is off"):
        check_local(headers)


ROUTES = [
    ("POST", "/predict"),
    ("POST", "/"),
    ("POST", "/classify"),
    ("POST", "/predict/stream"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/v2"),
    ("GET", "/v2/health/live"),
    ("GET", "/v2/models/acme"),
    ("POST", "/v2/models/acme/infer"),
    ("GET", "/nope"),
    ("OPTIONS", "/predict"),
]


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}],
    ids=str,
)
async def test_no_route_of_the_data_plane_answers_another_sites_page(
    client: httpx.AsyncClient, route: tuple[str, str], headers: dict[str, str]
) -> None:
    reply = await client.request(*route, headers={"serve_multiplexed_model_id": "acme", **headers})
    document = reply.json()
    if route[1].startswith("/v2"):
        assert (reply.status_code, document["code"]) == (403, "not_local")
    else:
        assert (reply.status_code, document["error"]["code"]) == (403, "not_local")


async def test_with_keys_any_host_is_served(world: World) -> None:
    """A key is in a header of its own, which no page can set for another site: there Host and Origin say nothing."""
    app = world.secured(OperatorKeys.of({Role.ADMIN: world.operators[Role.ADMIN]}))
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    key = {"x-api-key": world.operators[Role.ADMIN]}
    page = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    async with httpx.AsyncClient(transport=transport, base_url="https://models.example") as client:
        assert (await client.get("/v2/models/acme", headers={**page, **key})).status_code == 200
        simple = await client.get(
            "/v2/models/acme", headers={**page, "cookie": f"x-api-key={key['x-api-key']}"}
        )
        asked = await client.request(
            "OPTIONS", "/predict", headers={**page, "access-control-request-headers": "authorization"}
        )
    assert simple.status_code == 401, "what a page can send without asking first is nobody's"
    assert not [name for name in asked.headers if name.startswith("access-control-")], (
        "and asking is not answered"
    )
