"""``pool/ray_metrics.py`` against Ray's own pipeline: a head whose agent tells Prometheus what it was told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from flatshare_registry.testing.ports import free_ports

DRIVER = """
import asyncio, sys
import ray
from tests.unit.flatshare.snapshots import replica
from flatshare.pool.ray_metrics import tell_ray

ray.init(sys.argv[1], log_to_driver=False)
one, rounds = replica("r1"), 0

async def snapshot():
    global rounds
    rounds += 1
    if rounds == 2:
        raise RuntimeError("the device does not say what it has")  # this once
    if rounds == 3:  # it has counted more since
        one.requests.statuses[200] += 10
        print("told", flush=True)
    return one

asyncio.run(tell_ray(snapshot, every_s=0.2))
"""


@pytest.fixture
def head() -> Iterator[tuple[str, Path]]:
    """A head on loopback, whose agent therefore listens there alone."""
    gcs, agent, client = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as folder:
        environment = {
            **os.environ,
            "RAY_enable_metrics_collection": "1",
            "RAY_metrics_report_interval_ms": "1000",
        }
        started = subprocess.Popen(
            [
                Path(sys.executable).parent / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
                f"--port={gcs}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
                "--include-dashboard=false", "--object-store-memory=100000000", "--num-cpus=1",
                "--disable-usage-stats", f"--temp-dir={folder}/ray",
            ],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            yield f"127.0.0.1:{gcs}", Path(folder) / "ray"
        finally:
            family = [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]
            started.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(family, timeout=10)
            for one in alive:
                one.kill()


def test_ray_has_the_counters_and_what_was_counted_since(head: tuple[str, Path]) -> None:
    address, folder = head
    deadline = time.monotonic() + 90
    while not (found := list(folder.glob("session_latest/metrics_export_port_*"))):
        assert time.monotonic() < deadline
        time.sleep(0.2)  # its agent is there when it has written its port
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, address], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None and driver.stdout.readline() == "told\n"
        wanted = {
            'ray_flatshare_requests_total{': ('status="200"', 18),
            'ray_flatshare_request_errors_total{': ('code="over_quota"', 3),
            'ray_flatshare_leases_total{': ('tier="store"', 2),
            'ray_flatshare_loads_total{': ('result="failed"', 1),
            'ray_flatshare_evictions_total{': ("", 3),
        }  # fmt: skip
        while wanted:
            assert time.monotonic() < deadline and driver.poll() is None, wanted
            page = httpx.get(f"http://127.0.0.1:{found[0].read_text().strip()}/metrics", trust_env=False).text
            for line in page.splitlines():
                name = line.partition("{")[0] + "{"
                if name in wanted and wanted[name][0] in line and float(line.split()[-1]) == wanted[name][1]:
                    del wanted[name]
            time.sleep(0.5)  # Ray's agent hears of it by its own clock
    finally:
        driver.kill()
        driver.wait(10)
