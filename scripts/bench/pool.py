"""The comparison: same models, same S3, same client, same capacity; contenders take turns, alone on the machine.

Each turn starts a contender, checks its answers, warms it up, measures one hot tenant, and ends it.
The figure of a contender is the median of its turns. The client shares the machine's cores with the
contender, which costs the faster one more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import torch
from safetensors.torch import save

from flatshare.bench.load import Load, send_all
from flatshare.bench.report import summarise
from flatshare.bench.workload import Shot, encode_json
from flatshare.cli.output import err, out, print_table
from flatshare.models.architecture import architecture
from flatshare.training.mnist import load_digits
from flatshare_registry import Registry, TenantId
from flatshare_registry.settings import RegistrySettings
from flatshare_registry.testing.s3_server import CREDENTIALS

HERE = Path(__file__).parent
NETWORK = architecture("mnist-cnn")
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 180
TENANT = "tenant-000"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the results as a document")
    parser.add_argument("--turns", type=int, default=3, help="turns of each contender (the median counts)")
    parser.add_argument("--seconds", type=float, default=10, help="of measuring in each turn")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--slots", type=int, default=10)
    arguments = parser.parse_args()

    os.environ |= CREDENTIALS
    with s3_server() as endpoint:
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        os.environ["FLATSHARE_STORE"] = "s3://models/flatshare"
        shots = prepare_models()
        turns: dict[str, list[dict[str, Any]]] = {"stock": [], "flatshare": []}
        for turn, name in itertools.product(range(arguments.turns), turns):
            with CONTENDERS[name](arguments) as url:
                check_answers(url, shots)
                run(url, shots, Load(duration_s=2, concurrency=arguments.concurrency))  # warm up
                measured = run(
                    url, shots, Load(duration_s=arguments.seconds, concurrency=arguments.concurrency)
                )
            turns[name].append(measured)
            err.print(
                f"turn {turn + 1}/{arguments.turns} {name}: {measured['requests_per_s']:.0f} requests/s, "
                f"p50 {measured['latency_ms']['p50']:.1f} ms, {measured['errors']} errors, "
                f"{measured['wrong_answers']} wrong"
            )
    document = results(turns, arguments)
    show(document)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(document, indent=2))
    bad = any(one["errors"] or one["wrong_answers"] for rows in turns.values() for one in rows)
    return 1 if bad else 0


def prepare_models() -> list[Shot]:
    """One model in both forms, and requests whose right answers are worked out here."""
    torch.manual_seed(0)
    module = NETWORK.build()
    weights = save(dict(module.state_dict()))
    registry = Registry(RegistrySettings().open_store(), actor="bench-pool")
    registry.create_tenant(TenantId(TENANT))
    registry.register(TenantId(TENANT), weights, NETWORK.name, NETWORK.tensors)
    script = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.script(module), script)
    boto3.client("s3").put_object(
        Bucket="models", Key=f"torchscript/{TENANT}/model.pt", Body=script.getvalue()
    )
    rows = NETWORK.preprocess(load_digits().test_images[:64])
    with torch.inference_mode():
        labels = module(torch.from_numpy(rows)).argmax(dim=1).numpy()
    return [Shot(TENANT, encode_json(rows[i : i + 1]), (int(labels[i]),)) for i in range(len(rows))]


def run(url: str, shots: list[Shot], load: Load) -> dict[str, Any]:
    return summarise(asyncio.run(send_all(url, itertools.cycle(shots), load)))


def check_answers(url: str, shots: list[Shot]) -> None:
    summary = run(url, shots, Load(requests=len(shots), concurrency=4))
    if summary["errors"] or summary["wrong_answers"]:
        raise SystemExit(f"{url} does not answer rightly: {summary}")


@contextlib.contextmanager
def stock(arguments: argparse.Namespace) -> Iterator[str]:
    """Ray's docs' example, Ray's default settings."""
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")},
        "STOCK_SLOTS": str(arguments.slots),
        "STOCK_REPLICAS": str(arguments.replicas),
        "PYTHONPATH": str(HERE / "stock"),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, str(HERE / "stock" / "serve_stock.py"), str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip() == "ready":
                break
        else:
            raise SystemExit("the stock contender did not start")
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.stdin.close()
        process.wait(START_TIMEOUT_S)


@contextlib.contextmanager
def flatshare(arguments: argparse.Namespace) -> Iterator[str]:
    """This project, as ``flatshare up`` starts it."""
    port = free_port()
    command = [
        str(BIN / "flatshare"), "up", "--detach", "--ray", "local", "--port", str(port),
        "--serve-port", str(free_port()), "--replicas", str(arguments.replicas), "--slots", str(arguments.slots),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=START_TIMEOUT_S)
    try:
        yield f"http://127.0.0.1:{port}/predict"
    finally:
        down = [str(BIN / "flatshare"), "down", "--port", str(port)]
        subprocess.run(down, check=True, stdout=subprocess.DEVNULL, timeout=START_TIMEOUT_S)


CONTENDERS = {"stock": stock, "flatshare": flatshare}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    command = [sys.executable, "-m", "flatshare_registry.testing.s3_server", "--bucket", "models"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def results(turns: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    def median(rows: list[dict[str, Any]], key: str) -> float:
        return statistics.median(one[key] for one in rows)

    contenders = {
        name: {
            "hot_rps": median(rows, "requests_per_s"),
            "hot_rps_turns": [one["requests_per_s"] for one in rows],
            "hot_ms_p50": statistics.median(one["latency_ms"]["p50"] for one in rows),
            "hot_ms_p99": statistics.median(one["latency_ms"]["p99"] for one in rows),
            "errors": sum(one["errors"] for one in rows),
            "wrong_answers": sum(one["wrong_answers"] for one in rows),
        }
        for name, rows in turns.items()
    }
    return {
        "contenders": contenders,
        "hot_ratio": round(contenders["flatshare"]["hot_rps"] / contenders["stock"]["hot_rps"], 2),
        "load": {
            **vars(arguments),
            "json": None,
            "images_per_request": 1,
            "client": "aiohttp, on the same cores",
        },
        "versions": {
            name: version(name) for name in ("flatshare", "ray", "torch", "fastapi", "aiohttp", "numpy")
        },
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def show(document: dict[str, Any]) -> None:
    print_table(
        "",
        ["contender", "hot requests/s#", "turns", "p50 ms#", "p99 ms#", "errors#", "wrong#"],
        [
            (
                name,
                f"{one['hot_rps']:.0f}",
                ", ".join(f"{value:.0f}" for value in one["hot_rps_turns"]),
                f"{one['hot_ms_p50']:.1f}",
                f"{one['hot_ms_p99']:.1f}",
                one["errors"],
                one["wrong_answers"],
            )
            for name, one in document["contenders"].items()
        ],
    )
    out.print(f"flatshare / stock: {document['hot_ratio']:.1f}")


if __name__ == "__main__":
    sys.exit(main())
