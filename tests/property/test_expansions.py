"""What is small and becomes large, on every route of both planes: the loop goes on, memory is bounded, no 5xx.

A count, not a time: about a minute in CI. As long as one likes: ``scripts/fuzz --requests 10000``.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import random
from collections.abc import Iterator

import pytest

from ..contract.planes import MODEL
from . import body_bombs
from .body_bombs import LIMIT, Body
from .coding_bombs import aligned_gzip
from .fuzz_run import Bounds, Planes, RouteResult, baseline, judged, run_one, run_route
from .hostile import Maker, Request
from .image_bombs import app1_segments, exif_of_one_value, good_image, profiles
from .watch import Reply, Watch, send

EACH = int(os.environ.get("FLATSHARE_FUZZ_EACH", "16"))
"""Requests a route that only looks; the routes that read a body of a tenant's get ten times as many."""

SEED = int(os.environ.get("FLATSHARE_FUZZ_SEED", "1"))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what it thinks of such files


@pytest.fixture(scope="module")
def planes() -> Iterator[Planes]:
    with Planes.made() as made:
        yield made


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatshare.api.identity.REFUSAL_S", 0.0)


@pytest.mark.parametrize("name", ["data", "control"])
@pytest.mark.timeout(300 + 10 * EACH)
async def test_nothing_that_expands_takes_a_plane(planes: Planes, name: str) -> None:
    watch, findings, statuses = Watch(), [], set()
    bounds = await baseline(planes.data, Bounds(), watch)
    for plane, route in [one for one in planes.all() if one[0].name == name]:
        reads = name == "data" and route[0] == "POST"
        result = await run_route(
            planes, plane, route, range(EACH * (10 if reads else 1)), seed=SEED, bounds=bounds, watch=watch
        )
        assert result.requests, route
        findings += result.findings
        statuses |= result.statuses.keys()
    assert not findings, "\n".join(f"{one.what}\n    number {one.number}: {one.request}" for one in findings)
    assert statuses >= {200, 400, 404, 413}, "much of it is almost right"


# -- what was found once


def classify(content: bytes, kind: str, *headers: tuple[str, str]) -> Request:
    return Request("POST", "/classify", (("content-type", kind), *headers), content)


def predict(
    content: bytes, *headers: tuple[str, str], path: str = "/predict", kind: str = "application/json"
) -> Request:
    return Request("POST", path, (("content-type", kind), *headers), content)


def npy(shape: str, fortran: bool, data: bytes) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + data


OIP = (
    b'{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 28, 28], "data": ['
    + b"0," * 783
    + b"0]}]}"
)
FOUND: dict[str, Request] = {
    "EXIF: 700 tags that share 500 kB": classify(exif_of_one_value(800, 500_000), "image/jpeg"),
    "EXIF in 20,000 pieces": classify(app1_segments(20_000, 10), "image/jpeg"),
    "PNG: 300 profiles of a megabyte": classify(profiles(300), "image/png"),
    "npy: 70 dimensions": predict(npy("(" + "1," * 70 + ")", True, b"\0" * 4), kind="application/x-npy"),
    "npy: zero times huge": predict(
        npy("(0, 2147483647, 2147483647, 2147483647, 2147483647)", True, b""), kind="application/x-npy"
    ),
    "OIP: a length of 4,400 zeros": predict(
        OIP, ("inference-header-content-length", "0" * 4400 + str(len(OIP))), path="/v2/models/acme/infer"
    ),
    "OIP: a version of 5,000 digits": predict(OIP, path=f"/v2/models/acme/versions/{'1' * 5000}/infer"),
    "OIP: a ref with a version of 5,000 digits": predict(OIP, path=f"/v2/models/acme@{'1' * 5000}/infer"),
    "JSON: a megabyte of empty lists": predict(b'{"image": [' + b"[]," * 330_000 + b"[]]}"),
    "JSON: a megabyte of lists in lists": predict(b'{"image": [' + b"[[]]," * 190_000 + b"[]]}"),
    "OIP: a megabyte of empty lists": predict(
        b'{"inputs": [' + b"[]," * 330_000 + b"[]]}", path="/v2/models/acme/infer"
    ),
    "stream: a line of a megabyte of empty lists": predict(
        b'{"image": [' + b"[]," * 330_000 + b"[]]}", path="/predict/stream", kind="application/x-ndjson"
    ),
}


@pytest.mark.parametrize("name", FOUND)
async def test_what_was_found_once_stays_mended(planes: Planes, name: str) -> None:
    request, plane, watch = FOUND[name], planes.data, Watch()
    request = Request(
        request.method,
        request.path,
        (*request.headers, ("x-api-key", plane.key), (MODEL, "acme")),
        request.body,
    )
    bounds = await baseline(plane, Bounds(), watch)
    result = RouteResult((request.method, request.path))
    await run_one(plane, request, bounds, watch, result)
    assert not result.findings, result.findings


async def test_a_compressed_body_is_never_read_as_it_is(planes: Planes) -> None:
    """It is unpacked, or refused by the name of its coding: its own bytes are no pixels."""
    plane = planes.data
    flat = bytes(range(256)) * 3 + bytes(16)
    for path in ("/classify", "/predict", "/"):
        for coding, content in (
            ("gzip", aligned_gzip(flat, 784)),
            ("x-unknown", flat),
            ("gzip", gzip.compress(flat)),
        ):
            headers = (
                ("x-api-key", plane.key),
                (MODEL, "acme"),
                ("content-type", "application/octet-stream"),
            )
            plain = await send(plane.app, Request("POST", path, headers, flat))
            reply = await send(
                plane.app, Request("POST", path, (*headers, ("content-encoding", coding)), content)
            )
            assert plain.status == 200
            assert reply.status == 415 or (coding == "gzip" and reply.body == plain.body), (
                path,
                coding,
                reply,
            )


# -- the watch itself


async def _slow(scope: object, receive: object, answer: object) -> None:
    import time

    time.sleep(0.05)  # noqa: ASYNC251  # it is what must be seen
    await answer({"type": "http.response.start", "status": 204, "headers": []})  # type: ignore[operator]
    await answer({"type": "http.response.body"})  # type: ignore[operator]


async def _large(scope: object, receive: object, answer: object) -> None:
    held = bytearray(os.urandom(1)) * 30_000_000
    await asyncio.sleep(0)
    del held
    await answer({"type": "http.response.start", "status": 204, "headers": []})  # type: ignore[operator]
    await answer({"type": "http.response.body"})  # type: ignore[operator]


async def _failing(scope: object, receive: object, answer: object) -> None:
    raise RecursionError("too deep")


async def test_the_watch_sees_a_loop_that_is_held_memory_that_is_taken_and_what_is_raised(
    planes: Planes,
) -> None:
    """Else the tests above could not fail."""
    watch, bounds = Watch(), Bounds(lag_s=0.04, peak_bytes=25_000_000)
    for app, said in ((_slow, "held the loop"), (_large, "at its peak"), (_failing, "raised RecursionError")):
        plane = planes.control.__class__("x", app, "", [], [])
        result = RouteResult(("GET", "/"))
        await run_one(plane, Request("GET", "/"), bounds, watch, result)
        assert any(said in one.what for one in result.findings), (said, result)


def test_a_reply_that_breaks_a_rule_is_judged_so() -> None:
    request = Request("GET", "/")
    good = b'{"error": {"code": "bad_input", "message": "no"}}'
    for status, headers, body, wrong in (
        (200, {}, b"{}", False), (400, {}, good, False), (404, {}, b"<html>", True), (500, {}, good, True),
        (503, {}, good, True), (503, {"retry-after": "1"}, good, False), (504, {}, good, False), (501, {}, good, True),
        (200, {}, b"my-secret", True), (200, {}, b"Traceback", True), (0, {}, b"", True),
        (400, {}, good.replace(b"no", b"x" * 700), True), (400, {}, good.replace(b"no", b"\\n"), True),
    ):  # fmt: skip
        assert bool(list(judged(request, Reply(status, headers, bytearray(body)), ["my-secret"]))) is wrong, (
            status,
            body,
        )


def test_the_same_seed_makes_the_same_requests_and_none_is_much_larger_than_the_limit() -> None:
    routes = [
        ("POST", "/classify"),
        ("POST", "/predict"),
        ("POST", "/v2/models/{ref}/infer"),
        ("PUT", "/tenants/{tenant}/quotas"),
    ]
    for route in routes:
        one, other = (Maker(3, "k") for _ in range(2))
        made = [one.request(route) for _ in range(40)]
        assert made == [other.request(route) for _ in range(40)]
        assert max(len(request.body) for request in made) < 6 * LIMIT
        assert len({request.body for request in made}) > 10


def test_each_kind_of_body_is_made() -> None:
    for kind in (body_bombs.image, body_bombs.multipart, body_bombs.json_rows, body_bombs.lines, body_bombs.npy,
                 body_bombs.octets, body_bombs.oip):  # fmt: skip
        made: list[Body] = [kind(random.Random(seed)) for seed in range(30)]
        assert len({body.content for body in made}) > 2, kind
    assert good_image() in {body_bombs.image(random.Random(seed)).content for seed in range(60)}
