"""Hostile input to both planes, in one process: no 5xx, one form of error, nothing secret said, no growth of memory.

A shortened run in CI; the long one, at least 200,000 requests:
``FLATSHARE_FUZZ_REQUESTS=200000 ./scripts/test tests/property/test_fuzz.py``
"""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import random
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.generation.modes import GenerationMode

from ..contract.planes import MODEL, Control, Data, data_plane

REQUESTS = int(os.environ.get("FLATSHARE_FUZZ_REQUESTS", "6000"))
"""In all: three quarters of them made here, a quarter by schemathesis from the OpenAPI."""

GROWTH_BYTES = 64 * 1024**2
"""Most that the process may have grown by between a tenth of the run and its end."""

NUMBERS = ["0", "1", "-1", "0.5", "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "1e-999", "3.4e38",
           "3.5e38", "true", "null", '"7"', '"0.1"', "[]", "{}", "0x10", "1_000", "00", "1."]  # fmt: skip
REFS = ["acme", "acme@1", "acme:production", "globex", "nobody", "", "acme@0", "acme@99999999", "acme@-1", "ACME",
        "acme:canary", "a" * 64, "../../etc", "acme@1:x", "acme\t", "acme,globex", "%61cme", "acme@١"]  # fmt: skip
NASTY = ["\r\nx-evil: 1", "\x1b[31m", "\u202e", "${jndi:ldap://x}", "%s%n", "'; drop table", "a" * 3000]


class Maker:
    """Makes requests at random: mostly almost right, since what is wrong at once is refused at once."""

    def __init__(self, seed: int, data: Data) -> None:
        self.random = random.Random(seed)
        self.keys = [text for text in data.keys.texts.values() if text is not None]
        self.good = data.keys.texts["both"]

    def request(self) -> tuple[str, str, dict[str, str], bytes]:
        chosen = self.random
        body, kind, path = chosen.choice(
            [self.json, self.json, self.octets, self.npy, self.image, self.oip, self.lines]
        )()
        if chosen.random() < 0.3:
            body = self.damaged(body)
        headers = {"content-type": kind, MODEL: chosen.choice(REFS) if chosen.random() < 0.3 else "acme"}
        if chosen.random() < 0.9:
            key = self.good if chosen.random() < 0.85 else chosen.choice(self.keys)
            assert key is not None
            headers |= {"authorization": f"Bearer {key}"} if chosen.random() < 0.5 else {"x-api-key": key}
        elif chosen.random() < 0.5:
            headers["authorization"] = chosen.choice(
                ["Bearer", "Bearer x", "Basic YTpi", "bearer " + "x" * 9000, ""]
            )
        if chosen.random() < 0.3:
            headers["x-tensor-dtype"] = chosen.choice(["uint8", "float32", "float64", "object", "", "F32"])
            headers["x-tensor-shape"] = chosen.choice(
                [
                    "1,1,28,28",
                    "28,28",
                    "0,1,28,28",
                    "-1,1,28,28",
                    "1,1,28",
                    "9" * 400,
                    "1e3",
                    "",
                    ",",
                    "1,1,28,28,1",
                ]
            )
        if chosen.random() < 0.2:
            headers["x-request-id"] = chosen.choice([*NASTY, "fine-1"]).encode("ascii", "replace").decode()
        if chosen.random() < 0.1:
            headers["inference-header-content-length"] = chosen.choice(
                ["0", "5", "-1", "9" * 30, "x", str(len(body))]
            )
        if chosen.random() < 0.05:
            path = chosen.choice(
                ["/", "/predict", "/classify", "/predict/stream", "/v2", "/nope", "/predict/", "//"]
            )
        method = (
            "POST" if chosen.random() < 0.97 else chosen.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
        )
        return method, path, headers, body

    def rows(self) -> str:
        chosen = self.random
        size = chosen.choice([28, 28, 28, 1, 0, 27])
        row = "[" + ",".join("0" for _ in range(size)) + "]"
        image = "[" + ",".join([row] * chosen.choice([28, 28, 28, 0, 29])) + "]"
        if chosen.random() < 0.5:
            image = image.replace("0", chosen.choice(NUMBERS), chosen.choice([1, 1, 784]))
        return chosen.choice([image, f"[[{image}]]", f"[{','.join([image] * chosen.choice([1, 2, 9]))}]"])

    def json(self) -> tuple[bytes, str, str]:
        chosen = self.random
        text = f'{{"image": {self.rows()}}}'
        shape = chosen.random()
        if shape < 0.1:
            text = json.dumps(text)  # the notebook's form
        elif shape < 0.15:
            text = "[" * chosen.choice([10, 1000, 100_000])
        elif shape < 0.2:
            text = '{"image":' * 2000 + "1" + "}" * 2000
        elif shape < 0.25:
            text = json.dumps(
                {"image": chosen.choice([None, 5, "x", {}, [[]], NASTY[0]]), chosen.choice(NASTY): 1}
            )
        return text.encode("utf-8", "surrogatepass"), "application/json", "/predict"

    def octets(self) -> tuple[bytes, str, str]:
        chosen = self.random
        return (
            chosen.randbytes(chosen.choice([784, 784, 1568, 0, 783, 3136])),
            "application/octet-stream",
            chosen.choice(["/predict", "/classify"]),
        )

    def npy(self) -> tuple[bytes, str, str]:
        chosen = self.random
        target = io.BytesIO()
        kind = chosen.choice(["float32", "float32", "uint8", "float64", "int64", "complex64", "S4"])
        np.save(
            target, np.zeros(chosen.choice([(1, 1, 28, 28), (28, 28), (2, 28, 28), (0,), (3, 3)]), dtype=kind)
        )
        data = target.getvalue()
        if chosen.random() < 0.2:
            data = data.replace(b"(1, 1, 28, 28)", b"(9, 99999,999)").replace(b"'<f4'", b"'|O' ")
        return data, "application/x-npy", "/predict"

    def image(self) -> tuple[bytes, str, str]:
        chosen = self.random
        if chosen.random() < 0.2:  # a bomb: a small file that claims to be enormous
            header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 0, 0, 0, 0)
            data = b"\x89PNG\r\n\x1a\n" + b"".join(
                struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
                for name, part in (
                    (b"IHDR", header),
                    (b"IDAT", zlib.compress(b"\0" * 10_000)),
                    (b"IEND", b""),
                )
            )
            return data, "image/png", "/classify"
        target = io.BytesIO()
        mode, form = chosen.choice(["L", "RGB", "P", "RGBA", "1", "CMYK"]), chosen.choice(["PNG", "JPEG"])
        size = chosen.choice([(28, 28), (28, 28), (1, 1), (29, 28), (2000, 1)])
        if form == "JPEG" and mode in ("P", "RGBA"):
            mode = "L"
        if form == "PNG" and mode == "CMYK":
            mode = "RGB"
        Image.new(mode, size).save(target, form)
        return (
            target.getvalue(),
            chosen.choice(["image/png", "image/jpeg", "multipart/form-data; boundary=x"]),
            "/classify",
        )

    def oip(self) -> tuple[bytes, str, str]:
        chosen = self.random
        tensor: dict[str, Any] = {
            "name": chosen.choice(["image", "image", "other"]),
            "datatype": chosen.choice(["FP32", "UINT8", "FP64", "BYTES", 5]),
            "shape": chosen.choice(
                [[1, 1, 28, 28], [28, 28], [1, 784], [-1], [2**40, 2**40], [0], "x", [1.5], []]
            ),
            "data": chosen.choice([[0] * 784, [0.5] * 784, [], [[0]], "x", None, [300] * 784, [True] * 784]),
        }
        if chosen.random() < 0.2:
            tensor["parameters"] = {"binary_data_size": chosen.choice([0, -1, 2**63, 3136, "x", True])}
        document: dict[str, Any] = {
            "inputs": chosen.choice([[tensor], [tensor], [tensor] * 2, [], tensor, None])
        }
        if chosen.random() < 0.3:
            document["outputs"] = chosen.choice(
                [
                    [{"name": "logits"}],
                    [{"name": "x"}],
                    5,
                    [5],
                    [{"name": "logits", "parameters": 7}],
                    [{"name": ["logits"]}],
                ]
            )
            document["parameters"] = chosen.choice([None, 5, {"binary_data_output": True}, []])
            document["id"] = chosen.choice(["1", 5, "x" * 5000, None])
        return (
            json.dumps(document).encode(),
            "application/json",
            f"/v2/models/{chosen.choice(['acme', 'acme@1', 'globex', 'a b', '%00'])}/infer",
        )

    def lines(self) -> tuple[bytes, str, str]:
        count = self.random.choice([1, 2, 5])
        return b"\n".join(self.json()[0] for _ in range(count)), "application/x-ndjson", "/predict/stream"

    def damaged(self, body: bytes) -> bytes:
        chosen = self.random
        if not body:
            return body
        start = chosen.randrange(len(body))
        return chosen.choice([
            lambda: body[:start], lambda: body[:start] + chosen.randbytes(4) + body[start + 4:],
            lambda: body + body, lambda: body[start:], lambda: b"\xef\xbb\xbf" + body, lambda: body + b"\0" * 10,
        ])()  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Iterator[Data]:
    with data_plane() as made:
        yield made


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatshare.api.identity.REFUSAL_S", 0.0)


def secrets_of(keys: Iterable[str]) -> list[str]:
    """Secrets of keys that exist: the made-up ones are what a request may hold anyway."""
    return [secret for key in keys if len(set(secret := key.split("_", 2)[2])) > 5]


def check(reply: httpx.Response, path: str, secrets: list[str]) -> str:
    """One of our forms, whatever was sent; returns the code."""
    assert reply.status_code < 500, f"{path}: {reply.status_code} {reply.text[:300]}"
    text = reply.text
    assert "Traceback" not in text
    assert not any(secret in text or secret in str(reply.headers) for secret in secrets)
    assert "x-evil" not in reply.headers
    if reply.status_code < 400:
        return "ok"
    if reply.request.method == "HEAD":
        return "head"
    document = reply.json()
    error = document["error"]
    code = document["code"] if isinstance(error, str) else error["code"]
    message = error if isinstance(error, str) else error["message"]
    assert code.replace("_", "").isalpha(), code
    assert len(message) < 600, "a refusal repeats at most a little of what it refuses"
    assert message.isprintable(), message
    return str(code)


@pytest.mark.timeout(120 + REQUESTS // 20)
async def test_nothing_that_is_sent_breaks_the_data_plane(
    data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    maker = Maker(int(os.environ.get("FLATSHARE_FUZZ_SEED", "1")), data)
    secrets = secrets_of(maker.keys)
    codes: Counter[str] = Counter()
    process = psutil.Process()
    count, number = REQUESTS, 0
    at_tenth = 0
    caplog.set_level(logging.DEBUG, "flatshare")
    transport = httpx.ASGITransport(app=data.app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        while number < count:
            method, path, headers, body = maker.request()
            try:
                request = client.build_request(method, path, headers=headers, content=body)
            except (httpx.InvalidURL, ValueError):
                codes["not sendable"] += 1  # and not counted
                continue
            number += 1
            reply = await client.send(request)
            codes[check(reply, path, secrets)] += 1
            if number == count // 10:
                gc.collect()
                at_tenth = process.memory_info().rss
            if number % 500 == 0:
                for record in caplog.records:
                    line = record.getMessage()
                    assert not any(secret in line for secret in secrets)
                    assert "\n" not in line, "one line a record, whatever a caller sent"
                caplog.clear()
        # And it works as before.
        good = {MODEL: "acme", "x-api-key": str(maker.good), "content-type": "application/octet-stream"}
        assert (await client.post("/predict", headers=good, content=b"\0" * 784)).status_code == 200
    gc.collect()
    grown = process.memory_info().rss - at_tenth
    print(dict(codes), f"grown by {grown / 1e6:.1f} MB")
    assert grown < GROWTH_BYTES
    assert codes["ok"] > count // 50, "much of it is almost right"
    assert codes["bad_input"] > count // 10
    assert (data.service.admission.ongoing, data.service.admission.queued) == (0, 0)
    assert data.service.cold.ongoing == 0
    assert all(account.under_way == 0 for account in data.service.quotas._accounts.values())


@schemathesis.serializer("application/x-ndjson")
def _lines(context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


def schema_of(app: Any) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("plane", ["data", "control"])
@pytest.mark.timeout(120 + REQUESTS // 20)
def test_nothing_that_the_openapi_allows_or_forbids_breaks_a_plane(
    plane: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPOTHESIS_STORAGE_DIRECTORY", str(tmp_path))
    control = Control(tmp_path)
    app, keys = (data.app, data.keys) if plane == "data" else (control.app, control.keys)
    key = keys.texts["admin"]
    secrets = secrets_of(text for text in keys.texts.values() if text is not None)
    schema = schema_of(app)
    operations = [one.ok() for one in schema.get_all_operations()]
    each = max(REQUESTS // 8 // len(operations), 5)
    if plane == "control":
        each = min(each, 300)  # its registry is in memory, and what it is made to create stays there
    seen: Counter[str] = Counter()

    def probe(operation: Any) -> None:
        @settings(
            max_examples=each, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck), derandomize=True,
        )  # fmt: skip
        @given(case=st.one_of(
            operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
            operation.as_strategy(generation_mode=GenerationMode.NEGATIVE),
        ))  # fmt: skip
        def one(case: Any) -> None:
            headers = {**(case.headers or {}), "authorization": f"Bearer {key}"}
            if plane == "data":
                headers.setdefault(MODEL, "acme")
            reply = case.call(headers=headers)
            seen[str(reply.status_code)] += 1
            assert reply.status_code < 500, f"{operation.label}: {reply.status_code} {reply.text[:300]}"
            assert not any(secret in reply.text for secret in secrets)

        one()

    for operation in operations:
        probe(operation)
    print(plane, dict(seen))
    assert sum(seen.values()) >= len(operations) * 3
    assert seen["400"] or seen["404"]
