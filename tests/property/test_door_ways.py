"""The short way of hot requests and uvicorn's usual way give the same answer, byte for byte.

Two doors over one data plane: one that answers hot requests in the parser's callbacks, one that never does.
Generated requests go to both, cut into pieces at random places, several on a connection. ``FLATSHARE_TEST_SEEDS``
says how many.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import random
import re

import numpy as np
import orjson
import pytest
from tests.contract.planes import Data, data_plane

from flatshare.api import identity
from flatshare.api.hot import HotRoute, HotRoutes
from flatshare.bench.workload import encode_json
from flatshare.door.listener import Door
from flatshare_registry.ids import ModelRef

REQUESTS = int(os.environ.get("FLATSHARE_TEST_SEEDS", "10000"))
ULID = re.compile(rb"\b[0-9A-HJKMNP-TV-Z]{26}\b")
DATE = re.compile(rb"date: [^\r]*\r\n")


class Plain(HotRoutes):
    """The same data plane, of which no request takes the short way; as ASGI it answers as before."""

    def __init__(self, app: HotRoutes) -> None:
        self._whole = app
        self.answers = app.answers

    def route(self, path: str) -> HotRoute | None:
        return None

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]  # as the app's
        await self._whole(scope, receive, send)


class Wires:
    """Connections to both doors, opened anew when one of them was closed."""

    def __init__(self, doors: tuple[Door, Door]) -> None:
        self.doors = doors
        self.open: list[tuple[asyncio.StreamReader, asyncio.StreamWriter] | None] = [None, None]

    async def ask(self, index: int, pieces: list[bytes]) -> bytes:
        door = self.doors[index]
        wire = self.open[index] or await asyncio.open_connection(door.host, door.port)
        self.open[index] = wire
        reader, writer = wire
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n\r\n")
            while head.startswith(b"HTTP/1.1 100"):
                head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
        if b"connection: close" in head or head.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: text"):
            assert await reader.read() == b"", "closed as it says"
            writer.close()
            self.open[index] = None
        return DATE.sub(b"", ULID.sub(b"<id>", head + body))

    def close(self) -> None:
        for wire in self.open:
            if wire is not None:
                wire[1].close()


def generated(dice: random.Random, data: Data) -> tuple[bytes, list[bytes]]:
    """One request, and the pieces in which it is sent."""
    rows = np.array([[dice.random()] * 784 for _ in range(dice.choice([1, 1, 1, 2, 9]))], np.float32)
    rows = rows.reshape(-1, 1, 28, 28)
    path = dice.choice(
        ["/predict"] * 6 + ["/"] * 2 + ["/v2/models/acme/infer", "/v2/models/acme/versions/1/infer"] * 2
        + ["/predict?x=1", "/predict/", "/Predict", "/v2/models/acme/infer?y", "/v2/models/a%63me/infer",
           "/v2/models//infer", "/v2/models/acme/versions/x/infer", "/v2/models/acme", "/nothing", "/%ff"]
    )  # fmt: skip
    headers = [("host", "localhost"), ("x-request-id", dice.choice(["a-1", "Z.9", "not safe", "", "x" * 65]))]
    body: bytes = encode_json(rows)
    if path.startswith("/v2"):
        body = orjson.dumps(
            {"inputs": [{"name": dice.choice(["image", "image", "other"]), "datatype": "FP32",
                         "shape": list(rows.shape), "data": rows.ravel().tolist()}], "id": "i"}
        )  # fmt: skip
    kind = dice.random()
    if kind < 0.1:
        body = rows.astype("<f4").tobytes()
        headers += [("content-type", "application/octet-stream"), ("x-tensor-dtype", "float32")]
    elif kind < 0.2:
        file = io.BytesIO()
        np.save(file, rows)
        body = file.getvalue()
        headers += [("content-type", "application/x-npy")]
    elif kind < 0.3:
        body = dice.choice(
            [b"", b"{", b"[]", b'{"image": 1}', b'{"image": [[1e999]]}', b"\xff" * 40, b"0" * 70_000]
        )
    elif kind < 0.35:
        body = orjson.dumps(body.decode())
    models = ["acme"] * 6 + [
        "acme:production",
        "acme@1",
        "acme@9",
        "globex",
        "nobody",
        "Not A Ref",
        "",
        "a" * 70,
    ]
    named = dice.choice(
        ["serve_multiplexed_model_id"] * 8 + ["serve-multiplexed-model-id", "Serve_Multiplexed_Model_Id", ""]
    )
    if named:
        headers += [(named, dice.choice(models))] * dice.choice([1] * 9 + [2])
    who = dice.choice(
        ["predict"] * 12 + ["both", "admin", "viewer", "manage", "no key", "bad admin", "other tenant's"]
    )
    headers += data.keys.headers(who, dice.choice(["bearer", "key"])).items()
    if dice.random() < 0.05:
        headers += [("authorization", dice.choice(["Basic abc", "Bearer", "Bearer  x", "bearer fs_x_y"]))]
    odd = dice.random()
    method, version = "POST", "1.1"
    if odd < 0.03:
        headers += [("connection", "close")]
    elif odd < 0.06:
        version = "1.0"
    elif odd < 0.09:
        headers += [("expect", "100-continue")]
    elif odd < 0.12:
        body = gzip.compress(body)
        headers += [("content-encoding", dice.choice(["gzip", "br"]))]
    elif odd < 0.15:
        method = dice.choice(["GET", "PUT", "DELETE"])
    if odd > 0.95:
        headers += [("transfer-encoding", "chunked")]
        body = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n" if body else b"0\r\n\r\n"
    else:
        headers += [("content-length", str(len(body)))]
    if dice.random() < 0.3:
        dice.shuffle(headers)
    lines = [f"{method} {path} HTTP/{version}", *(f"{name}: {value}" for name, value in headers)]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    cuts = sorted(dice.randrange(len(head) + len(body)) for _ in range(dice.choice([0, 0, 0, 1, 2])))
    whole = head + body
    return whole, [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True) if a < b]


async def compare(data: Data, doors: tuple[Door, Door], seed: int, seen: dict[bytes, int]) -> None:
    """One client's requests, each sent to both doors."""
    dice = random.Random(seed)
    wires = Wires(doors)
    for number in range(REQUESTS):
        whole, pieces = generated(dice, data)
        try:
            first, second = [await wires.ask(index, pieces) for index in (0, 1)]
        except ConnectionResetError:
            # Refused by its headers and closed with a body that nobody read: TCP may drop the answer then.
            seen[b"reset"] = seen.get(b"reset", 0) + 1
            wires.close()
            wires = Wires(doors)
            continue
        assert first == second, f"request {number} of {seed}: {whole[:600]!r}"
        status = first.split(b" ", 2)[1]
        seen[status] = seen.get(status, 0) + 1
    wires.close()


@pytest.mark.timeout(60 + REQUESTS // 20)
async def test_both_ways_give_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "REFUSAL_S", 0.0)
    seen: dict[bytes, int] = {}
    with data_plane() as data:
        doors = Door(data.app, "127.0.0.1"), Door(Plain(data.app), "127.0.0.1")
        for door in doors:
            await door.start()
        for tenant in ("acme", "globex"):  # resident, so that both ways find them on the device
            version = await data.service.resolver.said(ModelRef.parse(tenant), 5)
            await data.service.cache.preload(version, 5)
        # One after the other: a row's logits differ in their last digit with the rows that share its pass.
        await compare(data, doors, 20261126, seen)
        for door in doors:
            await door.stop(1, notice_s=0)
    assert {b"200", b"400", b"401", b"403", b"404", b"413", b"415"} <= set(seen), seen
    assert seen[b"200"] > REQUESTS / 10, seen
    assert seen.get(b"reset", 0) < REQUESTS / 50, seen
