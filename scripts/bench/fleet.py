"""The fleet as one cache: hit rates beside one LRU of all slots, homes through a kill, copies of a hot tenant.

Each part starts a platform of its own on loopback, with a registry in a folder (``--registry`` keeps it for the
next run) and clients that share the machine's cores. ``hits`` sends Zipf(1.0) requests, and replays the same trace
through one LRU of all slots, and through Ray's own multiplexing. ``kill`` ends one replica by SIGKILL under load and
compares every model's home before, without it, and after its replacement came. ``hot`` gives one tenant all the load
it can take beside 99 quiet ones. Ends with 1 when a request failed or was answered wrongly.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import psutil
import torch
from contenders import CONTENDERS, Capacity
from pool import s3_server
from safetensors.torch import save

from flatshare.bench.load import Load, Outcome, run_load
from flatshare.bench.workload import BenchRequest, encode_json, zipf_shares
from flatshare.cli.context import credentials
from flatshare.cli.output import print_table, progress_bar
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare_registry import Registry, TenantId
from flatshare_registry.settings import RegistrySettings
from flatshare_registry.testing.s3_server import CREDENTIALS

NETWORK = architecture("mnist-cnn")
WHOLE_S = 120
"""Seconds within which a killed replica must have been replaced."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which; all by default")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--slots", type=int, default=10)
    parser.add_argument("--tenants", type=int, default=200)
    parser.add_argument("--requests", type=int, default=8000, help="that are measured, after as many before")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-stock", action="store_true", help="leave out Ray's own multiplexing")
    parser.add_argument("--registry", metavar="DIR", help="keep the registry here, and use it if it is there")
    parser.add_argument("--json", metavar="FILE", help="write the results as a document")
    arguments = parser.parse_args()
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        registry = Path(arguments.registry or f"{folder}/registry").absolute()
        os.environ["FLATSHARE_STORE"] = f"file://{registry}"
        os.environ["XDG_STATE_HOME"] = f"{folder}/state"
        models = Models(arguments.tenants)
        for name in arguments.parts or PARTS:
            document[name] = PARTS[name](models, arguments)
            print_table(
                name, ["measure", "value#"],
                [(key, value) for key, value in document[name].items() if isinstance(value, (int, float))],
            )  # fmt: skip
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(document, indent=2))
    bad = any(one.get("failed") or one.get("wrong") for one in document.values())
    return 1 if bad else 0


class Models:
    """Tenants with random weights of their own in the registry, and what each rightly answers to a few digits."""

    def __init__(self, tenants: int) -> None:
        dice = np.random.default_rng(7)
        self.rows = dice.random((8, *NETWORK.input.shape), dtype=np.float32)
        self.bodies = [encode_json(self.rows[index : index + 1]) for index in range(len(self.rows))]
        self.tenants = [f"tenant-{number:05}" for number in range(tenants)]
        self.expected: dict[str, list[int]] = {}
        registry = Registry(RegistrySettings().open_store(), actor="bench-fleet")
        known = set(registry.all_ids())
        with progress_bar("models") as progress:
            for seed, name in enumerate(self.tenants):
                torch.manual_seed(seed)
                module = NETWORK.build()
                if name not in known:
                    registry.create_tenant(TenantId(name))
                    registry.register(
                        TenantId(name), save(dict(module.state_dict())), NETWORK.name, NETWORK.tensors,
                        probe=lambda weights: probe_logits(NETWORK, weights),
                    )  # fmt: skip
                with torch.inference_mode():
                    self.expected[name] = module(torch.from_numpy(self.rows)).argmax(dim=1).tolist()
                progress(seed + 1, tenants)

    def request(self, tenant: str, index: int) -> BenchRequest:
        return BenchRequest(tenant, self.bodies[index], (self.expected[tenant][index],))

    def trace(self, seed: int) -> Iterator[BenchRequest]:
        """Endless: tenants by Zipf(1.0)."""
        dice = np.random.default_rng(seed)
        shares = zipf_shares(len(self.tenants), 1.0)
        while True:
            chosen = dice.choice(len(shares), size=4096, p=shares).tolist()
            for tenant, index in zip(chosen, dice.integers(0, len(self.bodies), 4096).tolist(), strict=True):
                yield self.request(self.tenants[tenant], index)


# -- hits


def measure_hits(models: Models, arguments: argparse.Namespace) -> dict[str, Any]:
    capacity = Capacity(arguments.replicas, arguments.slots)
    warm = measured = arguments.requests
    trace = [one.model for one in itertools.islice(models.trace(arguments.seed), warm + measured)]
    hits = lru_hits(trace, capacity.replicas * capacity.slots)[warm:]
    found: dict[str, Any] = {"one_lru": sum(hits) / measured}
    with CONTENDERS["flatshare"].start(capacity) as url, Residents(url) as residents:
        outcomes = send(url, models.trace(arguments.seed), warm + measured, arguments.concurrency)
        found["duplicate_factor"] = residents.duplicate_factor()
    last = outcomes[warm:]
    found |= {
        "hit_rate": share(one.tier == "device" for one in last),
        "requests_per_s": len(last) / (last[-1].at_s - last[0].at_s),
        "at_home": at_home(last),
        "largest_share_of_a_replica": max(Counter(one.replica for one in last).values()) / len(last),
        **failures(outcomes),
    }
    found["hit_rate_of_one_lru"] = found["hit_rate"] / found["one_lru"]
    if not arguments.no_stock:
        found["stock_hit_rate"] = stock_hits(models, arguments)
    return found


def lru_hits(trace: Sequence[str], capacity: int) -> list[bool]:
    """Which requests one LRU of so many models would have had."""
    held: OrderedDict[str, None] = OrderedDict()
    hits = []
    for model in trace:
        hits.append(model in held)
        held[model] = None
        held.move_to_end(model)
        if len(held) > capacity:
            held.popitem(last=False)
    return hits


def stock_hits(models: Models, arguments: argparse.Namespace) -> float:
    """Of Ray's own multiplexing, on the same trace: what it did not load anew."""
    warm = measured = arguments.requests
    with s3_server() as endpoint, tempfile.TemporaryDirectory() as folder:
        loads = Path(folder) / "loads"
        loads.touch()
        changed = CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint, "BENCH_LOADS": str(loads)}
        with environment(changed):
            script = Path(folder) / "model.pt"
            torch.jit.save(torch.jit.script(NETWORK.build()), str(script))
            # Whose weights they are does not matter to who is evicted: one file for all keeps the memory small.
            boto3.client("s3").put_object(
                Bucket="models", Key="torchscript/model.pt", Body=script.read_bytes()
            )
            with CONTENDERS["stock"].start(Capacity(arguments.replicas, arguments.slots)) as url:
                trace = (BenchRequest(one.model, one.body) for one in models.trace(arguments.seed))
                send(url, trace, warm, arguments.concurrency)
                before = loads.stat().st_size
                send(url, trace, measured, arguments.concurrency)
                return 1 - (loads.stat().st_size - before) / measured


# -- kill


def measure_kill(models: Models, arguments: argparse.Namespace) -> dict[str, Any]:
    """Homes before, without one replica, and after its replacement came; under load all the while."""
    with CONTENDERS["flatshare"].start(Capacity(arguments.replicas, arguments.slots)) as url:
        stop = threading.Event()
        outcomes: list[Outcome] = []
        shots = itertools.takewhile(lambda _: not stop.is_set(), models.trace(arguments.seed))
        load = threading.Thread(
            target=lambda: outcomes.extend(
                run_load(url, shots, Load(concurrency=arguments.concurrency, headers=credentials(url)))
            )
        )
        with Residents(url) as residents:
            before = homes(url, models)
            edges = haproxies()
            load.start()
            time.sleep(2)  # of load, so that the kill hits requests under way
            victim = residents.replicas()[0]
            died = time.monotonic()
            psutil.Process(victim["pid"]).kill()
            away = homes(url, models)
            residents.wait_for(arguments.replicas, but=victim["replica"])
            whole_s = time.monotonic() - died
            wait_until_home(url, models, before, victim["replica"])
            after = homes(url, models)
            stop.set()
            load.join()
    others = {model for model, replica in before.items() if replica != victim["replica"]}
    back = {model for model, replica in before.items() if replica == victim["replica"]}
    return {
        "requests": len(outcomes),
        **failures(outcomes),
        "survivors_kept_home": share(away[model] == before[model] for model in others),
        "kept_home_after_replacement": share(after[model] == before[model] for model in others),
        "came_back_to_the_replacement": share(after[model] not in set(before.values()) for model in back),
        "whole_after_s": round(whole_s, 2),
        "reloads_of_haproxy": len(haproxies() - edges),
    }


def homes(url: str, models: Models) -> dict[str, str]:
    """Which replica answers for each model, asked one after the other."""
    shots = (models.request(tenant, 0) for tenant in models.tenants)
    outcomes = run_load(url, shots, Load(concurrency=1, headers=credentials(url)))
    return {one.model: one.replica for one in outcomes}


def wait_until_home(url: str, models: Models, before: dict[str, str], gone: str) -> None:
    """Until the edge sends to the replacement."""
    lost = next(model for model, replica in before.items() if replica == gone)
    deadline = time.monotonic() + WHOLE_S
    while time.monotonic() < deadline:
        shots = iter([models.request(lost, 0)])
        (outcome,) = run_load(url, shots, Load(concurrency=1, headers=credentials(url)))
        if outcome.replica not in before.values():
            return
        time.sleep(0.1)  # the edge says nothing when it has changed
    raise SystemExit("the edge did not send to the replacement")


def haproxies() -> set[int]:
    """Processes of the edge: a reload makes new ones."""
    found = set()
    for process in psutil.Process().children(recursive=True) + list(psutil.process_iter()):
        with contextlib.suppress(psutil.Error):
            if "haproxy" in process.name():
                found.add(process.pid)
    return found


# -- shared


class Residents:
    """The fleet view of a running platform."""

    def __init__(self, url: str) -> None:
        self._url = url.removesuffix("/predict") + "/admin/replicas"
        self._client = httpx.Client(headers=credentials(url), timeout=30)

    def __enter__(self) -> Residents:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def replicas(self) -> list[dict[str, Any]]:
        """Those that answer."""
        reply = self._client.get(self._url)
        reply.raise_for_status()
        return [one for one in reply.json()["replicas"] if one["state"] == "RUNNING"]

    def wait_for(self, count: int, but: str) -> None:
        """Until so many run, a dead one not counted."""
        deadline = time.monotonic() + WHOLE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                names = {one["replica"] for one in self.replicas()} - {but}
                if len(names) >= count:
                    return
            time.sleep(0.1)  # Serve says nothing when a replica runs
        raise SystemExit("the replica was not replaced")

    def duplicate_factor(self) -> float:
        """Residencies over distinct models."""
        held = [(model["tenant"], model["version"]) for one in self.replicas() for model in one["models"]]
        return len(held) / max(len(set(held)), 1)


def send(url: str, shots: Iterator[BenchRequest], count: int, concurrency: int) -> list[Outcome]:
    with progress_bar("requests") as progress:
        load = Load(requests=count, concurrency=concurrency, headers=credentials(url))
        outcomes = run_load(url, shots, load, lambda done: progress(done, count) if done % 50 == 0 else None)
    return sorted(outcomes, key=lambda one: one.at_s)


def failures(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return {
        "failed": sum(one.status != 200 for one in outcomes),
        "wrong": sum(one.right is False for one in outcomes),
    }


def at_home(outcomes: Sequence[Outcome]) -> float:
    """Share of requests that were answered where most of their model's are."""
    by_model: dict[str, Counter[str]] = {}
    for one in outcomes:
        by_model.setdefault(one.model, Counter())[one.replica] += 1
    return sum(max(counts.values()) for counts in by_model.values()) / len(outcomes)


def share(values: Iterator[bool]) -> float:
    kept = list(values)
    return sum(kept) / len(kept) if kept else 0.0


@contextlib.contextmanager
def environment(changed: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


PARTS: dict[str, Callable[[Models, argparse.Namespace], dict[str, Any]]] = {
    "hits": measure_hits,
    "kill": measure_kill,
}

if __name__ == "__main__":
    sys.exit(main())
