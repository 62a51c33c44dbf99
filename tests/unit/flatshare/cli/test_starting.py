"""`up` before it is up: who asks for the end gets it at once, and nothing is left. No Ray is started here.

Each joins a "cluster" that takes connections and never says a word, as a stale address file may name.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flatshare.local.processes import wait_until_ended
from flatshare.local.state import PlatformState, known_states
from flatshare_registry.testing.ports import free_ports


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


class Starting:
    """An ``up`` that is still about to join a cluster."""

    def __init__(self, folder: Path, address: str, *options: str, ignored: tuple[int, ...] = ()) -> None:
        self.port, serve_port = free_ports(2)
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("FLATSHARE_", "RAY_"))
        }
        self.environment = {**clean, "FLATSHARE_HOST_DIR": "off", "RAY_TMPDIR": str(folder / "ray")}
        # Else Ray takes loopback for the machine's own address, where the server does not listen.
        self.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

        def ignore() -> None:
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "flatshare.cli.main", "up", "--store", (folder / "s").as_uri(), "--ray", address,
             "--port", str(self.port), "--serve-port", str(serve_port), *options],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ignore,
        )  # fmt: skip

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flatshare.cli.main", *arguments],
            env=self.environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def state(self) -> PlatformState:
        """What is written down while it starts, once it looks for the cluster; that look is made to last."""
        state = until(lambda: next((one for one in known_states() if probes(one.pid)), None))
        for one in probes(state.pid):
            one.suspend()
        return state


def until(look: Callable[[], PlatformState | None]) -> PlatformState:
    deadline = time.monotonic() + 30
    while (found := look()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)  # another process's file: nothing to await
    return found


def probes(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(pid).children()
        return [one for one in children if any("cluster_probe" in word for word in one.cmdline())]
    return []


@pytest.fixture(autouse=True)
def _state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_a_silent_cluster_is_one_line_in_seconds(tmp_path: Path, silent: str) -> None:
    began = time.monotonic()
    up = Starting(tmp_path, silent)
    _, err = up.process.communicate(timeout=60)
    assert up.process.returncode == 7
    assert "no answer within 10 s" in err
    assert silent in err
    assert "--ray local" in err
    assert "Traceback" not in err
    assert time.monotonic() - began < 55, "ten seconds, and what imports take on a busy machine"
    assert known_states() == []


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense", "127.0.0.1:port", "ray://127.0.0.1:9"])
def test_no_cluster_there_is_one_line(tmp_path: Path, address: str) -> None:
    up = Starting(tmp_path, address)
    _, err = up.process.communicate(timeout=60)
    assert up.process.returncode == 7, err
    assert address.removeprefix("ray://") in err
    assert "Traceback" not in err
    assert known_states() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_nothing(tmp_path: Path, silent: str, number: int) -> None:
    up = Starting(tmp_path, silent)
    state = up.state()
    assert state.phase == "starting"
    family = psutil.Process(state.pid).children(recursive=True)
    up.process.send_signal(number)
    out, err = up.process.communicate(timeout=20)
    assert up.process.returncode == 0, out + err
    assert wait_until_ended(family, 5) == []
    assert known_states() == []


def test_signals_that_nohup_ignores_stay_ignored(tmp_path: Path, silent: str) -> None:
    up = Starting(tmp_path, silent, ignored=(signal.SIGHUP, signal.SIGINT))
    state = up.state()
    for number in (signal.SIGHUP, signal.SIGINT):
        up.process.send_signal(number)
    blocked = Path(f"/proc/{state.pid}/status").read_text().split("SigIgn:")[1].split()[0]
    assert int(blocked, 16) & 1 << signal.SIGHUP - 1
    assert int(blocked, 16) & 1 << signal.SIGINT - 1
    assert probes(state.pid), "it goes on"
    up.process.send_signal(signal.SIGTERM)
    up.process.communicate(timeout=20)
    assert known_states() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_who_ends_a_detached_up_ends_what_it_started(tmp_path: Path, silent: str, number: int) -> None:
    up = Starting(tmp_path, silent, "--detach")
    state = up.state()
    assert state.pid != up.process.pid
    child = psutil.Process(state.pid)
    family = [child, *child.children(recursive=True)]
    up.process.send_signal(number)
    up.process.communicate(timeout=20)
    assert wait_until_ended(family, 10) == []
    assert known_states() == []


def test_down_and_status_find_it_and_a_second_up_is_refused(tmp_path: Path, silent: str) -> None:
    up = Starting(tmp_path, silent, "--detach")
    state = up.state()
    (row,) = json.loads(up.run("status", "--json").stdout)
    assert (row["pid"], row["phase"]) == (state.pid, "starting")
    again = up.run("up", "--store", "file:///s", "--port", str(up.port))
    assert again.returncode == 7
    assert f"flatshare down --port {up.port}" in again.stderr
    assert up.run("down").returncode == 0
    _, err = up.process.communicate(timeout=20)
    assert up.process.returncode == 7, "it is not up, and says so"
    assert "did not start" in err
    assert known_states() == []
