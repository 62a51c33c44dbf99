"""The real HAProxy writes one line of JSON for each request, whole, whatever is in it, and no key."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flatshare_registry.keys import new_key

from .test_haproxy import MODEL, Backend, Edge


@pytest.fixture
def backend() -> Iterator[Backend]:
    made = Backend(0)
    yield made
    made.close()


def lines(path: Path, count: int) -> list[dict[str, Any]]:
    """So many lines; HAProxy writes one after the answer."""
    deadline = time.monotonic() + 10
    while len(found := path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)  # nobody tells when a line is there
    assert len(found) == count
    return [json.loads(line) for line in found]


def test_each_request_has_one_line_and_no_key_is_in_it(tmp_path: Path, backend: Backend) -> None:
    path = tmp_path / "access.log"
    edge = Edge(tmp_path, log_file=path, access_log="stdout")
    edge.process.start(edge.config([backend]))
    key = new_key("acme")
    nasty = "a%22b%5c%0a%e2%82%ac%ff"
    with httpx.Client(headers={"user-agent": "x"}) as client:
        client.post(f"{edge.url}/predict?secret=1", headers={
            MODEL: "acme:canary", "x-api-key": key.text, "x-request-id": "req-1", "content-type": "x",
            "traceparent": "00-" + "a1" * 16 + "-" + "b2" * 8 + "-01",
        }, content=b"a body")  # fmt: skip
        client.post(f"{edge.url}/{nasty}", headers={MODEL: 'q"uo\\te', "authorization": "Bearer ey.J0.x_y"})
        client.post(f"{edge.url}/{'p' * 9000}", headers={MODEL: "m" * 3000, "traceparent": "zz"})
        client.request("BREW", f"{edge.url}/pot")
        for _ in range(20):  # on one connection
            client.get(f"{edge.url}/again")
    found = lines(path, 24)
    edge.process.stop()
    first, odd, long, refused = found[:4]
    assert (first["id"], first["method"], first["path"], first["model"]) == (
        "req-1",
        "POST",
        "/predict",
        "acme:canary",
    )
    assert (first["trace"], first["key"], first["status"]) == ("a1" * 16, key.id, 200)
    assert first["server"] == "p0" and first["bytes_out"] > 0 and abs(first["time"] - time.time()) < 60
    assert odd["path"].startswith("/a%22b%5c%0a") and odd["model"] == 'q"uo\\te' and odd["key"] == "-"
    assert len(long["path"]) == 1024 and len(long["model"]) == 256 and long["trace"] == "-"
    assert (refused["status"], refused["method"], refused["code"]) == (405, "BREW", "method_not_allowed")
    assert first["code"] == "-"
    text = path.read_text()
    assert (
        key.text not in text and key.text[-43:] not in text and "a body" not in text and "secret" not in text
    )
    assert "ey.J0" not in text


def test_lines_go_by_udp_where_that_is_asked(tmp_path: Path, backend: Backend) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taker:
        taker.bind(("127.0.0.1", 0))
        taker.settimeout(10)
        edge = Edge(tmp_path, access_log=f"udp@127.0.0.1:{taker.getsockname()[1]}")
        edge.process.start(edge.config([backend]))
        httpx.post(f"{edge.url}/predict", headers={MODEL: "acme"})
        found = json.loads(taker.recv(65536))
        edge.process.stop()
    assert (found["model"], found["status"]) == ("acme", 200)


def test_without_it_nothing_is_logged(tmp_path: Path, backend: Backend) -> None:
    edge = Edge(tmp_path)
    assert "log" not in edge.config([backend]).replace("dontlognull", "").split()
