"""Spans of sampled requests, through a real data plane, with the SDK's own exporter in memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace

import httpx
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

from flatshare.errors import SettingsError
from flatshare.settings import load_settings
from flatshare.telemetry.exporting import export_spans
from flatshare.telemetry.tracing import joined, part, request_trace, sent_on
from flatshare.weights.tiers import ModelKey

from .conftest import World

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{CALLER}-01"
ROW = {"image": np.zeros((1, 1, 28, 28)).tolist()}


@pytest.fixture(scope="module")
def provider() -> InMemorySpanExporter:
    """As ``export_spans`` sets one up: the API takes one in the life of a process."""
    memory = InMemorySpanExporter()
    there = trace.get_tracer_provider()
    if not isinstance(there, TracerProvider):
        there = TracerProvider(ParentBased(ALWAYS_OFF))
        trace.set_tracer_provider(there)
    there.add_span_processor(SimpleSpanProcessor(memory))
    return memory


@pytest.fixture
def spans(provider: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    provider.clear()
    yield provider
    provider.clear()


@pytest.fixture
def traced(world: World) -> httpx.AsyncClient:
    world.app._traced = True
    return httpx.AsyncClient(transport=httpx.ASGITransport(world.app), base_url="http://localhost")


def parents(memory: InMemorySpanExporter) -> list[tuple[str, str]]:
    """Each span and what it is part of, by the time of its beginning."""
    found = sorted(memory.get_finished_spans(), key=lambda one: one.start_time or 0)
    names = {one.context.span_id: one.name for one in found if one.context is not None}
    return [(one.name, names.get(one.parent.span_id, "caller") if one.parent else "none") for one in found]


def one(memory: InMemorySpanExporter, name: str) -> ReadableSpan:
    (found,) = [span for span in memory.get_finished_spans() if span.name == name]
    return found


async def test_a_cold_request_is_one_trace_and_a_warm_one_too(
    traced: httpx.AsyncClient, spans: InMemorySpanExporter
) -> None:
    headers = {"serve_multiplexed_model_id": "acme", "traceparent": SAMPLED}
    assert (await traced.post("/predict", json=ROW, headers=headers)).status_code == 200
    assert parents(spans) == [
        ("request", "caller"), ("resolve", "request"), ("decode", "request"), ("wait", "request"),
        ("load", "wait"), ("fetch", "load"), ("verify", "fetch"), ("build", "load"), ("probe", "load"),
        ("wait", "request"), ("pass", "request"), ("encode", "request"),
    ]  # fmt: skip
    for span in spans.get_finished_spans():
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == TRACE
        assert span.end_time is not None
        assert span.start_time is not None
        assert span.end_time >= span.start_time
    request = one(spans, "request")
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == CALLER
    about = dict(request.attributes or {})
    assert about["flatshare.tenant"] == "acme"
    assert (about["flatshare.tier"], about["http.response.status_code"]) == ("store", 200)
    assert dict(one(spans, "load").attributes or {}) == {
        "flatshare.version": "acme@1",
        "flatshare.tier": "store",
    }
    spans.clear()
    assert (await traced.post("/predict", json=ROW, headers=headers)).status_code == 200
    assert [name for name, _ in parents(spans)] == ["request", "resolve", "decode", "wait", "pass", "encode"]


@pytest.mark.parametrize(
    "sent", [None, f"00-{TRACE}-{CALLER}-00", "nonsense1", f"00-{'0' * 32}-{CALLER}-01", ""]
)
async def test_nothing_is_recorded_of_what_is_not_sampled(
    traced: httpx.AsyncClient, spans: InMemorySpanExporter, sent: str | None
) -> None:
    headers = {"serve_multiplexed_model_id": "acme", **({"traceparent": sent} if sent is not None else {})}
    assert (await traced.post("/predict", json=ROW, headers=headers)).status_code == 200
    assert spans.get_finished_spans() == ()


async def test_switched_off_no_header_switches_it_on(world: World, spans: InMemorySpanExporter) -> None:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(world.app), base_url="http://localhost"
    ) as client:
        headers = {"serve_multiplexed_model_id": "acme", "traceparent": SAMPLED}
        assert (await client.post("/predict", json=ROW, headers=headers)).status_code == 200
    assert spans.get_finished_spans() == ()


async def test_a_refused_request_has_its_status(
    traced: httpx.AsyncClient, spans: InMemorySpanExporter
) -> None:
    headers = {"serve_multiplexed_model_id": "nobody", "traceparent": SAMPLED}
    assert (await traced.post("/predict", json=ROW, headers=headers)).status_code == 404
    assert dict(one(spans, "request").attributes or {})["http.response.status_code"] == 404
    spans.clear()
    headers["serve_multiplexed_model_id"] = "globex"
    assert (await traced.post("/predict", json={"image": []}, headers=headers)).status_code == 400
    assert [name for name, _ in parents(spans)] == ["request", "resolve"]


async def test_each_line_of_a_stream_has_a_part_of_its_own(
    traced: httpx.AsyncClient, spans: InMemorySpanExporter
) -> None:
    headers = {"serve_multiplexed_model_id": "initech", "traceparent": SAMPLED}
    lines = b'{"image": %s}\n' % str(ROW["image"]).encode() * 3
    reply = await traced.post("/predict/stream", content=lines, headers=headers)
    assert len(reply.text.splitlines()) == 3
    found = parents(spans)
    # What a line is part of is a span of FastAPI's own, in releases that make some.
    assert [name for name, _ in found].count("line") == 3
    assert [parent for name, parent in found if parent == "caller"] == ["caller"]
    assert found.count(("pass", "line")) == 3
    assert found.count(("load", "wait")) == 1


async def test_a_load_that_fails_says_so_and_not_with_what_words(
    world: World, traced: httpx.AsyncClient, spans: InMemorySpanExporter
) -> None:
    headers = {"serve_multiplexed_model_id": "globex", "traceparent": SAMPLED}
    untraced = {"serve_multiplexed_model_id": "globex"}
    assert (await traced.post("/predict", json=ROW, headers=untraced)).status_code == 200
    (record,) = world.cache.resident_records()
    world.cache.unload(ModelKey.of(record))  # so that it is the load that fails
    world.down = True
    assert (await traced.post("/predict", json=ROW, headers=headers)).status_code == 503
    load = one(spans, "load")
    assert (load.status.is_ok, load.status.description) == (False, "Unavailable")
    assert not any("secret-bucket" in span.to_json() for span in spans.get_finished_spans())


def test_what_another_process_does_is_part_of_the_trace(spans: InMemorySpanExporter) -> None:
    request = request_trace({"traceparent": SAMPLED}, "request", {})
    assert request is not None
    with request.entered(), part("step"):
        sent = sent_on()
    request.end(200, [])
    with joined(sent, "there"), part("inside"):
        assert sent_on().startswith(f"00-{TRACE}-")
    assert parents(spans) == [
        ("request", "caller"),
        ("step", "request"),
        ("there", "step"),
        ("inside", "there"),
    ]
    assert sent_on() == ""
    spans.clear()
    with joined("", "there"), part("inside"):
        pass
    assert spans.get_finished_spans() == ()


def test_no_span_has_the_words_of_an_error(spans: InMemorySpanExporter) -> None:
    with contextlib.suppress(ValueError), joined(SAMPLED, "there"), part("inside"):
        raise ValueError("words that may be of anything")
    assert len(spans.get_finished_spans()) == 2
    for span in spans.get_finished_spans():
        assert (span.status.is_ok, span.status.description) == (False, "ValueError")
        assert "words" not in span.to_json()


def test_a_light_install_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flatshare.telemetry.tracing", None)
    assert load_settings(store="memory://x", traces="http://127.0.0.1:4318").s3_options.watch is None


def test_settings_say_where_spans_go() -> None:
    settings = load_settings(store="memory://x", traces="http://127.0.0.1:4318")
    assert settings.s3_options.watch is not None
    assert replace(settings.s3_options, watch=None) == load_settings(store="memory://x").s3_options
    for wrong in ("yes", "127.0.0.1:4318", "ftp://x", "http://x y"):
        with pytest.raises(SettingsError, match="a collector's address"):
            load_settings(store="memory://x", traces=wrong)
    with pytest.raises(SettingsError, match="edge=haproxy"):
        load_settings(store="memory://x", traces="http://x:4318", edge="serve")
    export_spans("off", "flatshare.replica", "r1")
