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
import dataclasses
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import psutil
import torch
from contenders import BIN, CONTENDERS, Capacity
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
    parser.add_argument(
        "--hot-concurrency", type=int, default=64, help="requests of the hot tenant in flight"
    )
    parser.add_argument("--step-s", type=float, default=20, help="seconds of the step of load")
    parser.add_argument("--trickle-s", type=float, default=60, help="seconds of 45 small requests a second")
    parser.add_argument("--seconds", type=float, default=12, help="of load before a rollout and after it")
    parser.add_argument("--plot", metavar="FILE", help="draw the hot tenant's run into this PNG")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-stock", action="store_true", help="leave out Ray's own multiplexing, and Serve's own order"
    )
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


# -- hot


QUIET_RATE = 100.0
"""Requests a second of the quiet tenants, all together."""

HOT_S = 20.0
BEFORE_S = 8.0
AFTER_S = 20.0
"""Seconds with the hot tenant's load, before it, and after it."""


def measure_hot(models: Models, arguments: argparse.Namespace) -> dict[str, Any]:
    """One tenant takes all that it can get beside quiet ones: copies, throughput, and the quiet ones' latency."""
    quiet = models.tenants[1:100]
    slots = max(arguments.slots, len(quiet))  # all are resident: what is measured is load, not loads
    hot = [models.request(models.tenants[0], index) for index in range(len(models.bodies))]
    dice = np.random.default_rng(arguments.seed)
    calm = [models.request(quiet[number], 0) for number in dice.integers(0, len(quiet), 20_000)]
    seen: list[tuple[float, int]] = []
    with (
        CONTENDERS["flatshare"].start(Capacity(arguments.replicas, slots)) as url,
        Residents(url) as residents,
    ):
        headers = credentials(url)
        run_load(url, iter([models.request(one, 0) for one in quiet]), Load(concurrency=4, headers=headers))
        began = time.perf_counter()
        total_s = BEFORE_S + HOT_S + AFTER_S
        # Each load in a process of its own: a busy client must not slow down the one that is measured beside it.
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as clients:
            steady = Load(rate=QUIET_RATE, duration_s=total_s, headers=headers)
            loads = {"quiet": clients.submit(in_process, url, calm, steady, began)}
            wait_until(began + BEFORE_S, seen, residents, began)
            flood = Load(duration_s=HOT_S, concurrency=arguments.hot_concurrency, headers=headers)
            loads["hot"] = clients.submit(in_process, url, hot, flood, began)
            wait_until(began + total_s, seen, residents, began)
            answers = {name: load.result() for name, load in loads.items()}
    if arguments.plot:
        plot_hot(Path(arguments.plot), answers, seen)
    flooded = answers["hot"][0].at_s
    during = [one for one in answers["quiet"] if flooded + 3 <= one.at_s < flooded + HOT_S]
    before = [one for one in answers["quiet"] if 2 <= one.at_s < flooded]
    first, last = (
        [one for one in answers["hot"] if flooded + low <= one.at_s < flooded + high]
        for low, high in ((0, 2), (8, HOT_S))
    )
    return {
        "hot_requests_per_s_at_first": len(first) / 2,
        "hot_requests_per_s_with_copies": len(last) / (HOT_S - 8),
        "copies_at_most": max(count for _, count in seen),
        "copies_after_s": next((at - flooded for at, count in seen if count > 1), -1.0),
        "copies_gone_after_s": next(
            (at - flooded - HOT_S for at, count in seen if at > flooded + HOT_S and count <= 1), -1.0
        ),
        "quiet_ms_p50_before": 1000 * quantile(before, 0.5),
        "quiet_ms_p99_before": 1000 * quantile(before, 0.99),
        "quiet_ms_p50_during": 1000 * quantile(during, 0.5),
        "quiet_ms_p99_during": 1000 * quantile(during, 0.99),
        **failures([*answers["quiet"], *answers["hot"]]),
    }


def in_process(url: str, shots: list[BenchRequest], load: Load, began: float) -> list[Outcome]:
    """Send in a process of its own; times of the outcomes count from ``began``, a monotonic clock's."""
    offset = time.perf_counter() - began
    outcomes = run_load(url, itertools.cycle(shots), load)
    return [dataclasses.replace(one, at_s=one.at_s + offset) for one in outcomes]


def wait_until(moment: float, seen: list[tuple[float, int]], residents: Residents, began: float) -> None:
    """Note the hot tenant's copies twice a second until then."""
    while time.perf_counter() < moment:
        copies = residents.copies()
        seen.append((time.perf_counter() - began, max((len(one) for one in copies.values()), default=1)))
        time.sleep(0.5)  # a curve over time is looked at, nothing is waited for


def quantile(outcomes: Sequence[Outcome], share_: float) -> float:
    return float(np.quantile([one.latency_s for one in outcomes], share_)) if outcomes else float("nan")


def plot_hot(
    path: Path,
    answers: dict[str, list[Outcome]],
    seen: list[tuple[float, int]],
) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, (rates, late) = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
    edges = np.arange(0, BEFORE_S + HOT_S + AFTER_S, 1.0)
    counts, _ = np.histogram([one.at_s for one in answers["hot"]], edges)
    rates.step(edges[:-1], counts, where="post", label="hot tenant: requests/s")
    rates.set_ylabel("requests/s")
    beside = rates.twinx()
    beside.step(*zip(*seen, strict=True), where="post", color="tab:red", label="replicas that serve it")
    beside.set_ylabel("replicas", color="tab:red")
    beside.set_ylim(0)
    rates.legend(loc="upper right")
    for name, share_ in (("p50", 0.5), ("p99", 0.99)):
        values = [
            1000 * quantile([one for one in answers["quiet"] if low <= one.at_s < low + 1], share_)
            for low in edges[:-1]
        ]
        late.step(edges[:-1], values, where="post", label=f"99 quiet tenants: {name}")
    late.set_ylabel("milliseconds")
    late.set_xlabel("seconds")
    late.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# -- scale


TRICKLE_RATE = 45.0


def measure_scale(models: Models, arguments: argparse.Namespace) -> dict[str, Any]:
    """From no replica to many and back under a step of load; then requests of a millisecond, which keep one."""
    changed = {
        "FLATSHARE_MIN_REPLICAS": "0", "FLATSHARE_MAX_REPLICAS": str(arguments.replicas),
        "FLATSHARE_DOWNSCALE_DELAY_S": "4", "FLATSHARE_DOWNSCALE_TO_ZERO_DELAY_S": "4",
    }  # fmt: skip
    with (
        environment(changed),
        CONTENDERS["flatshare"].start(Capacity(1, arguments.slots)) as url,
        Residents(url) as residents,
    ):
        headers = credentials(url)
        none_s = residents.wait_for_wanted(0)
        woken = run_load(url, iter([models.request(models.tenants[0], 0)]), Load(requests=1, headers=headers))
        start_s = residents.process_start_s()
        grown: dict[str, float] = {}
        watching = threading.Thread(
            target=lambda: grown.update(s=residents.wait_for_wanted(arguments.replicas))
        )
        watching.start()
        step = run_load(
            url, models.trace(arguments.seed),
            Load(duration_s=arguments.step_s, concurrency=4 * arguments.replicas + 4, headers=headers),
        )  # fmt: skip
        watching.join(1)
        back_s = residents.wait_for_wanted(0)
        small = itertools.cycle([models.request(models.tenants[0], 0)])
        seen: list[int] = []
        stop = threading.Event()
        watching = threading.Thread(target=residents.watch_wanted, args=(seen, stop))
        run_load(url, small, Load(requests=1, headers=headers))
        watching.start()
        trickle = run_load(
            url, small, Load(rate=TRICKLE_RATE, duration_s=arguments.trickle_s, headers=headers)
        )
        stop.set()
        watching.join()
    return {
        "to_none_after_s": none_s,
        "first_answer_s": woken[0].latency_s,
        "of_it_the_process_start_s": start_s,
        "to_most_after_s": grown.get("s", -1.0),
        "back_to_none_after_s": back_s,
        "step_requests": len(step),
        "trickle_requests": len(trickle),
        "fewest_replicas_under_the_trickle": min(seen),
        **failures([*woken, *step, *trickle]),
    }


# -- rollout


def measure_rollout(models: Models, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every replica replaced under load: ours, and Serve's default order with replicas that start cold."""
    ours = one_rollout(models, arguments, [])
    if arguments.no_stock:
        return ours
    plain = one_rollout(models, arguments, ["--no-surge", "--set", "warm_up_s=0"])
    return {
        **ours, **{f"serves_default_{key}": value for key, value in plain.items()},
        "failed": ours["failed"] + plain["failed"], "wrong": ours["wrong"] + plain["wrong"],
    }  # fmt: skip


def one_rollout(models: Models, arguments: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    with CONTENDERS["flatshare"].start(Capacity(arguments.replicas, arguments.slots)) as url:
        headers = credentials(url)
        send(url, models.trace(arguments.seed), arguments.requests, arguments.concurrency)
        stop = threading.Event()
        outcomes: list[Outcome] = []
        shots = itertools.takewhile(lambda _: not stop.is_set(), models.trace(arguments.seed + 1))
        load = Load(concurrency=arguments.concurrency, headers=headers)
        thread = threading.Thread(target=lambda: outcomes.extend(run_load(url, shots, load)))
        began = time.perf_counter()
        thread.start()
        time.sleep(arguments.seconds)  # of load
        port = url.split(":")[2].partition("/")[0]
        command = [str(BIN / "flatshare"), "rollout", "--port", port, *options]
        started_s = time.perf_counter() - began
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
        done_s = time.perf_counter() - began
        time.sleep(arguments.seconds)
        stop.set()
        thread.join()
    found: dict[str, Any] = {"took_s": done_s - started_s, **failures(outcomes)}
    for name, low, high in (
        ("before", 2.0, started_s), ("during", started_s, done_s), ("after", done_s, done_s + arguments.seconds),
    ):  # fmt: skip
        some = [one for one in outcomes if low <= one.at_s < high]
        found[f"hit_rate_{name}"] = share(one.tier == "device" for one in some)
        found[f"ms_p99_{name}"] = 1000 * quantile(some, 0.99)
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

    def existing(self) -> int:
        """Replicas in any state."""
        reply = self._client.get(self._url)
        reply.raise_for_status()
        return len(reply.json()["replicas"]) + len(reply.json()["not_answering"])

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

    def copies(self) -> dict[str, list[str]]:
        """Models that more than one replica serves, and which."""
        reply = self._client.get(self._url)
        reply.raise_for_status()
        copies: dict[str, list[str]] = reply.json()["placement"]["copies"]
        return copies

    def wanted(self) -> int:
        """Replicas that Serve keeps."""
        reply = self._client.get(self._url.removesuffix("replicas") + "scaling")
        reply.raise_for_status()
        return int(reply.json()["wanted"])

    def wait_for_wanted(self, count: int) -> float:
        """Seconds until Serve was told to keep so many; none: until none is left."""
        began = time.monotonic()
        while time.monotonic() < began + WHOLE_S:
            if self.wanted() == count and (count or not self.existing()):
                return time.monotonic() - began
            time.sleep(0.1)  # nobody is told of a decision
        raise SystemExit(f"the pool did not get {count} replicas")

    def watch_wanted(self, seen: list[int], stop: threading.Event) -> None:
        """Note the number twice a second until told to stop."""
        while not stop.wait(0.5):
            seen.append(self.wanted())

    def process_start_s(self) -> float:
        """Of the only replica: from its process's start until it was built."""
        deadline = time.monotonic() + WHOLE_S
        while not (found := self.replicas()):
            if time.monotonic() > deadline:
                raise SystemExit("no replica answers")
            time.sleep(0.1)  # its first answer may be there before Serve calls it running
        return float(found[0]["started_at"]) - psutil.Process(found[0]["pid"]).create_time()

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
    "hot": measure_hot,
    "scale": measure_scale,
    "rollout": measure_rollout,
}

if __name__ == "__main__":
    sys.exit(main())
