"""Traces of a real platform at a real receiver of OTLP (``scripts/traces.py``): each kind of request is one."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from .conftest import MODEL, Platform, end, random_rows, start

ROOT = Path(__file__).parents[2]
CALLER = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")

HANDLE_CLIENT = """
import sys
import numpy as np
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
from flatshare.pool.handle import pool_handle
call = pool_handle().options(multiplexed_model_id="t0").predict
call.remote({"image": np.load(sys.argv[2])}, traceparent=sys.argv[3]).result(timeout_s=60)
"""

Found = list[dict[str, Any]]


class Receiver:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts/traces.py"), "--port", "0", "--json", "--quiet-s", "2.5"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.url = self.process.stderr.readline().split()[-1]
        self._traces: queue.Queue[Found] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._traces.put(json.loads(line))

    def trace(self, *names: str) -> Found:
        """The next trace that has these spans; what comes of it meanwhile is shown again, whole."""
        while True:
            found = self._traces.get(timeout=60)
            if set(names) <= {one["name"] for one in found}:
                return found

    def nothing(self, within_s: float) -> None:
        with pytest.raises(queue.Empty):
            self._traces.get(timeout=within_s)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.process.terminate()
    made.process.wait(10)


@pytest.fixture(scope="module")
def platform(
    tmp_path_factory: pytest.TempPathFactory, s3_url_e2e: str, receiver: Receiver
) -> Iterator[Platform]:
    running = start(
        tmp_path_factory.mktemp("state"), s3_url_e2e, "traces", "--replicas", "1", "--slots", "3",
        FLATSHARE_TRACES=receiver.url, FLATSHARE_TRACE_RATIO="1", FLATSHARE_TASKS="embedded",
        FLATSHARE_PIPELINES=json.dumps({"images": {"cpus_per_replica": 0.1}}), FLATSHARE_CPUS_PER_REPLICA="0.5",
    )  # fmt: skip
    for number in range(3):
        running.add(f"t{number}", 700 + number)
    yield running
    end(running)


def shape(found: Found) -> set[tuple[str, str]]:
    """Each span and what it is part of. One trace, of which nothing is missing."""
    (_,) = {one["trace_id"] for one in found}
    names = {one["span_id"]: one["name"] for one in found}
    return {(one["name"], names.get(one["parent_id"], "")) for one in found}


COLD = {
    ("edge", ""), ("request", "edge"), ("resolve", "request"), ("wait", "request"), ("load", "wait"),
    ("fetch", "load"), ("store GetObject", "fetch"), ("verify", "fetch"), ("build", "load"),
    ("probe", "load"), ("pass", "request"), ("encode", "request"),
}  # fmt: skip


def test_a_cold_request_from_the_edge_to_the_store(platform: Platform, receiver: Receiver) -> None:
    reply = platform.predict("t0", random_rows(1))
    assert reply.status_code == 200
    found = receiver.trace("edge", "request", "load")
    assert shape(found) >= COLD
    by_name = {one["name"]: one for one in found}
    assert by_name["edge"]["service"] == "flatshare.edge"
    assert by_name["request"]["service"] == "flatshare.replica"
    assert by_name["load"]["attributes"] == {"flatshare.version": "t0@1", "flatshare.tier": "store"}
    for name in ("edge", "request"):
        assert by_name[name]["attributes"]["flatshare.request_id"] == reply.headers["x-request-id"]
    assert platform.admin_key not in json.dumps(found)


def test_a_warm_request_joins_its_callers_trace(platform: Platform, receiver: Receiver) -> None:
    headers = {MODEL: "t0", "traceparent": f"00-{CALLER[0]}-{CALLER[1]}-00"}
    platform.http.post(
        f"{platform.url}/predict", json={"image": random_rows(1).tolist()}, headers=headers
    ).raise_for_status()
    found = receiver.trace("edge", "request", "pass")
    names = ("edge", "request", "resolve", "decode", "wait", "pass", "encode")
    assert sorted(one["name"] for one in found) == sorted(names)
    assert {(one["trace_id"], one["parent_id"]) for one in found if one["name"] == "edge"} == {CALLER}


def test_a_stream(platform: Platform, receiver: Receiver) -> None:
    body = f"{json.dumps({'image': random_rows(1).tolist()})}\n" * 3
    reply = platform.http.post(f"{platform.url}/predict/stream", content=body, headers={MODEL: "t1"})
    assert len(reply.text.splitlines()) == 3
    found = receiver.trace("edge", "request", "line")
    assert shape(found) >= {("edge", ""), ("request", "edge"), ("pass", "line"), ("load", "wait")}
    assert [one["name"] for one in found].count("line") == 3


def test_a_pipeline(platform: Platform, receiver: Receiver) -> None:
    pixels = np.zeros((1, 28, 28), np.uint8).tolist()
    reply = platform.http.post(
        f"{platform.url}/pipelines/images", json={"image": pixels}, headers={MODEL: "t2"}
    )
    assert reply.status_code == 200, reply.text
    found = receiver.trace("edge", "request", "step", "pass")
    assert {one["service"] for one in found} == {"flatshare.edge", "flatshare.replica", "flatshare.step"}
    assert {("edge", ""), ("request", "edge"), ("pass", "request")} <= shape(found)
    assert ("step", "") not in shape(found)


def test_a_task(platform: Platform, receiver: Receiver) -> None:
    taken = platform.http.post(
        f"{platform.url}/tasks", json={"image": random_rows(1).tolist()}, headers={MODEL: "t0"}
    )
    assert taken.status_code == 202
    found = receiver.trace("edge", "task", "pass")
    known = shape(found)
    assert {("edge", ""), ("request", "edge"), ("request", "task"), ("pass", "request")} <= known
    assert ("task", "") not in known
    assert {one["service"] for one in found} == {"flatshare.edge", "flatshare.replica", "flatshare.consumer"}


def test_a_handle_call(platform: Platform, receiver: Receiver, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", random_rows(2))
    state = json.loads(
        next(Path(platform.environment["XDG_STATE_HOME"]).rglob("platform-*.json")).read_text()
    )
    span = "00f067aa0ba902b7"
    done = subprocess.run(
        [
            sys.executable, "-c", HANDLE_CLIENT, state["ray_address"], str(tmp_path / "rows.npy"),
            f"00-{'4' * 32}-{span}-01",
        ],
        env={
            **platform.environment, "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{platform.environment['XDG_STATE_HOME']}/flatshare/ray.token",
        },
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = receiver.trace("request", "pass")
    assert {one["trace_id"] for one in found} == {"4" * 32}
    assert shape(found) >= {("request", ""), ("resolve", "request"), ("wait", "request"), ("pass", "request")}


def test_the_control_plane_is_not_traced(platform: Platform, receiver: Receiver) -> None:
    headers = {**platform.admin, "traceparent": f"00-{CALLER[0]}-{CALLER[1]}-01"}
    httpx.get(f"{platform.url}/admin/replicas", headers=headers).raise_for_status()
    receiver.nothing(within_s=4)


def test_a_trace_as_text() -> None:
    """What ``scripts/traces`` prints, of spans as they come."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from traces import Span, tree
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    spans = [
        Span(
            "t", "a", "", "edge", "flatshare.edge", 0, 5_000_000, False, {"http.response.status_code": "503"}
        ),
        Span("t", "b", "a", "request", "flatshare.replica", 1_000_000, 4_000_000, True, {}),
    ]
    shown = re.sub(" +", " ", tree(spans)).splitlines()
    assert shown == ["trace t", "edge 5.00 ms at 0.00 edge 503", " request 3.00 ms at 1.00 replica FAILED"]
