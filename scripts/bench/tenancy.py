"""What identity and quotas cost on the hot path: two platforms, one with authentication off and one with it on.

Both run all the time and are asked in short turns, one after the other, so that a machine whose speed drifts is
as fast for the one as for the other. With it on, the tenant shows a key of its own and has a limit of every
kind, none of them reached; with it off there is neither. One hot tenant, one image a request; the figure is
the median of the turns' ratios. It still scatters by more than 5 % from one start of the platforms to the next,
so what decides is CPU time in one process: a replica's own work, called as Serve calls it, in turns of 128 requests,
as a share of what the cores have for one request of the whole platform.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Capacity
from safetensors.torch import save

from flatshare.api.app import create_app
from flatshare.api.identity import Identities, OperatorKeys, Role
from flatshare.bench.load import Load, run_load
from flatshare.bench.report import summarise
from flatshare.bench.workload import BenchRequest, encode_json
from flatshare.cli.context import credentials
from flatshare.cli.output import err, out, print_table
from flatshare.mnist.digits import load_digits
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare.replica.build import Replica
from flatshare.settings import Settings
from flatshare_registry import Quotas, Registry, TenantId
from flatshare_registry.keys import new_key
from flatshare_registry.settings import RegistrySettings

NETWORK = architecture("mnist-cnn")
ACME, FREE = TenantId("acme"), TenantId("free")
LIMITS = Quotas(
    requests_per_s=1e6, burst=10**6, concurrent_requests=10**4, rows_per_request=64, body_bytes=10**6,
    cold_loads_per_min=1000, resident_bytes=10**9, resident_floor_bytes=10**6,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the results as a document")
    parser.add_argument("--turns", type=int, default=16, help="turns of each (the median counts)")
    parser.add_argument("--seconds", type=float, default=2.5, help="of each measurement")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument(
        "--most",
        type=float,
        default=0.05,
        help="exit with 1 when it costs more than this share in one process",
    )
    arguments = parser.parse_args()
    rps: dict[str, list[float]] = {"off": [], "on": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FLATSHARE_STORE"] = f"file://{folder}/store"
        os.environ["XDG_STATE_HOME"] = f"{folder}/state"
        registry = Registry(RegistrySettings().open_store(), actor="bench-tenancy")
        torch.manual_seed(1)
        module = NETWORK.build()
        for tenant in (ACME, FREE):
            registry.create_tenant(tenant)
            registry.register(
                tenant, save(dict(module.state_dict())), NETWORK.name, NETWORK.tensors,
                probe=lambda weights: probe_logits(NETWORK, weights),
            )  # fmt: skip
        registry.tenancy.set_quotas(ACME, LIMITS)
        key = registry.tenancy.create_key(ACME).text
        with contextlib.ExitStack() as running:
            sides: dict[str, Callable[[float], float]] = {}
            for mode, tenant in (("off", FREE), ("on", ACME)):
                os.environ["FLATSHARE_AUTH"] = mode
                url = running.enter_context(CONTENDERS["flatshare"].start(Capacity(2, 10)))
                headers = {"x-api-key": key} if mode == "on" else credentials(url)
                load = {"concurrency": arguments.concurrency, "headers": headers}
                sides[mode] = functools.partial(requests_per_s, url, digits(module, tenant), load)
                sides[mode](3.0)  # warm up
            for turn in range(arguments.turns):
                # off, on, on, off, off, on ...: neither is always the second.
                for mode in ("off", "on") if turn % 2 == 0 else ("on", "off"):
                    rps[mode].append(sides[mode](arguments.seconds))
                err.print(
                    f"turn {turn + 1}/{arguments.turns}: off {rps['off'][-1]:.0f}, on {rps['on'][-1]:.0f}"
                )
        off_us, on_us = asyncio.run(in_one_process(registry, key, digits(module, ACME)[0].body))
    ratios = [on / off for on, off in zip(rps["on"], rps["off"], strict=True)]
    cost = 1 - statistics.median(ratios)
    print_table(
        "", ["auth", "requests/s (median)#", "turns"],
        [(mode, f"{statistics.median(found):.0f}", " ".join(f"{one:.0f}" for one in found)) for mode, found in rps.items()],
    )  # fmt: skip
    out.print(
        f"identity and quotas cost {cost:.1%} of requests per second (at most {arguments.most:.0%} wanted)"
    )
    request_us = 1e6 * (os.cpu_count() or 1) / statistics.median(rps["off"])
    share = (on_us - off_us) / request_us
    out.print(
        f"in one process, without Serve and the edge: {off_us:.0f} and {on_us:.0f} microseconds of CPU a request; "
        f"the difference is {share:.1%} of the {request_us:.0f} that the cores have for a request of the platform's",
        soft_wrap=True,
    )
    if arguments.json:
        document = {
            "requests_per_s": rps, "ratios": ratios, "cost": cost, "in_one_process_us": {"off": off_us, "on": on_us},
            "share_of_request": share, "cores": os.cpu_count(),
        }  # fmt: skip
        Path(arguments.json).write_text(json.dumps(document, indent=2))
    return 1 if share > arguments.most else 0


async def in_one_process(registry: Registry, key: str, body: bytes, turns: int = 60) -> tuple[float, float]:
    """Microseconds of a request with neither and with both, all of a replica's own work in one process.

    The data plane as a replica runs it, called as Serve calls it, in turns of a tenth of a second: what drifts is the
    same for both. Without Serve, the edge and a network the request is shorter, so the share is an upper bound.
    """
    spent: dict[str, list[float]] = {"off": [], "on": []}
    replica = Replica.build(Settings(slots=4, view_ttl_s=60, host_dir="off"), registry.store)

    def plane(operators: OperatorKeys | None) -> Callable[..., Awaitable[None]]:
        return create_app(
            replica.service,
            Identities(replica.heads, operators),
            replica="r",
            max_body_bytes=10**6,
            max_rows=64,
        )

    sides = {
        "off": (plane(None), [(b"serve_multiplexed_model_id", b"free")]),
        "on": (
            plane(OperatorKeys.of({Role.ADMIN: new_key("ADMIN").text})),
            [(b"serve_multiplexed_model_id", b"acme"), (b"x-api-key", key.encode())],
        ),
    }

    async def ask(mode: str, count: int) -> None:
        app, headers = sides[mode]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict",
            "query_string": b"",
            "headers": headers,
        }
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        for _ in range(count):
            await app(scope, receive, send)
        assert statuses == [200] * count

    for turn in range(-4, turns):
        for mode in ("off", "on") if turn % 2 == 0 else ("on", "off"):
            began = time.process_time()
            await asyncio.gather(*(ask(mode, 16) for _ in range(8)))
            if turn >= 0:
                spent[mode].append((time.process_time() - began) / 128 * 1e6)
    await replica.close()
    return statistics.median(spent["off"]), statistics.median(spent["on"])


def requests_per_s(url: str, shots: list[BenchRequest], load: dict[str, Any], seconds: float) -> float:
    """Of one burst; every answer must be there, and right."""
    report = summarise(run_load(url, itertools.cycle(shots), Load(duration_s=seconds, **load)))
    assert not report["errors"], report["errors_by_code"]
    assert not report["wrong_answers"]
    found: float = report["requests_per_s"]
    return found


def digits(module: torch.nn.Module, tenant: str) -> list[BenchRequest]:
    rows = NETWORK.preprocess(load_digits().test_images[:64])
    with torch.inference_mode():
        labels = module(torch.from_numpy(rows)).argmax(dim=1).tolist()
    return [
        BenchRequest(tenant, encode_json(rows[index : index + 1]), (label,))
        for index, label in enumerate(labels)
    ]


if __name__ == "__main__":
    sys.exit(main())
