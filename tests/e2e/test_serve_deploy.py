"""`serve deploy` of what `flatshare config` prints, on a cluster that `ray start` made; then an edge, and a request."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import ray

from flatshare_registry import Registry
from flatshare_registry.keys import new_key
from flatshare_registry.stores.open import open_store
from flatshare_registry.testing.ports import free_ports

from .conftest import FLATSHARE, Platform, random_rows

BIN = Path(sys.executable).parent


class Cluster:
    """A head of its own, with a token, and what the platform on it is told."""

    def __init__(self, folder: Path) -> None:
        port, serve_port, self.gcs, self.dashboard, agent, client = free_ports(6)
        self.folder = folder
        # Of a short name: Ray's sockets lie below it, and their names have an end.
        self.tmp = tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp")
        (Path(self.tmp.name) / "ray").mkdir()
        (folder / "token").touch(0o600)
        (folder / "token").write_text(secrets.token_hex(32))
        self.admin_key = folder / "state" / "flatshare" / "admin.key"
        self.admin_key.parent.mkdir(parents=True)
        self.admin_key.write_text(new_key("ADMIN").text + "\n")
        store = (folder / "store").as_uri()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("FLATSHARE_", "RAY_"))},
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_TMPDIR": self.tmp.name, "XDG_STATE_HOME": str(folder / "state"),
            "FLATSHARE_STORE": store, "FLATSHARE_PORT": str(port), "FLATSHARE_SERVE_PORT": str(serve_port),
            "FLATSHARE_ERASURE_KEY_FILE": str(folder / "erasure.key"), "FLATSHARE_HOST_DIR": str(folder / "tier"),
        }  # fmt: skip
        exports = self.run(FLATSHARE, "config", "--environment").splitlines()
        self.environment |= dict(line.removeprefix("export ").split("=", 1) for line in exports)
        self.platform = Platform(
            f"http://127.0.0.1:{port}", port, {**self.environment, "FLATSHARE_API_KEY": self.admin_key.read_text()},
            Registry(open_store(store), actor="e2e"),
        )  # fmt: skip
        self.head = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", f"--port={self.gcs}", "--num-cpus=4",
             "--object-store-memory=100000000", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
             f"--dashboard-port={self.dashboard}", f"--dashboard-agent-listen-port={agent}",
             f"--ray-client-server-port={client}", "--disable-usage-stats"],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=(folder / "head.log").open("w"),
        )  # fmt: skip

    def run(self, *command: str | Path, **more: str) -> str:
        done = subprocess.run(
            list(map(str, command)), env=self.environment | more, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deploy(self, **settings: str) -> None:
        """What `flatshare config` prints, as an operator would; returns when all of it runs."""
        text = self.run(FLATSHARE, "config", "--admin-key-file", self.admin_key, **settings)
        assert self.admin_key.read_text().strip() not in text
        file = self.folder / "serve.yaml"
        file.write_text(text)
        address = f"http://127.0.0.1:{self.dashboard}"
        deadline = time.monotonic() + 90
        while True:  # the dashboard comes some seconds after the head
            done = subprocess.run(
                [BIN / "serve", "deploy", file, "-a", address],
                env=self.environment,
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                break
            log = (self.folder / "head.log").read_text()
            assert time.monotonic() < deadline and self.head.poll() is None, log[-2000:] + done.stderr[-2000:]
        wanted = text.count("import_path")
        while (shown := self.run(BIN / "serve", "status", "-a", address)).count("status: RUNNING") < wanted:
            assert "DEPLOY_FAILED" not in shown and time.monotonic() < deadline, shown

    def replicas(self) -> set[int]:
        """Processes of Serve's replicas."""
        found = set()
        for one in psutil.Process(self.head.pid).children(recursive=True):
            try:
                if "ServeReplica:flatshare" in " ".join(one.cmdline()):
                    found.add(one.pid)
            except psutil.Error:
                pass  # it ended between two looks
        return found

    @contextmanager
    def edge(self) -> Iterator[None]:
        """`flatshare edge`, answering."""
        node = f"{ray.util.get_node_ip_address()}:{self.gcs}"  # type: ignore[no-untyped-call]
        edge = subprocess.Popen(
            [FLATSHARE, "edge", "--ray", node], env=self.environment, stdout=subprocess.DEVNULL,
            stderr=(self.folder / "edge.log").open("w"),
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    if self.platform.http.get(f"{self.platform.url}/admin/replicas").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                log = (self.folder / "edge.log").read_text()
                assert time.monotonic() < deadline and edge.poll() is None, log[-2000:]
                time.sleep(0.2)  # readiness shows only by asking
            yield
        finally:
            edge.send_signal(signal.SIGTERM)
            edge.wait(30)

    def end(self) -> None:
        family = [psutil.Process(self.head.pid), *psutil.Process(self.head.pid).children(recursive=True)]
        self.head.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=5)
        for one in alive:
            one.kill()
        self.head.wait(10)
        self.tmp.cleanup()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.end()


def test_what_config_prints_is_served_and_served_anew_with_other_settings(cluster: Cluster) -> None:
    cluster.deploy(FLATSHARE_SLOTS="3")
    before = cluster.replicas()
    assert len(before) == 3, "two of the pool, and the control plane"
    platform, rows = cluster.platform, random_rows(2)
    with cluster.edge():
        assert platform.http.get(f"{platform.url}/tenants").status_code in (401, 404)
        assert httpx.get(f"{platform.url}/admin/tenants").status_code == 401, "keys came from the file"
        platform.add("acme", 7)
        answer = platform.predict("acme", rows)
        assert answer.json() == {"predicted_label": platform.right("acme@1", rows)}
        cluster.deploy(FLATSHARE_SLOTS="4")
        deadline = time.monotonic() + 60
        while {one["slots"] for one in platform.fleet()["replicas"]} != {4} or cluster.replicas() & before:
            assert time.monotonic() < deadline, "every process was replaced"
            time.sleep(0.5)  # their end shows only by looking
        assert platform.predict("acme", rows).json() == answer.json()
