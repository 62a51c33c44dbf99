"""`down` and `status`: they find what runs here, starting or dead, and say what they found."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from flatshare.local.state import PlatformState, known_states
from flatshare_registry.testing.ports import free_ports


@pytest.fixture(autouse=True)
def _state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flatshare.cli.main", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@contextlib.contextmanager
def an_up(port: int, *, phase: str = "running") -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for ``up``: it is written down, and ends when it is told to."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    state = PlatformState(
        pid=process.pid, started_at=psutil.Process(process.pid).create_time(), url=f"http://127.0.0.1:{port}",
        port=port, edge="haproxy", store="file:///s", replicas=2, slots=3, log="", ray_address="", family=(),
    )  # fmt: skip
    replace(state, phase=phase).save()  # type: ignore[arg-type]  # a literal
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_down_ends_the_one_that_runs_here_whatever_its_port() -> None:
    (port,) = free_ports(1)
    with an_up(port) as process:
        done = run("down")
        assert done.returncode == 0, done.stderr
        assert f"port {port} is down" in done.stdout
        assert process.wait(10) != 0
    assert known_states() == []


def test_down_ends_one_that_is_starting() -> None:
    (port,) = free_ports(1)
    with an_up(port, phase="starting") as process:
        assert run("down").returncode == 0
        assert process.wait(10) != 0


def test_down_asks_which_of_several() -> None:
    ports = free_ports(2)
    with an_up(ports[0]) as first, an_up(ports[1]) as second:
        done = run("down")
        assert done.returncode == 7
        assert all(str(port) in done.stderr for port in ports)
        assert "--port" in done.stderr
        assert (first.poll(), second.poll()) == (None, None)
        assert run("down", "--port", str(ports[1])).returncode == 0
        assert second.wait(10) != 0
        assert first.poll() is None
        other = run("down", "--port", str(ports[1]))
        assert f"does not run on port {ports[1]}" in other.stdout
        assert str(ports[0]) in other.stdout
        assert run("down", FLATSHARE_PORT=str(ports[0])).returncode == 0
        assert first.wait(10) != 0


def test_down_clears_what_a_dead_one_left() -> None:
    (port,) = free_ports(1)
    with an_up(port) as process:
        process.kill()
        process.wait()
        assert "had died" in run("down").stdout
    assert known_states() == []
    assert "does not run here" in run("down").stdout


def test_a_wrong_setting_is_not_a_platform_that_does_not_answer() -> None:
    (port,) = free_ports(1)
    with an_up(port):
        done = run("status", FLATSHARE_SLOTS="abc")
    assert done.returncode == 2
    assert "slots" in done.stderr
    assert done.stdout == ""


def test_status_shows_one_that_is_starting() -> None:
    (port,) = free_ports(1)
    with an_up(port, phase="starting"):
        done = run("status", "--json")
        (row,) = json.loads(done.stdout)
        assert done.returncode == 3
        assert (row["phase"], row["answers"]) == ("starting", False)
        assert "starting" in run("status").stdout


@contextlib.contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    """Something that answers each request like this; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_platform_that_refuses_our_key_answers() -> None:
    body = b'{"error": {"code": "unauthenticated", "message": "no such key", "request_id": "1"}}'
    with answering(401, body) as port, an_up(port):
        done = run("status", FLATSHARE_API_KEY="fs_ADMIN.nope_nope")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "yes" in done.stdout
        assert "no such key" in done.stderr


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"replicas": [1]}'])
def test_what_is_not_flatshare_does_not_answer(body: bytes) -> None:
    with answering(200, body) as port, an_up(port):
        done = run("status")
        assert done.returncode == 3
        assert "Traceback" not in done.stderr


def test_they_need_neither_ray_nor_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'torch', 'fastapi'): sys.modules[name] = None\n"
        "from flatshare.cli.main import main\n"
        "main()"
    )
    for verb, says in (("status", "does not run here"), ("down", "does not run here")):
        done = subprocess.run([sys.executable, "-c", code, verb], capture_output=True, text=True, timeout=60)
        assert says in done.stdout, done.stderr


def test_a_file_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "flatshare").write_text("not a folder")
    done = run("up", "--store", (tmp_path / "s").as_uri(), FLATSHARE_HOST_DIR="off")
    assert done.returncode == 7
    assert str(tmp_path / "flatshare") in done.stderr
    assert "Traceback" not in done.stderr
