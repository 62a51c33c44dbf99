"""A Redis of its own for a test: the machine's, or Debian's package unpacked into a folder."""

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
import redis

from flatshare_registry.testing.ports import free_ports

PACKAGES = (
    "redis-server", "redis-tools", "libatomic1", "liblzf1", "libjemalloc2", "liblua5.1-0", "lua-cjson",
    "lua-bitop", "libhiredis0.14",
)  # fmt: skip


class RedisServer:
    """One that keeps what it was told in a file, and can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._binary, self._environment = _found(folder)
        (self.port,) = free_ports(1)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen(
            [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder),
             "--appendonly", "yes", "--appendfsync", "always", "--save", ""],
            env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while True:
            try:
                redis.Redis(port=self.port, socket_timeout=1).ping()
                return
            except redis.RedisError:
                assert time.monotonic() < deadline and self._process.poll() is None, (
                    "redis-server does not start"
                )
                time.sleep(0.05)  # readiness shows only by asking

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait(10)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """Running within the block."""
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _found(folder: Path) -> tuple[str, dict[str, str]]:
    for name in ("redis-server", "valkey-server"):
        if (path := shutil.which(name)) is not None:
            return path, dict(os.environ)
    packages = folder / "packages"
    packages.mkdir()
    got = subprocess.run(["apt-get", "download", *PACKAGES], cwd=packages, capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"no redis-server here, and Debian's package can't be had: {got.stderr.strip()[-200:]}")
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, packages], check=True)
    libraries = next(packages.glob("usr/lib/*-linux-gnu"))
    return str(packages / "usr/bin/redis-server"), {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
