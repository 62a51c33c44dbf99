"""What it costs to be seen: one hot tenant, one image as JSON, with and without the access log and traces.

Each variant is a platform of its own, in turns. Requests/s drift with the machine, so a variant is compared
with the plain one of the same turn; CPU a request, of replicas and edge, drifts less. What is always on, the
counters, is timed alone by ``scripts/bench-parts``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from contenders import CONTENDERS, Capacity
from parts import one_tenant, under_load

from flatshare.bench.workload import BenchRequest, encode_json
from flatshare.cli.output import out, print_table
from flatshare_registry.testing.ports import free_ports

KEYS = ("requests_per_s", "cpu_ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the results as a document")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="of each load")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--trace-ratio", default="0.01", help="part of the requests that is sampled")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, receiver() as collector:
        one_tenant(folder)
        request = BenchRequest(
            "acme", encode_json(np.random.default_rng(0).random((1, 1, 28, 28), dtype=np.float32))
        )
        log = {"FLATSHARE_ACCESS_LOG": f"{folder}/access.log"}
        traces = {"FLATSHARE_TRACES": collector, "FLATSHARE_TRACE_RATIO": arguments.trace_ratio}
        variants = {"plain": {}, "access log": log, "traces": traces, "both": log | traces}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        for turn in range(arguments.turns):
            names = list(variants)
            for name in (
                *names[turn % len(names) :],
                *names[: turn % len(names)],
            ):  # none is always the first
                settings = variants[name]
                os.environ.update(settings)
                with CONTENDERS["flatshare"].start(Capacity(2, 10)) as url:
                    measured = under_load(url, request, arguments)
                for variable in settings:
                    del os.environ[variable]
                cpu_ms = measured["replicas"] + measured["edge (HAProxy)"]
                found[name].append({"requests_per_s": measured["requests_per_s"], "cpu_ms": cpu_ms})
                out.print(
                    f"turn {turn + 1}/{arguments.turns} {name}: {measured['requests_per_s']:.0f} requests/s, "
                    f"{cpu_ms:.3f} ms of CPU a request"
                )
    rows = {name: summary(turns, found["plain"]) for name, turns in found.items()}
    print_table(
        "medians; what is compared is compared within a turn",
        ["", "requests/s#", "of plain#", "CPU a request, ms#", "of plain#"],
        [
            (name, f"{one['requests_per_s']:.0f}", f"{one['requests_per_s_of_plain']:.3f}",
             f"{one['cpu_ms']:.3f}", f"{one['cpu_ms_of_plain']:.3f}")
            for name, one in rows.items()
        ],
    )  # fmt: skip
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"turns": found, "medians": rows}, indent=2))
        out.print(f"written to {arguments.json}")
    return 0


def summary(turns: list[dict[str, float]], plain: list[dict[str, float]]) -> dict[str, float]:
    medians = {key: statistics.median(one[key] for one in turns) for key in KEYS}
    ratios = {
        f"{key}_of_plain": statistics.median(
            one[key] / base[key] for one, base in zip(turns, plain, strict=True)
        )
        for key in KEYS
    }
    return medians | ratios


@contextmanager
def receiver() -> Iterator[str]:
    """``scripts/traces`` in a process of its own, which shares the cores; its address."""
    (port,) = free_ports(1)
    script = Path(__file__).parents[1] / "traces.py"
    running = subprocess.Popen(
        [sys.executable, script, "--port", str(port), "--json"], stdout=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.post(f"{url}/nothing", content=b"")
                break
            except httpx.TransportError:
                if running.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("scripts/traces did not start") from None
                time.sleep(0.05)  # readiness shows only by asking
        yield url
    finally:
        running.terminate()
        running.wait(10)


if __name__ == "__main__":
    sys.exit(main())
