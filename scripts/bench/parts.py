"""Where the CPU of a request goes, by part: what the processes used under load, and each part timed alone.

One hot tenant, one image as JSON a request. "Under load" is the CPU of each process by the operating system's
accounts, divided by the requests; a route that ends at our first line (an unknown tenant) tells what Ray
Serve and uvicorn take. "Alone" is one part in a loop on one core with nothing beside it, so the parts add up
to less than the whole: under load the cores share caches, and threads wake each other.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from contenders import CONTENDERS, Capacity
from safetensors.torch import save

from flatshare.api.http import PlainResponse
from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.bench.load import Load, run_load
from flatshare.bench.workload import BenchRequest, encode_json
from flatshare.cli.context import credentials
from flatshare.cli.output import out, print_table
from flatshare.codecs.payload import decode_json
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare.replica.build import Replica
from flatshare.replica.ticket import Prediction
from flatshare.settings import Settings
from flatshare.weights.tiers import Tier
from flatshare_registry import Registry, TenantId
from flatshare_registry.ids import ModelRef
from flatshare_registry.settings import RegistrySettings

NETWORK = architecture("mnist-cnn")
ACME = TenantId("acme")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the results as a document")
    parser.add_argument("--seconds", type=float, default=6, help="of each load")
    parser.add_argument("--concurrency", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        registry = one_tenant(folder)
        rows = np.random.default_rng(0).random((1, 1, 28, 28), dtype=np.float32)
        alone = asyncio.run(parts_alone(registry, rows))
        with CONTENDERS["flatshare"].start(Capacity(2, 10)) as url:
            known = under_load(url, BenchRequest("acme", encode_json(rows)), arguments)
            unknown = under_load(url, BenchRequest("nobody", encode_json(rows)), arguments)
    print_table(
        "", ["under load, ms of CPU a request", "one hot tenant#", "unknown tenant (404)#"],
        [(name, f"{known[name]:.3f}" if name != "requests_per_s" else f"{known[name]:.0f}",
          f"{unknown[name]:.3f}" if name != "requests_per_s" else f"{unknown[name]:.0f}") for name in known],
    )  # fmt: skip
    counting = alone["count an answer, and its status"] / 10 / (known["replicas"] + known["edge (HAProxy)"])
    out.print(f"what is counted of a request takes {counting:.2f} % of its CPU in replicas and edge")
    print_table(
        "", ["alone, on one core", "microseconds#"], [(name, f"{us:.0f}") for name, us in alone.items()]
    )
    if arguments.json:
        document = {
            "under_load_ms": known,
            "unknown_tenant_ms": unknown,
            "alone_us": alone,
            "counting_percent": counting,
            "cores": os.cpu_count(),
        }
        Path(arguments.json).write_text(json.dumps(document, indent=2))
        out.print(f"written to {arguments.json}")
    return 0


def one_tenant(folder: str) -> Registry:
    """A registry in a folder, which is the environment's from now on, with one tenant and its model."""
    os.environ["FLATSHARE_STORE"] = f"file://{folder}/store"
    os.environ["XDG_STATE_HOME"] = f"{folder}/state"
    registry = Registry(RegistrySettings().open_store(), actor="bench")
    registry.create_tenant(ACME)
    torch.manual_seed(1)
    registry.register(
        ACME, save(dict(NETWORK.build().state_dict())), NETWORK.name, NETWORK.tensors,
        probe=lambda weights: probe_logits(NETWORK, weights),
    )  # fmt: skip
    return registry


def under_load(url: str, shot: BenchRequest, arguments: argparse.Namespace) -> dict[str, float]:
    """CPU of each kind of process a request, in ms, and the requests per second."""
    load = {"concurrency": arguments.concurrency, "headers": credentials(url)}
    run_load(url, itertools.repeat(shot), Load(duration_s=2, **load))
    before = cpu_by_kind()
    began = time.perf_counter()
    outcomes = run_load(url, itertools.repeat(shot), Load(duration_s=arguments.seconds, **load))
    took_s = time.perf_counter() - began
    used = {kind: seconds - before.get(kind, 0.0) for kind, seconds in cpu_by_kind().items()}
    return {
        "requests_per_s": len(outcomes) / took_s,
        **{kind: 1000 * seconds / len(outcomes) for kind, seconds in used.items()},
    }


def cpu_by_kind() -> dict[str, float]:
    kinds = {"replicas": "ServeReplica:flatshare:", "edge (HAProxy)": "haproxy", "client": None}
    found = dict.fromkeys([*kinds, "rest of Ray"], 0.0)
    found["client"] = sum(psutil.Process().cpu_times()[:2])
    for process in psutil.process_iter(["cmdline", "name", "cpu_times"]):
        text = " ".join(process.info["cmdline"] or [process.info["name"] or ""])
        if process.info["cpu_times"] is None or process.pid == os.getpid():
            continue
        kind = next((kind for kind, part in kinds.items() if part and part in text), None)
        if kind is None and ("ray::" in text or "/ray/" in text):
            kind = "rest of Ray"
        if kind is not None:
            found[kind] += sum(process.info["cpu_times"][:2])
    return found


async def parts_alone(registry: Registry, rows: np.ndarray) -> dict[str, float]:
    """Microseconds of each part of a request in this process, one after the other."""
    torch.set_num_threads(1)  # as in a replica
    body = encode_json(rows)
    replica = Replica.build(Settings(slots=2, view_ttl_s=60, host_dir="off"), registry.store)
    service, loop = replica.service, asyncio.get_running_loop()
    ref = ModelRef.parse("acme")

    async def whole() -> None:
        with await service.enter(LOCAL_OPERATOR, ref) as ticket:
            await service.predict(ticket, lambda network: decode_json(body, network.input, 8))

    async def hot() -> None:
        answered: asyncio.Future[object] = loop.create_future()
        ticket = service.enter_now(LOCAL_OPERATOR, ref)
        assert ticket is not None
        with ticket:
            assert service.begin(
                ticket, lambda network: decode_json(body, network.input, 8), answered.set_result
            )
            await answered

    async def lease() -> None:
        version = replica.heads.resolve_now(ref)
        assert version is not None
        held = replica.cache.try_lease(version)
        assert held is not None
        held.release()

    await whole()
    record = await replica.heads.resolve(ref, 5)
    logits = np.zeros((1, 10), np.float32)

    def count() -> None:
        replica.usage.answered(
            record, Tier.DEVICE, 0.001, Prediction(logits, record, Tier.DEVICE).label_list(), 7000, 10
        )
        replica.usage.replied(200, "")

    held = replica.cache.try_lease(await replica.heads.resolve(ref, 5))
    assert held is not None
    many = torch.from_numpy(np.repeat(rows, 4, axis=0))
    found = {
        "parse: JSON to rows": await microseconds(lambda: decode_json(body, NETWORK.input, 8)),
        "resolve and lease": await microseconds(lease),
        "forward pass, a row of 4 together": await microseconds(lambda: forward(held.model, many)) / 4,
        "forward pass, a row alone": await microseconds(lambda: forward(held.model, many[:1])),
        "queue, thread and back, with its pass": await microseconds(
            lambda: replica.inference.run(held, rows)
        ),
        "all from the caller's identity to logits, as a task": await microseconds(whole),
        "the same as the door does it": await microseconds(hot),
        "count an answer, and its status": await microseconds(count),
        "encode: labels to a response": await microseconds(
            lambda: PlainResponse(
                b'{"predicted_label":[2]}', {"x-flatshare-version": "1"}, "application/json"
            )
        ),
    }
    held.release()
    await replica.close()
    return found


@torch.inference_mode()
def forward(model: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    return model(rows)


async def microseconds(part: Callable[[], object], seconds: float = 0.5) -> float:
    """Median over five runs of the time of one call."""
    runs: list[float] = []
    for _ in range(5):
        began, calls = time.perf_counter(), 0
        while time.perf_counter() - began < seconds / 5:
            done = part()
            if isinstance(done, Awaitable):
                await done
            calls += 1
        runs.append(1e6 * (time.perf_counter() - began) / calls)
    return sorted(runs)[2]


if __name__ == "__main__":
    sys.exit(main())
