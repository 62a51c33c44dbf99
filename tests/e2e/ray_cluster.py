"""A Ray cluster of a test's own, as `ray start` makes it: a head, more nodes, a platform by `serve deploy`, edges."""

from __future__ import annotations

import contextlib
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
import ray

from flatshare_registry import Registry
from flatshare_registry.keys import new_key
from flatshare_registry.stores.open import open_store
from flatshare_registry.testing.ports import free_ports

from .conftest import FLATSHARE, Platform

BIN = Path(sys.executable).parent


class Cluster:
    """A head of its own, with a token, and what the platform on it is told."""

    def __init__(self, folder: Path, cpus: int = 4, **settings: str) -> None:
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
            **settings,
        }  # fmt: skip
        exports = self.run(FLATSHARE, "config", "--environment").splitlines()
        self.environment |= dict(line.removeprefix("export ").split("=", 1) for line in exports)
        self.platform = Platform(
            f"http://127.0.0.1:{port}", port, {**self.environment, "FLATSHARE_API_KEY": self.admin_key.read_text()},
            Registry(open_store(store), actor="e2e"),
        )  # fmt: skip
        self.head = self._start(
            "head", "--head", f"--port={self.gcs}", f"--num-cpus={cpus}", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        )  # fmt: skip
        self.nodes: list[subprocess.Popen[bytes]] = []

    def _start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [BIN / "ray", "start", "--block", "--object-store-memory=100000000", "--disable-usage-stats", *options],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=(self.folder / f"{name}.log").open("w"),
        )  # fmt: skip

    @property
    def address(self) -> str:
        """Of the head's GCS."""
        return f"{ray.util.get_node_ip_address()}:{self.gcs}"  # type: ignore[no-untyped-call]

    def add_node(self, ip: str, cpus: int) -> subprocess.Popen[bytes]:
        """Another node of this machine, at an address of loopback's."""
        (agent,) = free_ports(1)
        node = self._start(
            ip, f"--address={self.address}", f"--node-ip-address={ip}", f"--num-cpus={cpus}",
            f"--dashboard-agent-listen-port={agent}",
        )  # fmt: skip
        self.nodes.append(node)
        return node

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
        for one in (
            p for s in (self.head, *self.nodes) for p in psutil.Process(s.pid).children(recursive=True)
        ):
            try:
                if "ServeReplica:flatshare" in " ".join(one.cmdline()):
                    found.add(one.pid)
            except psutil.Error:
                pass  # it ended between two looks
        return found

    @contextmanager
    def edge(self) -> Iterator[None]:
        """`flatshare edge`, answering."""
        edge = subprocess.Popen(
            [FLATSHARE, "edge", "--ray", self.address], env=self.environment, stdout=subprocess.DEVNULL,
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
        for started in (*self.nodes, self.head):
            kill_family(started, signal.SIGTERM)
        self.tmp.cleanup()


def kill_family(started: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """End a node with all that runs on it; with SIGKILL as a power cut would."""
    if started.poll() is not None:
        return
    family = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
    for one in family if how is signal.SIGKILL else family[:1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(how)
    _, alive = psutil.wait_procs(family, timeout=5)
    for one in alive:
        one.kill()
    started.wait(10)
