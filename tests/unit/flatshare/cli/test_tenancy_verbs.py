"""Tenants' verbs that talk to a platform: the test plays its control plane, over HTTP."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from typer.testing import CliRunner

from flatshare.cli import tenancy_verbs
from flatshare.cli.main import app

RECORD = {
    "id": "01J", "versions": [{"version": 1}], "store": {"kept_blobs": [], "removed_blobs": ["a"], "objects": 3},
    "replicas": [{"models": 1}], "nodes": [{"removed_tensors": ["x", "y"]}], "signature": {"public_key": "00"},
}  # fmt: skip
GOES_ON = {"since": 1.0, "step": "removing from the store: 1 of 2"}
OWES = {"error": {"code": "fleet_unavailable", "message": "no receipt from r2", "request_id": "r"}}


@contextmanager
def control_plane(*answers: tuple[int, Any]) -> Iterator[tuple[str, list[str]]]:
    """Gives these answers in their order; its address, and what it was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body = answers[len(asked)]
            asked.append(f"{self.command} {self.path}")
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenancy_verbs, "ERASE_AGAIN_S", 0.0)


def test_erase_waits_for_one_that_goes_on_and_asks_again_of_one_that_failed() -> None:
    with control_plane((202, GOES_ON), (503, OWES), (202, GOES_ON), (200, RECORD)) as (url, asked):
        done = CliRunner().invoke(app, ["tenants", "erase", "acme", "--yes", "--json", "--url", url])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == RECORD
    assert "not finished: no receipt from r2" in done.stderr
    assert asked == ["POST /admin/tenants/acme/erase"] * 4


def test_erase_gives_up_on_one_that_fails_again_and_again() -> None:
    failures = [(503, OWES)] * tenancy_verbs.ERASE_TRIES
    with control_plane(*failures) as (url, asked):
        done = CliRunner().invoke(app, ["tenants", "erase", "acme", "--yes", "--url", url])
    assert done.exit_code != 0
    assert len(asked) == tenancy_verbs.ERASE_TRIES
