"""The data plane over ASGI, with a real service on a store in memory: routes, headers, errors, limits."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flatshare.models.architecture import architecture
from flatshare_registry.ids import TenantId

from .conftest import World

NETWORK = architecture("mnist-cnn")
MODEL = "serve_multiplexed_model_id"


def rows(count: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(count).random((count, 1, 28, 28), dtype=np.float32) * 2 - 1


@pytest.mark.parametrize("path", ["/", "/predict"])
async def test_each_tenant_gets_its_own_models_answer(
    world: World, client: httpx.AsyncClient, path: str
) -> None:
    images = rows(6)
    for tenant in ("acme", "globex", "initech", "acme"):
        reply = await client.post(path, json={"image": images.tolist()}, headers={MODEL: tenant})
        assert reply.status_code == 200
        assert reply.json() == {"predicted_label": world.right(tenant, images)}
        digest = world.registry.list_versions(TenantId(tenant))[0].digest
        assert reply.headers["x-flatshare-tenant"] == tenant
        assert reply.headers["x-flatshare-version"] == "1"
        assert reply.headers["x-flatshare-digest"] == digest
        assert reply.headers["x-flatshare-replica"] == "r1"
        assert reply.headers["x-flatshare-tier"] in ("device", "store")


async def test_the_notebooks_body_is_the_string_of_an_object(world: World, client: httpx.AsyncClient) -> None:
    images = rows()
    reply = await client.post("/", json=json.dumps({"image": images.tolist()}), headers={MODEL: "acme"})
    assert reply.json() == {"predicted_label": world.right("acme", images)}


async def test_tiers_tell_where_the_model_was(client: httpx.AsyncClient) -> None:
    tiers = [
        (await client.post("/predict", json={"image": rows().tolist()}, headers={MODEL: "acme"})).headers[
            "x-flatshare-tier"
        ]
        for _ in range(3)
    ]
    assert tiers == ["store", "device", "device"]


async def test_the_headers_dashes_and_case_do_not_matter(client: httpx.AsyncClient) -> None:
    for name in ("serve-multiplexed-model-id", "Serve_Multiplexed_Model_Id"):
        reply = await client.post("/predict", json={"image": rows().tolist()}, headers={name: "acme"})
        assert reply.status_code == 200


ERRORS = {
    "no model": ({}, {"image": []}, 400, "bad_input"),
    "bad ref": ({MODEL: "../etc"}, {"image": []}, 400, "invalid_model_ref"),
    "unknown tenant": ({MODEL: "nobody"}, {"image": []}, 404, "not_found"),
    "unknown version": ({MODEL: "acme@9"}, {"image": []}, 404, "not_found"),
    "unknown alias": ({MODEL: "acme:canary"}, {"image": []}, 404, "not_found"),
    "no rows": ({MODEL: "acme"}, {"image": []}, 400, "bad_input"),
    "too many rows": ({MODEL: "acme"}, {"image": [[[0] * 28] * 28] * 9}, 413, "too_large"),
}


@pytest.mark.parametrize("name", ERRORS)
async def test_promise_2_errors_are_json_and_load_nothing(
    world: World, client: httpx.AsyncClient, name: str
) -> None:
    headers, document, status, code = ERRORS[name]
    reply = await client.post(
        "/predict", json=document, headers={**headers, "x-request-id": "from-the-caller"}
    )
    assert reply.status_code == status
    error = reply.json()["error"]
    assert (error["code"], error["request_id"]) == (code, "from-the-caller")
    assert world.cache.resident_records() == []
    assert world.admission.ongoing == 0


async def test_two_models_in_one_request_are_refused(client: httpx.AsyncClient) -> None:
    reply = await client.post("/predict", content=b"{}", headers=[(MODEL, "acme"), (MODEL, "globex")])
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_input")


async def test_an_unsafe_request_id_is_replaced(client: httpx.AsyncClient) -> None:
    for given in ("x" * 65, "a b", "<script>", ""):
        reply = await client.post("/predict", content=b"", headers={"x-request-id": given})
        assert reply.json()["error"]["request_id"] != given


async def test_bodies_are_capped_whatever_they_claim(client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 10_000

    for content, headers in ((b"x" * 150_001, {}), (chunks(), {}), (b"", {"content-length": "999999999999"})):
        reply = await client.post("/predict", content=content, headers={MODEL: "acme", **headers})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")
    reply = await client.post("/predict", content=b"", headers={MODEL: "acme", "content-length": "-5"})
    assert reply.status_code == 400


async def test_promise_11_a_store_that_is_down_is_503_and_says_nothing_of_itself(
    world: World, client: httpx.AsyncClient
) -> None:
    document = {"image": rows().tolist()}
    assert (await client.post("/predict", json=document, headers={MODEL: "acme"})).status_code == 200
    world.down = True
    cold = await client.post("/predict", json=document, headers={MODEL: "globex"})
    assert (cold.status_code, cold.headers["retry-after"]) == (503, "1")
    assert "secret" not in cold.text
    warm = await client.post("/predict", json=document, headers={MODEL: "acme"})
    assert (warm.status_code, warm.headers["x-flatshare-tier"]) == (200, "device")


async def test_overload_is_503_with_retry_after(world: World, client: httpx.AsyncClient) -> None:
    world.admission.max_ongoing = world.admission.max_queued = 0
    reply = await client.post("/predict", json={"image": rows().tolist()}, headers={MODEL: "acme"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
    assert reply.headers["retry-after"] == "1"


async def test_a_bug_is_500_without_its_inside(
    world: World, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*arguments: object) -> None:
        raise ZeroDivisionError("password=hunter2")

    monkeypatch.setattr(world.cache, "try_lease", bug)
    for path in ("/predict", "/classify"):
        reply = await client.post(
            path, content=b"\0" * 784, headers={MODEL: "acme", "content-type": "application/octet-stream"}
        )
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        assert "hunter2" not in reply.text
        assert "Traceback" not in reply.text


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


async def test_classify_takes_png_several_png_and_raw_pixels(world: World, client: httpx.AsyncClient) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    right = world.right("acme", NETWORK.preprocess(pixels))
    one = await client.post(
        "/classify", content=png(pixels[0]), headers={MODEL: "acme", "content-type": "image/png"}
    )
    assert one.json() == {"predicted_label": right[:1]}
    several = await client.post(
        "/classify",
        files=[("image", ("d.png", png(each), "image/png")) for each in pixels],
        headers={MODEL: "acme"},
    )
    assert several.json() == {"predicted_label": right}
    raw = await client.post(
        "/classify",
        content=pixels.tobytes(),
        headers={MODEL: "acme", "content-type": "application/octet-stream"},
    )
    assert raw.json() == {"predicted_label": right}


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("text/plain", b"x"),
        ("image/png", b"not a png"),
        ("multipart/form-data", b"no boundary"),
        ("multipart/form-data; boundary=x", b"--y"),
        ("application/octet-stream", b"short"),
    ],
)
async def test_classify_refuses_what_it_cannot_read(
    client: httpx.AsyncClient, kind: str, content: bytes
) -> None:
    reply = await client.post("/classify", content=content, headers={MODEL: "acme", "content-type": kind})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_input")


async def test_unknown_routes_and_methods_are_json_too(client: httpx.AsyncClient) -> None:
    for method, path, status in (("GET", "/nope", 404), ("GET", "/predict", 405), ("DELETE", "/", 405)):
        reply = await client.request(method, path)
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"code", "message", "request_id"}


async def test_the_openapi_shows_bodies_replies_errors_and_the_header(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert (await client.get("/docs")).status_code == 200
    for path in ("/", "/predict", "/classify"):
        post = document["paths"][path]["post"]
        assert post["parameters"][0]["name"] == MODEL
        assert set(post["responses"]) >= {"200", "400", "404", "413", "503"}
        assert "x-flatshare-digest" in post["responses"]["200"]["headers"]
    schema = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/PredictRequest"}
    assert document["components"]["schemas"]["PredictRequest"]["examples"][0]["image"]
    assert document["components"]["schemas"]["PredictReply"]["examples"] == [{"predicted_label": [7]}]


@pytest.mark.parametrize(
    "path", ["/predict/", "/classify/", "/predict/stream/", "/docs/", "/v2/health/live/"]
)
async def test_a_trailing_slash_is_no_redirect(client: httpx.AsyncClient, path: str) -> None:
    """A redirect says http:// behind TLS, and a client that follows it sends its key in clear."""
    for method in ("GET", "POST"):
        reply = await client.request(method, path)
        assert (reply.status_code, reply.headers.get("location")) == (404, None)


async def test_a_missing_model_header_is_named_with_dashes_too(client: httpx.AsyncClient) -> None:
    """nginx drops headers with underscores; who sits behind one must learn of the other form."""
    reply = await client.post("/predict", json={"image": []})
    assert reply.status_code == 400
    assert MODEL in reply.json()["error"]["message"]
    assert "serve-multiplexed-model-id" in reply.json()["error"]["message"]
