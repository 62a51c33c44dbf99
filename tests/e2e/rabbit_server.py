"""A RabbitMQ of its own for a test: the machine's, in a folder of its own, on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu.connection import Connection

from flatshare_registry.testing.ports import free_ports

SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""The script itself: what is on the path runs it as the user ``rabbitmq``."""

WANTED = bool(os.environ.get("FLATSHARE_TEST_RABBITMQ"))
"""Read here: a test does not see the environment of who runs it."""


class RabbitServer:
    """One that keeps its queues in a folder, and can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.port, dist, names = free_ports(3)
        self.url = f"amqp://guest@127.0.0.1:{self.port}//"
        self.password_file = folder / "password"
        self.password_file.write_text("guest")
        (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n")
        self._environment = {
            **os.environ, "HOME": str(folder), "RABBITMQ_NODENAME": f"flatshare{self.port}@localhost",
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"), "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"), "RABBITMQ_DIST_PORT": str(dist),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"), "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(names),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1",
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        # Erlang's directory of names: one that it starts itself would outlive it.
        self.names = subprocess.Popen(["epmd"], env=self._environment)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen(
            [SERVER], env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                with Connection(self.url.replace("guest@", "guest:guest@"), connect_timeout=1) as connection:
                    connection.connect()
                return
            except Exception:  # amqp has a dozen kinds
                assert time.monotonic() < deadline and self._process.poll() is None, "RabbitMQ does not start"
                time.sleep(0.2)  # readiness shows only by asking

    def kill(self) -> None:
        """SIGKILL of it and of what it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)


@contextlib.contextmanager
def rabbit_server(folder: Path) -> Iterator[RabbitServer]:
    """Running within the block."""
    if not WANTED:
        pytest.skip("FLATSHARE_TEST_RABBITMQ=1 runs this, with Debian's rabbitmq-server: two minutes more")
    if not SERVER.exists() or shutil.which("erl") is None:
        pytest.skip("no rabbitmq-server here: apt-get install rabbitmq-server")
    server = RabbitServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        server.names.kill()
        server.names.wait(10)
