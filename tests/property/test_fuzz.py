"""Hostile input to both planes, in one process: no 5xx, one form of error, nothing secret said, no growth of memory.

A shortened run in CI; the long one, at least 200,000 requests:
``FLATSHARE_FUZZ_REQUESTS=200000 ./scripts/test tests/property/test_fuzz.py``
"""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation.modes import GenerationMode

from ..contract.planes import MODEL, Control, Data, data_plane
from .random_requests import Maker

REQUESTS = int(os.environ.get("FLATSHARE_FUZZ_REQUESTS", "6000"))
"""In all: three quarters of them made here, a quarter by schemathesis from the OpenAPI."""

SEED = int(os.environ.get("FLATSHARE_FUZZ_SEED", "1"))
"""Read here: a test does not see the environment of who runs it."""

GROWTH_BYTES = 64 * 1024**2
"""Most that the process may have grown by between a tenth of the run and its end."""


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
    maker = Maker(SEED, data)
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
