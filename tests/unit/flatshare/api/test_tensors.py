"""Inputs without JSON: raw bytes, .npy files, lines of a stream. Right answers, and clear refusals."""

from __future__ import annotations

import io
import json

import httpx
import numpy as np
import orjson
import pytest
from numpy.typing import NDArray

from .conftest import NETWORK, World

MODEL = "serve_multiplexed_model_id"


def pixels(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def floats(count: int) -> NDArray[np.float32]:
    return NETWORK.preprocess(pixels(count))


def npy(array: NDArray[np.generic], **options: object) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)  # type: ignore[arg-type]  # numpy's own
    return file.getvalue()


async def post(client: httpx.AsyncClient, kind: str, body: bytes, **headers: str) -> httpx.Response:
    return await client.post(
        "/predict",
        content=body,
        headers={
            MODEL: "acme",
            "content-type": kind,
            **{key.replace("_", "-"): v for key, v in headers.items()},
        },
    )


OCTETS = "application/octet-stream"
NPY = "application/x-npy"


@pytest.mark.parametrize("count", [1, 5])
async def test_every_form_of_the_same_images_gets_the_same_answer(
    world: World, client: httpx.AsyncClient, count: int
) -> None:
    raw, ready = pixels(count), floats(count)
    wanted = world.right("acme", ready)
    float_headers = {"x_tensor_dtype": "float32", "x_tensor_shape": ",".join(map(str, ready.shape))}
    for reply in (
        await post(client, OCTETS, raw.tobytes()),
        await post(client, OCTETS, raw.tobytes(), x_tensor_shape=f"{count},28,28"),
        await post(client, OCTETS, raw.tobytes(), x_tensor_shape=f"{count},1,28,28", x_tensor_dtype="uint8"),
        await post(client, OCTETS, ready.tobytes(), **float_headers),
        await post(client, NPY, npy(raw)),
        await post(client, NPY, npy(ready)),
        await post(client, NPY, npy(ready.astype(">f4"))),
        await post(client, NPY, npy(ready[:, 0].astype(np.float64))),
        await post(client, NPY, npy(np.asfortranarray(ready))),
        await post(client, NPY, npy(np.asfortranarray(raw))),
    ):
        assert reply.status_code == 200, reply.text
        assert reply.json() == {"predicted_label": wanted}


FLOAT = {"x_tensor_dtype": "float32", "x_tensor_shape": "1,28,28"}
ROW = bytes(784 * 4)
NAN = np.full((1, 28, 28), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("kind", "body", "headers", "status", "says"),
    [
        (OCTETS, b"", {}, 400, "not a whole number"),
        (OCTETS, bytes(783), {}, 400, "not a whole number"),
        (OCTETS, bytes(784 * 9), {}, 413, "limit is 8"),
        (OCTETS, ROW, {"x_tensor_dtype": "float32"}, 400, "needs its shape"),
        (OCTETS, ROW, {"x_tensor_dtype": "float16"}, 400, "must be uint8 or float32"),
        (OCTETS, ROW[:-1], FLOAT, 400, "that takes 3136"),
        (OCTETS, ROW, FLOAT | {"x_tensor_shape": "1,28"}, 400, "it must be"),
        (OCTETS, ROW, FLOAT | {"x_tensor_shape": "-1,28,28"}, 400, "whole numbers with commas"),
        (OCTETS, ROW, FLOAT | {"x_tensor_shape": "9" * 9 + ",28,28"}, 413, "limit is 8"),
        (OCTETS, NAN.tobytes(), FLOAT, 400, "not finite"),
        (NPY, b"", {}, 400, "not a .npy file"),
        (NPY, b"\x93NUMPY\x09\x00", {}, 400, "not a .npy file"),
        (NPY, npy(np.zeros((1, 28, 28)))[:-1], {}, 400, "that takes"),
        (NPY, npy(np.zeros((1, 28, 28), dtype=object)), {}, 400, "pixels or numbers"),
        (NPY, npy(np.zeros((1, 28, 28), dtype=complex)), {}, 400, "pixels or numbers"),
        (NPY, npy(np.zeros((1, 28, 28), dtype="U1")), {}, 400, "pixels or numbers"),
        (NPY, npy(np.zeros((0, 28, 28))), {}, 400, "no row"),
        (NPY, npy(np.zeros((9, 28, 28), dtype=np.uint8)), {}, 413, "limit is 8"),
        (NPY, npy(np.zeros((2, 7))), {}, 400, "it must be"),
        (NPY, npy(NAN), {}, 400, "not finite"),
        (NPY, npy(np.full((1, 28, 28), 1e300)), {}, 400, "not finite"),
        (NPY, npy(np.zeros((28, 28, 2), dtype=np.uint8, order="F")), {}, 400, "it must be"),
    ],
)  # fmt: skip
async def test_wrong_tensors_are_refused_clearly(
    client: httpx.AsyncClient, kind: str, body: bytes, headers: dict[str, str], status: int, says: str
) -> None:
    reply = await post(client, kind, body, **headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (
        status,
        "bad_input" if status == 400 else "too_large",
    )
    assert says in reply.json()["error"]["message"]


async def test_a_lying_npy_header_costs_no_memory(client: httpx.AsyncClient) -> None:
    whole = npy(np.zeros((1, 28, 28), dtype=np.uint8))
    lying = whole.replace(b"(1, 28, 28)", b"(8, 28, 28)")
    assert (await post(client, NPY, lying)).status_code == 400
    huge = whole.replace(b"(1, 28, 28)", b"(99999999,)")
    assert (await post(client, NPY, huge)).status_code == 400


@pytest.mark.parametrize("number", range(0, 100, 3))
async def test_a_damaged_npy_header_is_the_callers_fault(client: httpx.AsyncClient, number: int) -> None:
    whole = bytearray(npy(np.zeros((1, 28, 28), dtype=np.uint8)))
    for junk in (b"\xdb", b"(", b'"'):  # found by fuzzing: numpy's tokeniser raises an error of its own
        damaged = whole.copy()
        damaged[10 + number : 11 + number] = junk
        assert (await post(client, NPY, bytes(damaged))).status_code in (200, 400)


async def stream(client: httpx.AsyncClient, *lines: bytes, model: str = "acme") -> httpx.Response:
    return await client.post(
        "/predict/stream", content=b"\n".join(lines),
        headers={MODEL: model, "content-type": "application/x-ndjson"},
    )  # fmt: skip


async def test_a_stream_answers_every_line_and_one_bad_line_fails_only_itself(
    world: World, client: httpx.AsyncClient
) -> None:
    batches = [floats(count) for count in (1, 3, 2)]
    lines = [orjson.dumps({"image": rows.tolist()}) for rows in batches]
    reply = await stream(client, lines[0], b"", b"{not json", lines[1], b'{"image": [1]}', lines[2])
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/x-ndjson"
    answers = {answer["index"]: answer for answer in map(json.loads, reply.text.splitlines())}
    assert sorted(answers) == [0, 1, 2, 3, 4]
    for index, rows in zip((0, 2, 4), batches, strict=True):
        assert answers[index]["predicted_label"] == world.right("acme", rows)
        assert answers[index]["version"] == 1
    for index in (1, 3):
        assert answers[index]["error"]["code"] == "bad_input"
        assert answers[index]["error"]["request_id"]


async def test_a_stream_of_more_lines_than_run_at_a_time(world: World, client: httpx.AsyncClient) -> None:
    rows = [floats(count % 3 + 1) for count in range(60)]
    reply = await stream(client, *(orjson.dumps({"image": one.tolist()}) for one in rows))
    answers = {
        answer["index"]: answer["predicted_label"] for answer in map(json.loads, reply.text.splitlines())
    }
    assert answers == {index: world.right("acme", one) for index, one in enumerate(rows)}


async def test_a_stream_for_nobody_and_with_a_line_too_long(client: httpx.AsyncClient) -> None:
    (answer,) = map(json.loads, (await stream(client, b"{}", model="nobody")).text.splitlines())
    assert answer["error"]["code"] == "not_found"
    assert (await stream(client, b"{}", model="Not A Ref")).status_code == 400
    (answer,) = map(json.loads, (await stream(client, b'"' + b"x" * 150_001)).text.splitlines())
    assert answer["error"]["code"] == "too_large"
    assert (await stream(client)).text == ""
