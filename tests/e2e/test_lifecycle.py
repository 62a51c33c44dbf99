"""Up and down: clear refusals, Ctrl-C, a killed parent; nothing may stay behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flatshare_registry.testing.ports import free_ports

from .conftest import FLATSHARE, processes_of, start


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FLATSHARE_", "RAY_"))}
    clean["FLATSHARE_HOST_DIR"] = "off"
    return subprocess.run(
        [FLATSHARE, *arguments], env={**clean, **environment}, capture_output=True, text=True, timeout=180
    )


def gone(family: list[psutil.Process]) -> list[str]:
    """Names of those that did not end within a minute; they are killed.

    Ray's own agents notice the death of their raylet by asking now and then.
    """
    _, alive = psutil.wait_procs(family, timeout=60)
    names = []
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            if one.status() != psutil.STATUS_ZOMBIE:
                names.append(one.name())
                one.kill()
    return names


def test_a_taken_port_is_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = run("up", "--store", f"file://{tmp_path}/s", "--port", str(port), XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 7
    assert f"port {port} is taken" in done.stderr
    assert "--port" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0", "--auth", "off"], "not loopback"),
        (["--replicas", "0"], "replicas"),
        (["--device", "cuda"], "gpus_per_replica"),
        (["--gpus-per-replica", "1.5"], "runs on one GPU"),
        (["--edge", "nginx"], "edge"),
        (["--store", "ftp://x"], "not a store URL"),
        (["--store", "memory://x"], "memory://"),
        (["--port", "9000", "--serve-port", "9000"], "different ports"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(
    tmp_path: Path, options: list[str], says: str
) -> None:
    store = [] if "--store" in options else ["--store", f"file://{tmp_path}/s"]
    done = run("up", *store, *options, XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_no_store_is_a_clear_error(tmp_path: Path) -> None:
    done = run("up", XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 2
    assert "FLATSHARE_STORE" in done.stderr


def test_status_and_down_when_nothing_runs(tmp_path: Path) -> None:
    status = run("status", XDG_STATE_HOME=str(tmp_path))
    assert status.returncode == 3
    assert "does not run here" in status.stdout
    assert run("down", XDG_STATE_HOME=str(tmp_path)).returncode == 0


def test_ctrl_c_in_the_foreground_leaves_nothing(tmp_path: Path) -> None:
    port, serve_port = free_ports(2)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("FLATSHARE_", "RAY_"))},
        "XDG_STATE_HOME": str(tmp_path),
        "FLATSHARE_HOST_DIR": str(tmp_path / "host"),
    }
    up = subprocess.Popen(
        [FLATSHARE, "up", "--store", f"file://{tmp_path}/s", "--ray", "local", "--replicas", "1",
         "--port", str(port), "--serve-port", str(serve_port)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert up.stdout is not None
    for line in up.stdout:
        if "flatshare replicas" in line:  # the last line of the announcement
            break
    status = run("status", "--json", XDG_STATE_HOME=str(tmp_path))
    assert '"answers": true' in status.stdout
    family = [psutil.Process(up.pid), *psutil.Process(up.pid).children(recursive=True)]
    assert any("haproxy" in one.name() for one in family)
    os.killpg(up.pid, signal.SIGINT)  # what a terminal does: the whole group
    out, _ = up.communicate(timeout=90)
    assert up.returncode == 0
    assert "nothing was left behind" in out
    assert gone(family) == []
    assert list(tmp_path.rglob("platform-*.json")) == []


def test_a_killed_parent_takes_haproxy_and_ray_along(tmp_path: Path, s3_url_e2e: str) -> None:
    platform = start(tmp_path, s3_url_e2e, "orphans", "--replicas", "1")
    family = processes_of(platform)
    again = run("up", "--port", str(platform.port), "--store", "file:///tmp/x", XDG_STATE_HOME=str(tmp_path))
    assert again.returncode == 7
    assert "already runs" in again.stderr
    agents = {one.pid for one in family if "Agent" in one.name()}
    family[0].kill()
    # HAProxy, raylet, gcs_server and the replicas go at once; two agents of Ray's stay, and `down`,
    # which finds a dead platform, ends these.
    assert gone([one for one in family if one.pid not in agents]) == []
    status = run("status", XDG_STATE_HOME=str(tmp_path))
    assert status.returncode == 3
    down = run("down", "--port", str(platform.port), XDG_STATE_HOME=str(tmp_path))
    assert "had died" in down.stdout
    assert gone(family) == []
    with socket.create_server(("127.0.0.1", platform.port)):
        pass  # the port is free again


OTHER_RAY = """
import sys
import ray
ray.__version__ = "2.59.1"  # what a head node of that version says of itself
from ray.scripts.scripts import main
main()
"""


@pytest.fixture
def short_folder() -> Iterator[str]:
    """Ray's sockets have no room in a test's own folder."""
    with tempfile.TemporaryDirectory(prefix="fs-", ignore_cleanup_errors=True) as folder:
        yield folder


def test_a_cluster_of_another_ray_is_one_line(tmp_path: Path, short_folder: str) -> None:
    gcs_port, port, serve_port = free_ports(3)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("FLATSHARE_", "RAY_"))},
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": short_folder,
        "XDG_STATE_HOME": str(tmp_path),
        "FLATSHARE_HOST_DIR": "off",
    }
    before = {one.pid for one in psutil.process_iter()}
    subprocess.run(
        [sys.executable, "-c", OTHER_RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={gcs_port}",
         "--include-dashboard=false", "--num-cpus=1", "--object-store-memory=100000000"],
        env=environment, check=True, capture_output=True, timeout=90,
    )  # fmt: skip
    cluster = [one for one in psutil.process_iter() if one.pid not in before and short_folder in words(one)]
    assert cluster
    try:
        up = subprocess.run(
            [FLATSHARE, "up", "--ray", f"127.0.0.1:{gcs_port}", "--store", f"file://{tmp_path}/s",
             "--port", str(port), "--serve-port", str(serve_port)],
            env=environment, capture_output=True, text=True, timeout=90,
        )  # fmt: skip
        assert up.returncode == 7, up.stdout + up.stderr
        assert "2.59.1" in up.stderr
        assert "Version mismatch" in up.stderr
        assert "Traceback" not in up.stderr
        assert list(tmp_path.rglob("platform-*.json")) == []
    finally:
        for one in cluster:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def words(process: psutil.Process) -> str:
    """Its command line; empty when it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def test_on_somebody_elses_cluster_down_ends_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    gcs_port, port, serve_port = free_ports(3)
    bin_folder = Path(FLATSHARE).parent
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("FLATSHARE_", "RAY_"))},
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "XDG_STATE_HOME": str(tmp_path),
        "FLATSHARE_HOST_DIR": str(tmp_path / "host"),
    }
    before = {one.pid for one in psutil.process_iter()}
    subprocess.run(
        [str(bin_folder / "ray"), "start", "--head", "--node-ip-address=127.0.0.1", f"--port={gcs_port}",
         "--include-dashboard=false", "--num-cpus=4", "--object-store-memory=100000000"],
        env=environment, check=True, capture_output=True, timeout=90,
    )  # fmt: skip
    cluster = [one for one in psutil.process_iter(["name"]) if one.pid not in before]
    try:
        wanted = [FLATSHARE, "up", "--detach", "--ray", f"127.0.0.1:{gcs_port}", "--store", f"file://{tmp_path}/s",
                  "--replicas", "1", "--port", str(port), "--serve-port", str(serve_port)]  # fmt: skip
        opened = subprocess.run(
            [*wanted, "--host", "0.0.0.0"], env=environment, capture_output=True, text=True, timeout=150
        )
        assert opened.returncode == 7
        assert "asks callers for no token" in opened.stderr
        up = subprocess.run(wanted, env=environment, capture_output=True, text=True, timeout=150)
        assert up.returncode == 0, up.stderr
        log = (tmp_path / "flatshare" / f"up-{port}.log").read_text()
        assert "asks callers for no token" in log
        below = [child for one in cluster if one.is_running() for child in one.children(recursive=True)]
        replicas = [one for one in below if "ServeReplica:flatshare" in one.name()
                    or "ServeReplica:flatshare" in " ".join(one.cmdline()[:1])]  # fmt: skip
        assert replicas
        down = subprocess.run(
            [FLATSHARE, "down", "--port", str(port)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert down.returncode == 0, down.stderr
        assert gone(replicas) == []
        assert any("raylet" in one.name() for one in cluster if one.is_running()), "it was not ours to end"
    finally:
        for one in cluster:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in one.children(recursive=True):
                    child.kill()
                one.kill()
