"""Bodies: compressed ones within the same limits, media types as they are written, multipart as one request."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.unit.flatshare.api.conftest import World

from flatshare.api import bodies
from flatshare.api.bodies import expand, files_of
from flatshare.api.decoding import DecodeRoom
from flatshare.engine.quotas import FREE_BYTES
from flatshare.errors import BadInput, TooLarge

MODEL = {"serve_multiplexed_model_id": "acme"}
PIXELS: NDArray[np.uint8] = np.random.default_rng(3).integers(0, 256, (2, 28, 28), dtype=np.uint8)


def ready(count: int = 2) -> NDArray[np.float32]:
    return (PIXELS[:count].astype(np.float32)[:, None] / 255 - 0.5) / 0.5


async def post(client: httpx.AsyncClient, path: str, body: bytes, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post(path, content=body, headers={**MODEL, **named})


def oip_body() -> dict[str, Any]:
    tensor = {"name": "image", "shape": [2, 1, 28, 28], "datatype": "FP32", "data": ready().ravel().tolist()}
    return {"inputs": [tensor]}


ROUTES = {
    "/predict": (orjson.dumps({"image": ready().tolist()}), "application/json"),
    "/": (ready().tobytes(), "application/octet-stream"),
    "/classify": (PIXELS.tobytes(), "application/octet-stream"),
    "/v2/models/acme/infer": (orjson.dumps(oip_body()), "application/json"),
}
FLOATS = {"x_tensor_dtype": "float32", "x_tensor_shape": "2,1,28,28"}
CODINGS = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "GZIP": gzip.compress}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("path", ROUTES)
async def test_a_compressed_body_is_the_body(
    client: httpx.AsyncClient, world: World, path: str, coding: str
) -> None:
    body, kind = ROUTES[path]
    more = FLOATS if path == "/" else {}
    plain = await post(client, path, body, content_type=kind, **more)
    packed = await post(
        client, path, CODINGS[coding](body), content_type=kind, content_encoding=coding, **more
    )
    assert plain.status_code == packed.status_code == 200
    assert packed.content == plain.content


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "x" * 5000, "identity, gzip"])
@pytest.mark.parametrize("path", [*ROUTES, "/predict/stream"])
async def test_another_coding_is_refused_by_name(client: httpx.AsyncClient, path: str, coding: str) -> None:
    """Compressed bytes whose number is a whole number of images were answered as images."""
    body = bytes(784 * 2)
    reply = await post(client, path, body, content_type="application/octet-stream", content_encoding=coding)
    assert reply.status_code == 415
    assert coding[:40].replace("'", "") in reply.text
    assert "gzip" in reply.text or path == "/predict/stream"


async def test_a_bomb_is_refused_by_what_it_expands_to(client: httpx.AsyncClient, world: World) -> None:
    bomb = gzip.compress(bytes(10**7))
    assert len(bomb) < 150_000
    for path in ("/predict", "/classify"):
        reply = await post(
            client, path, bomb, content_type="application/octet-stream", content_encoding="gzip"
        )
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")


def test_expansion_holds_no_more_than_the_limit() -> None:
    bomb = zlib.compress(bytes(10**8))
    with pytest.raises(TooLarge, match="1000 bytes when it is expanded"):
        expand(bomb, "deflate", 1000)
    assert expand(zlib.compress(b"x" * 1000), "deflate", 1000) == b"x" * 1000


@pytest.mark.parametrize(
    "damaged",
    [b"", b"plain", gzip.compress(b"x")[:-1], gzip.compress(b"x") + b"y", gzip.compress(b"x") * 2],
)
def test_a_damaged_stream_is_refused(damaged: bytes) -> None:
    with pytest.raises(BadInput):
        expand(damaged, "gzip", 1000)


@pytest.mark.parametrize(
    "kind",
    [
        "application/octet-stream; charset=binary",
        "Application/Octet-Stream",
        " application/octet-stream ;x=1",
    ],
)
async def test_media_types_are_parsed(client: httpx.AsyncClient, world: World, kind: str) -> None:
    reply = await post(client, "/predict", ready().tobytes(), content_type=kind, **FLOATS)
    assert reply.json() == {"predicted_label": world.right("acme", ready())}


async def test_npy_with_a_version_is_npy(client: httpx.AsyncClient, world: World) -> None:
    file = io.BytesIO()
    np.save(file, ready())
    reply = await post(client, "/predict", file.getvalue(), content_type="application/x-npy;version=1")
    assert reply.json() == {"predicted_label": world.right("acme", ready())}


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


async def test_multipart_is_one_request(client: httpx.AsyncClient, world: World) -> None:
    files = [("image", (f"{n}.png", png(one), "image/png")) for n, one in enumerate(PIXELS)]
    reply = await client.post("/classify", files=files, headers=MODEL)
    assert reply.json() == {"predicted_label": world.right("acme", ready())}
    reply = await client.post("/classify", files=[*files * 4, files[0]], headers=MODEL)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")


async def test_a_multipart_body_takes_one_turn_among_those_that_are_decoded(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever sends several images waits twice behind a flood, and holds the body for so long."""
    turns: list[str] = []
    run = DecodeRoom.run

    def counted(room: DecodeRoom, tenant: str, work: Callable[[], Any]) -> Coroutine[Any, Any, Any]:
        turns.append(tenant)
        return run(room, tenant, work)

    monkeypatch.setattr(DecodeRoom, "run", counted)
    files = [("image", ("one.png", png(one), "image/png")) for one in PIXELS]
    reply = await client.post("/classify", files=files, headers=MODEL)
    assert reply.json() == {"predicted_label": world.right("acme", ready())}
    assert turns == ["acme"]


async def test_a_compressed_body_counts_as_it_comes_and_then_as_what_it_expands_to(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never as both: when it is expanded, nobody holds the compressed bytes any more."""
    body = np.random.default_rng(0).bytes(784 * 130)
    packed = gzip.compress(body)
    assert len(packed) > len(body) > FREE_BYTES
    quotas, counted = world.service.quotas, []

    def expanded(*arguments: Any) -> bytes:
        counted.append(quotas.held_bytes)
        return expand(*arguments)

    async def predict(*_: object) -> None:
        counted.append(quotas.held_bytes)
        raise BadInput("enough")

    monkeypatch.setattr(bodies, "expand", expanded)
    monkeypatch.setattr(world.service, "predict", predict)
    reply = await post(
        client, "/classify", packed, content_type="application/octet-stream", content_encoding="gzip"
    )
    assert "enough" in reply.text
    assert counted == [len(packed) - FREE_BYTES, len(body) - FREE_BYTES]
    assert quotas.held_bytes == 0


def test_multipart_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """One part with headers without end is parsed a piece at a time, with a look at the clock between."""
    head = b"--b\r\n" + b"x: y\r\n" * 200_000
    monkeypatch.setattr(bodies, "MULTIPART_BUDGET_S", 0.0)
    with pytest.raises(TooLarge, match="longer than 0 s"):
        files_of({"content-type": "multipart/form-data; boundary=b"}, head, 10)


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-7", "rot13", "x" * 5000])
def test_a_multipart_body_chooses_no_codec(charset: str) -> None:
    """Names of parts are decoded as UTF-8, whatever is asked for: Python's punycode takes quadratic time."""
    body = b'--b\r\ncontent-disposition: form-data; name="\x80\x81"; filename="x"\r\n\r\nA\r\n--b--\r\n'
    try:
        assert files_of(
            {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}, body, 10
        ) == [b"A"]
    except BadInput as error:
        assert error.message.isprintable() and error.message.isascii()


@pytest.mark.parametrize("kind", ["", "multipart/form-data", "multipart/form-data; boundary=", "x; boundary"])
def test_a_multipart_body_needs_a_boundary(kind: str) -> None:
    with pytest.raises(BadInput, match="names no boundary"):
        files_of({"content-type": kind}, b"--b--", 10)


@pytest.mark.parametrize("body", [b"", b"--b", b"--b\r\n\r\nx\r\n--b--\r\n", b"--b\r\n\xff: \r\n"])
def test_damaged_multipart_is_refused_or_empty(body: bytes) -> None:
    try:
        assert files_of({"content-type": "multipart/form-data; boundary=b"}, body, 10) == []
    except BadInput as error:
        assert "multipart" in error.message


async def test_raw_pixels_in_place_of_numbers_are_refused_with_the_way_to_go(
    client: httpx.AsyncClient, world: World
) -> None:
    raw = orjson.dumps({"image": PIXELS.tolist()})
    file = io.BytesIO()
    np.save(file, PIXELS.astype(np.int64))
    for body, kind in ((raw, "application/json"), (file.getvalue(), "application/x-npy")):
        reply = await post(client, "/predict", body, content_type=kind)
        assert reply.status_code == 400
        assert "/classify" in reply.json()["error"]["message"]
        reply = await post(client, "/predict", body, content_type=kind, x_tensor_values="model-ready")
        wanted = world.right("acme", PIXELS.astype(np.float32)[:, None])
        assert reply.json() == {"predicted_label": wanted}


async def test_numbers_that_only_look_a_bit_like_pixels_are_taken(client: httpx.AsyncClient) -> None:
    for rows in (
        np.zeros((1, 28, 28)),
        np.ones((1, 28, 28)),
        np.full((1, 28, 28), 2.5),
        np.full((1, 28, 28), -3.0),
    ):
        reply = await post(client, "/predict", orjson.dumps({"image": rows.tolist()}))
        assert reply.status_code == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"image": [' + b"[]," * 40_000 + b"[]]}", "bad_input"),
        (b'{"image": [' + b"{}," * 40_000 + b"{}]}", "bad_input"),
        (b'{"image": [' + b'"",' * 40_000 + b'""]}', "bad_input"),
        (b'{"image": [' + b"0," * 70_000 + b"0]}", "too_large"),
        (b"[" * 70_000, "bad_input"),
    ],
)
async def test_json_that_would_expand_is_refused_before_it_is_parsed(
    client: httpx.AsyncClient, body: bytes, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(text: bytes) -> object:
        raise AssertionError("it was parsed")

    monkeypatch.setattr("flatshare.codecs.payload.orjson.loads", parse)
    reply = await post(client, "/predict", body)
    assert reply.json()["error"]["code"] == code
