"""The comparison: same models, same S3, same client, same capacity; contenders take turns, alone on the machine.

Each turn starts a contender and measures, one after the other: answers (checked), one hot tenant, 64
images a request as raw bytes, one image a request beside clients that send 64, Zipf(1.0) over 100 tenants,
and the first request to models that nobody has asked for. The figure of a contender is the median of its
turns. The client shares the machine's cores with the contender, which costs the faster one more. Long,
because one turn's measurements are read together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import psutil
import torch
import uvloop
from contenders import CONTENDERS, Capacity, Contender, litserve_python
from safetensors.torch import save

from flatshare.bench.load import Load, run_load, send_all
from flatshare.bench.report import summarise
from flatshare.bench.workload import BenchRequest, zipf_shares
from flatshare.cli.context import credentials
from flatshare.cli.output import err, out, print_table, progress_bar
from flatshare.mnist.digits import load_digits
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare_registry import Registry, TenantId, layout
from flatshare_registry.settings import RegistrySettings
from flatshare_registry.testing.s3_server import CREDENTIALS

warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # TorchScript is what the contenders load

NETWORK = architecture("mnist-cnn")
BATCH = 64
TOUCHED_BYTES = 2 * 1024**3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the results as a document")
    parser.add_argument("--turns", type=int, default=3, help="turns of each contender (the median counts)")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement in a turn")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    parser.add_argument("--tenants", type=int, default=100, help="tenants of the Zipf mix")
    parser.add_argument("--cold", type=int, default=20, help="cold models asked for in each turn")
    parser.add_argument("--slots", type=int, default=10)
    parser.add_argument(
        "--warm-up", type=float, default=12, help="seconds of the Zipf mix before it is measured"
    )
    parser.add_argument("--only", choices=sorted(CONTENDERS), action="append", help="only these (repeatable)")
    arguments = parser.parse_args()
    names = [name for name in CONTENDERS if not arguments.only or name in arguments.only]
    if "litserve" in names:
        litserve_python()

    os.environ |= CREDENTIALS
    with s3_server() as endpoint:
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        os.environ["FLATSHARE_STORE"] = "s3://models/flatshare"
        models = Models(arguments.tenants, arguments.cold * arguments.turns)
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        bare: list[float] = []
        for turn in range(arguments.turns):
            bare.append(bare_forward(models.rows, arguments.seconds / 2))
            for name in names:
                measured = one_turn(CONTENDERS[name], models, turn, arguments)
                turns[name].append(measured)
                err.print(
                    f"turn {turn + 1}/{arguments.turns} {name}: "
                    + ", ".join(f"{key} {value:.4g}" for key, value in measured.items()),
                    soft_wrap=True,
                )
    document = results(turns, bare, arguments)
    show(document)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(document, indent=2))
    bad = any(one["errors"] or one["wrong_answers"] for rows in turns.values() for one in rows)
    return 1 if bad else 0


class Models:
    """Tenants with random weights, in the store in both forms, and what they rightly answer."""

    def __init__(self, tenants: int, cold: int) -> None:
        self.pixels = load_digits().test_images[: 4 * BATCH]
        self.rows = NETWORK.preprocess(self.pixels)
        self.tenants = [f"tenant-{number:03}" for number in range(tenants)]
        self.cold = [f"cold-{number:03}" for number in range(cold)]
        self.expected: dict[str, list[int]] = {}
        registry = Registry(RegistrySettings().open_store(), actor="bench-pool")
        s3 = boto3.client("s3")
        everybody = [*self.tenants, *self.cold]
        with progress_bar("models") as progress:
            for seed, tenant in enumerate(everybody):
                torch.manual_seed(seed)
                module = NETWORK.build()
                registry.create_tenant(TenantId(tenant))
                registry.register(
                    TenantId(tenant), save(dict(module.state_dict())), NETWORK.name, NETWORK.tensors,
                    probe=lambda weights: probe_logits(NETWORK, weights),
                )  # fmt: skip
                # The expert converted once: the same file under a name of its own.
                key = f"safetensors/{tenant}.safetensors"
                s3.put_object(Bucket="models", Key=key, Body=save(dict(module.state_dict())))
                script = io.BytesIO()
                with torch.inference_mode():
                    torch.jit.save(torch.jit.script(module), script)
                    labels = module(torch.from_numpy(self.rows)).argmax(dim=1).tolist()
                s3.put_object(Bucket="models", Key=f"torchscript/{tenant}/model.pt", Body=script.getvalue())
                self.expected[tenant] = labels
                progress(seed + 1, len(everybody))
        self.digest = registry.version(TenantId(self.cold[0]), 1).digest

    def single(self, contender: Contender, tenant: str, index: int) -> BenchRequest:
        expected = (self.expected[tenant][index],)
        return contender.json_shot(tenant, self.rows[index : index + 1], expected)

    def batch(self, contender: Contender, tenant: str, start: int) -> BenchRequest:
        expected = tuple(self.expected[tenant][start : start + BATCH])
        return contender.binary_shot(tenant, self.pixels[start : start + BATCH], expected)


def one_turn(
    contender: Contender, models: Models, turn: int, arguments: argparse.Namespace
) -> dict[str, float]:
    hot = models.tenants[0]
    singles = [models.single(contender, hot, index) for index in range(BATCH)]
    batches = [models.batch(contender, hot, start) for start in range(0, 4 * BATCH, BATCH)]
    mix = zipf_shots(contender, models, turn)
    reports: list[dict[str, Any]] = []

    def run(url: str, shots: Iterator[BenchRequest], **load: Any) -> dict[str, Any]:
        report = summarise(run_load(url, shots, Load(**load, headers=shown(url))))
        reports.append(report)
        return report

    timed = {"duration_s": arguments.seconds, "concurrency": arguments.concurrency}
    with contender.start(Capacity(2, arguments.slots)) as url:
        run(url, iter([*singles, *batches]), requests=BATCH + 4, concurrency=4)
        run(url, itertools.cycle(singles), duration_s=2, concurrency=arguments.concurrency)  # warm up
        hot_report = run(url, itertools.cycle(singles), **timed)
        run(url, itertools.cycle(batches), duration_s=2, concurrency=arguments.concurrency)
        batch_report = run(url, itertools.cycle(batches), **timed)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            beside = runner.run(beside_large_ones(url, contender, models, arguments.seconds))
        reports += beside.values()
        run(url, mix, duration_s=arguments.warm_up, concurrency=arguments.concurrency)
        zipf_report = run(url, mix, **timed)
        touch_memory()
        cold = measure_cold(url, contender, models, turn, arguments.cold)
    return {
        "hot_rps": hot_report["requests_per_s"],
        "hot_ms_p50": hot_report["latency_ms"]["p50"],
        "hot_ms_p99": hot_report["latency_ms"]["p99"],
        "zipf_rps": zipf_report["requests_per_s"],
        "zipf_ms_p99": zipf_report["latency_ms"]["p99"],
        "zipf_device_hits": zipf_report.get("hit_rate", {}).get("device", 0.0),
        "batch64_images_per_s": batch_report["requests_per_s"] * BATCH,
        "beside64_rps": beside["ones"]["requests_per_s"],
        "beside64_ms_p50": beside["ones"]["latency_ms"]["p50"],
        "beside64_ms_p99": beside["ones"]["latency_ms"]["p99"],
        "beside64_images_per_s": beside["large"]["requests_per_s"] * BATCH,
        **cold,
        "errors": sum(one["errors"] for one in reports),
        "wrong_answers": sum(one["wrong_answers"] for one in reports) + cold["cold_wrong"],
    }


async def beside_large_ones(
    url: str, contender: Contender, models: Models, seconds: float
) -> dict[str, dict[str, Any]]:
    """One image a request of eight tenants, one in flight each, beside two clients of another that send 64."""
    small = [models.single(contender, tenant, index) for index in range(16) for tenant in models.tenants[1:9]]
    large = [models.batch(contender, models.tenants[0], start) for start in range(0, 4 * BATCH, BATCH)]
    headers = shown(url)
    await send_all(url, iter(small), Load(requests=len(small), concurrency=8, headers=headers))  # loaded
    ones, others = await asyncio.gather(
        send_all(url, itertools.cycle(small), Load(duration_s=seconds, concurrency=8, headers=headers)),
        send_all(url, itertools.cycle(large), Load(duration_s=seconds, concurrency=2, headers=headers)),
    )
    return {"ones": summarise(ones), "large": summarise(others)}


def touch_memory() -> None:
    """Use memory and give it back: then a virtual machine has it, and need not ask its host for it.

    Seen on one: a page that the host had yet to give cost 11 microseconds instead of 0.3, so 4.8 MB of a model
    that nobody has asked for cost 13 ms instead of 2, whoever loaded it.
    """
    size = min(TOUCHED_BYTES, psutil.virtual_memory().available // 4)
    with mmap.mmap(-1, size) as memory:
        for start in range(0, size, mmap.PAGESIZE):
            memory[start] = 1


def shown(url: str) -> dict[str, str]:
    """The key that flatshare wants to see; the others ask for none."""
    return credentials(url)


def zipf_shots(contender: Contender, models: Models, seed: int) -> Iterator[BenchRequest]:
    """Endless: tenants by Zipf(1.0), each with a few images of its own that are encoded once."""
    random = np.random.default_rng(seed)
    shares = zipf_shares(len(models.tenants), 1.0)
    kept: dict[tuple[int, int], BenchRequest] = {}
    while True:
        for tenant, index in zip(
            random.choice(len(shares), size=4096, p=shares).tolist(),
            random.integers(0, 16, size=4096).tolist(),
            strict=True,
        ):
            if (tenant, index) not in kept:
                kept[tenant, index] = models.single(contender, models.tenants[tenant], index)
            yield kept[tenant, index]


def measure_cold(url: str, contender: Contender, models: Models, turn: int, count: int) -> dict[str, float]:
    """First requests to models that nobody has asked for, one at a time; by turns with what they must cost.

    Each tenant is announced first where the contender has a way to be told (flatshare register does it).
    """
    s3 = boto3.client("s3")
    key = f"flatshare/{layout.blob_key(models.digest)}"
    module = NETWORK.build().to(memory_format=torch.channels_last)
    row = torch.from_numpy(models.rows[:1])
    cold: list[float] = []
    gets: list[float] = []
    forwards: list[float] = []
    wrong = 0
    base = url.removesuffix("/predict") if url.endswith("/predict") else None
    with httpx.Client(timeout=60, headers=shown(url)) as client:
        for tenant in models.cold[turn * count : (turn + 1) * count]:
            if base is not None:
                client.post(f"{base}/admin/tenants/{tenant}/refresh").raise_for_status()
            shot = models.single(contender, tenant, 0)
            headers = {"serve_multiplexed_model_id": tenant, "content-type": shot.content_type}
            started = time.perf_counter()
            reply = client.post(url, content=shot.body, headers=headers)
            cold.append(time.perf_counter() - started)
            wrong += reply.json().get("predicted_label") != list(shot.expected or ())
            started = time.perf_counter()
            s3.get_object(Bucket="models", Key=key)["Body"].read()
            gets.append(time.perf_counter() - started)
            with torch.inference_mode():
                module(row)
                started = time.perf_counter()
                module(row)
                forwards.append(time.perf_counter() - started)
    return {
        "cold_ms_p50": 1000 * statistics.median(cold),
        "s3_get_ms_p50": 1000 * statistics.median(gets),
        "forward_ms_p50": 1000 * statistics.median(forwards),
        "cold_wrong": wrong,
    }


BARE = """
import sys, time, torch
from flatshare.models.architecture import architecture
torch.set_num_threads(1)
module = architecture("mnist-cnn").build().to(memory_format=torch.channels_last)
rows = torch.rand(64, 1, 28, 28)
with torch.inference_mode():
    for _ in range(10):
        module(rows)
    print("ready", flush=True)
    sys.stdin.readline()
    started, passes = time.perf_counter(), 0
    while time.perf_counter() - started < float(sys.argv[1]):
        module(rows)
        passes += 1
print(passes * 64 / (time.perf_counter() - started), flush=True)
"""


def bare_forward(rows: np.ndarray, seconds: float) -> float:
    """Images a second that the cores can do with nothing around the forward pass: one process a core."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", BARE, str(seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(os.cpu_count() or 1)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    total = 0.0
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        total += float(worker.communicate(timeout=60)[0])
    return total


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


def results(
    turns: dict[str, list[dict[str, float]]], bare: list[float], arguments: argparse.Namespace
) -> dict[str, Any]:
    sums = ("errors", "wrong_answers")
    contenders = {
        name: {
            **{key: statistics.median(one[key] for one in rows) for key in rows[0] if key != "cold_wrong"},
            **{key: sum(one[key] for one in rows) for key in sums},
            "turns": rows,
        }
        for name, rows in turns.items()
    }
    ours = contenders.get("flatshare", next(iter(contenders.values())))
    versions = {name: version(name) for name in ("flatshare", "ray", "torch", "fastapi", "uvicorn", "numpy")}
    if "litserve" in turns:
        script = "from importlib.metadata import version; print(version('litserve'))"
        found = subprocess.run(
            [str(litserve_python()), "-c", script], capture_output=True, text=True, check=True
        )
        versions["litserve"] = found.stdout.strip()
    bare_rate = statistics.median(bare)
    floor_ms = ours["s3_get_ms_p50"] + ours["forward_ms_p50"]
    ratios: dict[str, float] = {
        "batch64_of_bare": ours["batch64_images_per_s"] / bare_rate,
        "cold_of_get_and_forward": ours["cold_ms_p50"] / floor_ms,
        "zipf_of_hot": ours["zipf_rps"] / ours["hot_rps"],
    }
    for name in contenders:
        if name != "flatshare":
            ratios[f"hot_of_{name}"] = ours["hot_rps"] / contenders[name]["hot_rps"]
            ratios[f"zipf_of_{name}"] = ours["zipf_rps"] / contenders[name]["zipf_rps"]
    return {
        "contenders": contenders,
        "bare_forward_images_per_s": bare_rate,
        "s3_get_ms_p50": ours["s3_get_ms_p50"],
        "forward_ms_p50": ours["forward_ms_p50"],
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "load": {
            **vars(arguments),
            "json": None,
            "images_hot": 1,
            "client": "flatshare.bench.client on the same cores",
        },
        "versions": versions,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):  # words: ok
                return line.partition(":")[2].strip()
    return platform.processor()


def show(document: dict[str, Any]) -> None:
    print_table(
        "",
        [
            "contender",
            "hot req/s#",
            "p99 ms#",
            "Zipf req/s#",
            "p99 ms#",
            "64 images: images/s#",
            "ones beside 64s: p99 ms#",
            "cold ms p50#",
            "errors#",
            "wrong#",
        ],
        [
            (
                name,
                f"{one['hot_rps']:.0f}",
                f"{one['hot_ms_p99']:.1f}",
                f"{one['zipf_rps']:.0f}",
                f"{one['zipf_ms_p99']:.1f}",
                f"{one['batch64_images_per_s']:.0f}",
                f"{one['beside64_ms_p99']:.1f}",
                f"{one['cold_ms_p50']:.1f}",
                int(one["errors"]),
                int(one["wrong_answers"]),
            )
            for name, one in document["contenders"].items()
        ],
    )
    out.print(
        f"bare forward pass, all cores: {document['bare_forward_images_per_s']:.0f} images/s; "
        f"one S3 GET of a model {document['s3_get_ms_p50']:.1f} ms, one forward pass {document['forward_ms_p50']:.2f} ms",
        soft_wrap=True,
    )
    out.print(", ".join(f"{name} {value:.2f}" for name, value in document["ratios"].items()), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
