"""The load generator against a real HTTP server, and what it makes of the outcomes."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from aiohttp import web

from flatshare.bench.load import Load, Outcome, send_all
from flatshare.bench.plot import plot_run
from flatshare.bench.report import compare_hits, summarise
from flatshare.bench.workload import BenchRequest, digit_shots, encode_json, zipf_shares


@pytest.fixture
async def server() -> AsyncIterator[str]:
    """Answers 7, or errors by the model's name."""

    async def predict(request: web.Request) -> web.Response:
        model = request.headers["serve_multiplexed_model_id"]
        await request.read()
        if model == "busy":
            return web.json_response({"error": {"code": "overloaded"}}, status=503)
        if model == "broken":
            return web.Response(text="<html>", status=502)
        headers = {"x-flatshare-tier": "device", "x-flatshare-replica": "r1", "x-flatshare-version": "1"}
        return web.json_response({"predicted_label": [7]}, headers=headers)

    app = web.Application()
    app.router.add_post("/", predict)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    await runner.cleanup()


async def test_closed_loop_sends_exactly_so_many(server: str) -> None:
    done: list[int] = []
    shots = itertools.repeat(BenchRequest("acme", b"{}", (7,)))
    outcomes = await send_all(server, shots, Load(requests=50, concurrency=4), done.append)
    assert len(outcomes) == 50
    assert done[-1] == 50
    assert all(one.right and one.tier == "device" for one in outcomes)


async def test_errors_and_wrong_answers_are_told_apart(server: str) -> None:
    shots = [
        BenchRequest("busy", b""),
        BenchRequest("broken", b""),
        BenchRequest("acme", b"", (3,)),
        BenchRequest("acme", b""),
    ]
    outcomes = await send_all(server, iter(shots), Load(requests=10, concurrency=1))
    report = summarise(outcomes)
    assert report["errors_by_code"] == {"overloaded": 1, "http_502": 1}
    assert (report["requests"], report["errors"], report["wrong_answers"], report["checked_answers"]) == (
        4,
        2,
        1,
        1,
    )
    nobody = await send_all("http://127.0.0.1:9/", iter(shots[:1]), Load(requests=1))
    assert [one.code for one in nobody] == ["no_answer"]
    assert summarise(nobody)["latency_ms"]["p50"] is None


@pytest.mark.parametrize(
    ("sent", "code"), [(b"", "no_answer"), (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}", "cut_answer")]
)
async def test_a_connection_that_ends_too_early(sent: bytes, code: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as cutting:
        url = f"http://127.0.0.1:{cutting.sockets[0].getsockname()[1]}/predict"
        (one,) = await send_all(url, iter([BenchRequest("acme", b"{}")]), Load(requests=1))
    assert (one.status, one.code) == (0, code)


async def test_open_loop_keeps_its_rate(server: str) -> None:
    shots = itertools.repeat(BenchRequest("acme", b"{}"))
    outcomes = await send_all(server, shots, Load(duration_s=1.0, rate=100))
    assert len(outcomes) == 100
    assert sorted(one.at_s for one in outcomes) == pytest.approx([n / 100 for n in range(100)])


def test_zipf_shares() -> None:
    shares = zipf_shares(4, 1.0)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] / shares[3] == pytest.approx(4)
    assert zipf_shares(4, 0).tolist() == [0.25] * 4


def test_shots_are_the_same_for_the_same_seed_and_follow_the_shares() -> None:
    images = np.zeros((10, 1, 28, 28), dtype=np.float32)

    def draw(seed: int) -> list[BenchRequest]:
        shots = digit_shots(["a", "b", "c"], images, exponent=1.0, batch=2, seed=seed)
        return list(itertools.islice(shots, 3000))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    counts = Counter(shot.model for shot in draw(1))
    assert counts["a"] / 3000 == pytest.approx(6 / 11, abs=0.04)
    assert np.array(orjson.loads(draw(1)[0].body)["image"]).shape == (2, 1, 28, 28)
    assert orjson.loads(encode_json(images[:1]))["image"][0][0][0][0] == 0.0


def fleet(device: int, store: int, *replicas: str) -> dict[str, Any]:
    hits = {"device": device, "host": 0, "peer": 0, "store": store}
    return {"totals": {"hits": hits}, "replicas": [{"replica": name} for name in replicas]}


def test_client_and_servers_are_compared() -> None:
    seen = {"device": 8, "host": 0, "peer": 0, "store": 2}
    same = compare_hits(seen, fleet(100, 10, "a"), fleet(108, 12, "a"))
    assert (same["agree"], same["hit_rate"]["device"]) == (True, 0.8)
    more = compare_hits(seen, fleet(100, 10, "a"), fleet(120, 12, "a"))
    assert not more["agree"]
    assert "other clients" in more["why"]
    replaced = compare_hits(seen, fleet(100, 10, "a"), fleet(3, 1, "b"))
    assert "came or went" in replaced["why"]


def test_a_run_is_drawn(tmp_path: Path) -> None:
    outcomes = [
        Outcome("a", n / 10, 0.01 * (n % 7 + 1), 200, "ok", tier=("device", "store")[n % 2])
        for n in range(50)
    ]
    outcomes.append(Outcome("a", 5, 1.0, 503, "overloaded"))
    path = tmp_path / "run.png"
    plot_run(outcomes, path, "a run")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000
