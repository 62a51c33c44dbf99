"""Open Inference Protocol v2: JSON and binary tensors, metadata, health, errors in its own form."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from flatshare.api.identity import OperatorKeys, Role

from .conftest import World
from .test_tensors import floats, pixels


def tensor(array: Any, datatype: str = "FP32", **more: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": datatype, "shape": list(array.shape), **more}


async def infer(
    client: httpx.AsyncClient, document: dict[str, Any], binary: bytes = b"", model: str = "acme"
) -> httpx.Response:
    text = orjson.dumps(document)
    headers = {"inference-header-content-length": str(len(text))} if binary else {}
    return await client.post(f"/v2/models/{model}/infer", content=text + binary, headers=headers)


@pytest.mark.parametrize("flat", [False, True])
async def test_json_tensors(world: World, client: httpx.AsyncClient, flat: bool) -> None:
    rows = floats(3)
    data = rows.ravel().tolist() if flat else rows.tolist()
    reply = await infer(client, {"id": "42", "inputs": [tensor(rows, data=data)]})
    document = reply.json()
    assert (document["model_name"], document["model_version"], document["id"]) == ("acme", "1", "42")
    logits, labels = document["outputs"]
    assert (logits["datatype"], logits["shape"], labels["datatype"], labels["shape"]) == (
        "FP32",
        [3, 10],
        "INT64",
        [3],
    )
    np.testing.assert_allclose(np.reshape(logits["data"], (3, 10)), world.logits("acme", rows), atol=1e-5)
    assert labels["data"] == world.right("acme", rows)
    assert reply.headers["x-flatshare-tenant"] == "acme"


@pytest.mark.parametrize("datatype", ["FP32", "UINT8"])
async def test_binary_tensors_in_and_out(world: World, client: httpx.AsyncClient, datatype: str) -> None:
    rows, raw = floats(4), pixels(4)
    array = rows if datatype == "FP32" else raw
    binary = array.tobytes()
    document = {
        "inputs": [tensor(array, datatype, parameters={"binary_data_size": len(binary)})],
        "outputs": [{"name": "predicted_label"}, {"name": "logits", "parameters": {"binary_data": True}}],
    }
    reply = await infer(client, document, binary)
    assert reply.status_code == 200, reply.text
    end = int(reply.headers["inference-header-content-length"])
    answer = orjson.loads(reply.content[:end])
    assert answer["outputs"][0]["data"] == world.right("acme", rows)
    assert answer["outputs"][1]["parameters"] == {"binary_data_size": 160}
    found = np.frombuffer(reply.content[end:], dtype="<f4").reshape(4, 10)
    np.testing.assert_allclose(found, world.logits("acme", rows), atol=1e-5)


async def test_uint8_in_json_is_pixels(world: World, client: httpx.AsyncClient) -> None:
    raw = pixels(2)
    reply = await infer(client, {"inputs": [tensor(raw, "UINT8", data=raw.tolist())]})
    assert reply.json()["outputs"][1]["data"] == world.right("acme", floats(2))


async def test_metadata_and_health(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    assert (await client.get("/v2/health/ready")).json() == {"ready": True}
    assert (await client.get("/v2")).json()["extensions"] == ["binary_tensor_data"]
    document = (await client.get("/v2/models/acme%401")).json()
    assert (document["name"], document["platform"], document["versions"]) == ("acme@1", "mnist-cnn", ["1"])
    assert document["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 28, 28]}]
    assert (await client.get("/v2/models/acme/ready")).json() == {"name": "acme", "ready": True}
    assert (await client.get("/v2/models/acme/versions/1/ready")).json() == {"name": "acme@1", "ready": True}
    assert (await client.get("/v2/models/acme/versions/2/ready")).status_code == 404
    assert (await client.get("/v2/models/nobody/ready")).status_code == 404


ROWS = floats(1)
GOOD = tensor(ROWS, data=ROWS.tolist())


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({}, '"inputs" must be a list of one'),
        ({"inputs": [GOOD, GOOD]}, "list of one"),
        ({"inputs": [GOOD | {"name": "x"}]}, 'must be named "image"'),
        ({"inputs": [GOOD | {"datatype": "BYTES"}]}, "FP32 or UINT8"),
        ({"inputs": [GOOD | {"shape": "1"}]}, "whole numbers"),
        ({"inputs": [GOOD | {"shape": [1, -1]}]}, "whole numbers"),
        ({"inputs": [GOOD | {"data": [1.0, 2.0]}]}, "its shape takes"),
        ({"inputs": [GOOD | {"data": [1.0, 2.0], "shape": [2]}]}, "not a whole number of rows"),
        ({"inputs": [GOOD | {"data": None}]}, "it must be"),
        ({"inputs": [GOOD | {"data": "x" * 99}]}, "it must be"),
        ({"inputs": [GOOD | {"datatype": "UINT8", "data": [-1.0] * 784}]}, "0 to 255"),
        ({"inputs": [GOOD | {"parameters": {"binary_data_size": 7}}]}, "binary_data_size"),
        ({"inputs": [GOOD], "outputs": [{"name": "probabilities"}]}, "an output must be"),
        ({"inputs": [GOOD], "outputs": ["logits"]}, "list of objects"),
    ],
)
async def test_wrong_requests_are_refused_in_the_protocols_form(
    client: httpx.AsyncClient, document: dict[str, Any], says: str
) -> None:
    reply = await infer(client, document)
    assert (reply.status_code, reply.json()["code"]) == (400, "bad_input")
    assert says in reply.json()["error"]


async def test_other_refusals(client: httpx.AsyncClient) -> None:
    assert (await infer(client, {"inputs": [GOOD]}, model="nobody")).status_code == 404
    assert (await infer(client, {"inputs": [GOOD]}, model="Not%20A%20Ref")).status_code == 400
    assert (await client.post("/v2/models/acme/versions/x/infer", content=b"{}")).status_code == 400
    for length in ("-1", "999999", "x", "0" * 4400 + "1000000", "9" * 4400, b"\xb2", "+1", ""):
        reply = await client.post(
            "/v2/models/acme/infer", content=b"{}", headers={"inference-header-content-length": length}
        )
        assert reply.status_code == 400
    gzip = await client.post("/v2/models/acme/infer", content=b"{}", headers={"content-encoding": "gzip"})
    assert gzip.status_code == 400
    huge = await client.post("/v2/models/acme/infer", content=bytes(150_001))
    assert (huge.status_code, huge.json()["code"]) == (413, "too_large")


async def test_a_length_with_many_zeros_is_still_that_length(world: World, client: httpx.AsyncClient) -> None:
    text = orjson.dumps({"inputs": [GOOD]})
    for zeros in (10, 4400):
        reply = await client.post(
            "/v2/models/acme/infer",
            content=text,
            headers={"inference-header-content-length": "0" * zeros + str(len(text))},
        )
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("number", ["9" * 5000, "0" * 5000 + "1", "-" + "1" * 5000, "1" * 4000])
async def test_versions_of_thousands_of_digits_are_refused(client: httpx.AsyncClient, number: str) -> None:
    for path in (f"/v2/models/acme/versions/{number}", f"/v2/models/acme@{number}"):
        for reply in (
            await client.get(path),
            await client.get(f"{path}/ready"),
            await client.post(f"{path}/infer", content=b"{}"),
        ):
            assert (reply.status_code, reply.json()["code"]) == (400, "invalid_model_ref")
            assert len(reply.text) < 600, "and not repeated"


async def test_a_shape_of_thousands_of_digits_is_refused(client: httpx.AsyncClient) -> None:
    document = orjson.dumps({"inputs": [GOOD | {"shape": [1]}]}).replace(b"[1]", b"[" + b"1" * 5000 + b"]")
    reply = await client.post("/v2/models/acme/infer", content=document)
    assert (reply.status_code, reply.json()["code"]) == (400, "bad_input")


@pytest.mark.parametrize(
    ("document", "name"),
    [
        (
            {"inputs": [GOOD], "outputs": [{"name": "logits", "parameters": {"classification": 3}}]},
            "classification",
        ),
        ({"inputs": [GOOD], "parameters": {"classification": 3}}, "classification"),
        (
            {
                "inputs": [
                    GOOD | {"parameters": {"shared_memory_region": "a", "shared_memory_byte_size": 3136}}
                ]
            },
            "shared_memory_region",
        ),
        (
            {"inputs": [GOOD], "outputs": [{"name": "logits", "parameters": {"shared_memory_region": "a"}}]},
            "shared_memory_region",
        ),
        ({"inputs": [GOOD], "parameters": {"sequence_id": 7, "sequence_start": True}}, "sequence_id"),
    ],
)
async def test_an_extension_that_is_not_served_is_refused_by_name(
    client: httpx.AsyncClient, document: dict[str, Any], name: str
) -> None:
    """Else the answer is another tensor than was asked for, with 200."""
    reply = await infer(client, document)
    assert (reply.status_code, reply.json()["code"]) == (400, "bad_input")
    assert name in reply.json()["error"]


async def test_extensions_that_are_off_are_not_asked_for(client: httpx.AsyncClient) -> None:
    """Some clients always send them, with the value that means nothing."""
    document = {
        "inputs": [GOOD],
        "parameters": {"sequence_id": 0, "sequence_start": False, "priority": 1},
        "outputs": [{"name": "logits", "parameters": {"classification": 0, "binary_data": False}}],
    }
    assert (await infer(client, document)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/acme/config", 404),
        ("GET", "/v2/models/acme/stats", 404),
        ("POST", "/v2/repository/index", 404),
        ("POST", "/v2/repository/models/acme/load", 404),
        ("GET", "/v2/systemsharedmemory/status", 404),
        ("GET", "/v2/nope/", 404),
        ("GET", "/v2/", 404),
        ("DELETE", "/v2", 405),
        ("GET", "/v2/models/acme/infer", 405),
        ("GET", "/v2/models/Not%20A%20Ref", 400),
        ("GET", "/v2/models/nobody", 404),
    ],
)
async def test_every_error_below_v2_is_a_string_as_the_protocols_clients_want(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    """tritonclient does ``str(error)`` of what it finds there, and fails on an object with TypeError."""
    reply = await client.request(method, path)
    assert reply.status_code == status
    document = reply.json()
    assert set(document) == {"error", "code", "request_id"} and isinstance(document["error"], str)


async def test_errors_of_a_key_are_in_the_protocols_form_too(world: World) -> None:
    app = world.secured(OperatorKeys.of({Role.ADMIN: world.operators[Role.ADMIN]}))
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        reply = await client.get("/v2/models/acme/ready")
    assert (reply.status_code, reply.json()["code"]) == (401, "unauthenticated")
    assert isinstance(reply.json()["error"], str) and reply.headers["www-authenticate"] == "Bearer"
