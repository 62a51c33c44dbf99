"""``flatshare top``: one moment where nobody looks, and frames in a real terminal until Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flatshare.cli.main import app
from flatshare.cli.top_verb import LEVELS, frame, spark

from .conftest import ControlPlane


@pytest.fixture(autouse=True)
def viewer(control: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATSHARE_URL", control.url)
    monkeypatch.setenv("FLATSHARE_API_KEY", control.viewer_key)


def test_one_moment_where_nobody_looks() -> None:
    result = CliRunner().invoke(app, ["top"])
    assert result.exit_code == 0, result.output
    assert "r1" in result.output and "RUNNING" in result.output and "requests/s" in result.output
    lines = result.output.splitlines()
    head = next(line for line in lines if line.startswith("replica "))
    row = next(line for line in lines if line.startswith("r1 "))
    assert head.index("state") == row.index("RUNNING") and head.index("node") == row.index("127.0.0.1")
    document = json.loads(CliRunner().invoke(app, ["top", "--json"]).stdout)
    assert document["history"] == {"points": [], "tenants": []}


def test_a_terminal_shows_frames_until_ctrl_c_even_when_the_platform_goes_away(control: ControlPlane) -> None:
    reader, writer = pty.openpty()
    running = subprocess.Popen(
        [Path(sys.executable).parent / "flatshare", "top", "--every", "0.5"],
        stdin=writer, stdout=writer, stderr=writer, start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(writer)
    try:
        seen, deadline = b"", time.monotonic() + 30
        while seen.count(b"flatshare top,") < 3:
            assert time.monotonic() < deadline, seen
            if select.select([reader], [], [], 1)[0]:
                seen += os.read(reader, 65536)
        assert b"r1" in seen
        os.kill(running.pid, signal.SIGINT)
        assert running.wait(10) == 0
    finally:
        running.kill()
        running.wait()
        os.close(reader)


def test_a_spark_line_has_gaps_where_nothing_is_known() -> None:
    assert spark([]) == ""
    assert spark([None, 0.0, 0.5, 1.0]) == f" {LEVELS[1]}{LEVELS[4]}█"
    assert spark([0.0, 0.0]) == LEVELS[1] * 2


def test_frames_of_every_size_can_be_drawn() -> None:
    point = {"at": 1.0, "requests_per_s": 2.0, "device": None, "p50": None, "p99": 3.0}
    fleet = {"replicas": [], "not_answering": [{"replica": "r9", "state": "STARTING", "node_ip": "10.0.0.1"}]}
    drawn = frame(
        fleet, {"points": [point] * 100, "tenants": [{"tenant": "\x1b[31m", "requests_per_s": 1.0}]}, "gone"
    )  # type: ignore[arg-type,typeddict-item]
    assert drawn.renderables
