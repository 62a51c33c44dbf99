"""The plots of the documents, each from a run on this machine: SVG in ``scripts/bench/pictures``, with text as text.

- ``run``: hit rate and latency by tier over one Zipf run, with a promotion and a killed replica.
- ``memory``: memory of up to 1,000 tenants, with a deployment each and with shared layers.
- ``slots``: hit rate against slots, by ``flatshare plan``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import matplotlib
import numpy as np
import psutil
import torch
from contenders import CONTENDERS, Capacity
from safetensors.torch import save

from flatshare.bench.load import Load, Outcome, run_load
from flatshare.bench.plot import COLOURS
from flatshare.bench.report import TIERS
from flatshare.bench.workload import digit_shots
from flatshare.cli.context import credentials
from flatshare.cli.output import out, progress_bar
from flatshare.mnist.digits import load_digits
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare.replica.build import Replica
from flatshare.settings import Settings
from flatshare_registry import Registry, TenantId
from flatshare_registry.ids import PRODUCTION, ModelRef
from flatshare_registry.settings import RegistrySettings

matplotlib.use("Agg")
from matplotlib import pyplot  # after its back end is chosen

HERE = Path(__file__).parent
FOLDER = HERE / "pictures"
NETWORK = architecture("mnist-cnn")
TENANTS, SECONDS, PROMOTED_AT_S, KILLED_AT_S = 60, 90.0, 30.0, 55.0
DEPLOYMENTS = (1, 2, 4, 8)
SHARING = (1, 10, 100, 300, 1000)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pictures", nargs="*", default=["run", "memory", "slots"], choices=["run", "memory", "slots"]
    )
    arguments = parser.parse_args()
    pyplot.rcParams["svg.fonttype"] = "none"  # text that can be selected
    for name in arguments.pictures:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["FLATSHARE_STORE"] = f"file://{folder}/store"
            os.environ["XDG_STATE_HOME"] = f"{folder}/state"
            {"run": draw_run, "memory": draw_memory, "slots": draw_slots}[name]()
    return 0


def written(figure: Any, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)
    out.print(f"drawn: {FOLDER / name}.svg")


# -- one Zipf run


def draw_run() -> None:
    registry = Registry(RegistrySettings().open_store(), actor="pictures")
    tenants = [f"tenant-{number:02}" for number in range(TENANTS)]
    for number, tenant in enumerate(tenants):
        registry.create_tenant(TenantId(tenant))
        register(registry, tenant, number)
    register(registry, tenants[0], TENANTS)  # its second version
    rows = NETWORK.preprocess(load_digits().test_images[:256])
    marks: dict[str, float] = {}
    with CONTENDERS["flatshare"].start(Capacity(2, 8)) as url:
        shown = credentials(url)
        shots = digit_shots(tenants, rows, exponent=1.0, batch=1, seed=1)
        began = time.perf_counter()
        with ThreadPoolExecutor(1) as aside:
            acting = aside.submit(act, registry, tenants[0], url, shown, began, marks)
            outcomes = run_load(url, shots, Load(duration_s=SECONDS, concurrency=4, headers=shown))
            acting.result()
    failed = sum(one.status != 200 for one in outcomes)
    out.print(f"{len(outcomes)} requests, {failed} failed; {marks}")
    (FOLDER / "run.json").write_text(
        json.dumps(
            {"requests": len(outcomes), "failed": failed, "marks_s": marks, "tenants": TENANTS}, indent=2
        )
        + "\n"
    )
    plot_run(outcomes, marks)


def register(registry: Registry, tenant: str, seed: int) -> None:
    torch.manual_seed(seed)
    registry.register(
        TenantId(tenant), save(dict(NETWORK.build().state_dict())), NETWORK.name, NETWORK.tensors,
        probe=lambda weights: probe_logits(NETWORK, weights),
    )  # fmt: skip


def act(
    registry: Registry, tenant: str, url: str, shown: dict[str, str], began: float, marks: dict[str, float]
) -> None:
    """Promote the busiest tenant's second version, then kill one of the replicas."""
    admin = url.rpartition("/")[0] + "/admin"
    time.sleep(max(PROMOTED_AT_S - (time.perf_counter() - began), 0))
    registry.set_alias(TenantId(tenant), PRODUCTION, 2)
    marks["promotion"] = time.perf_counter() - began
    httpx.post(f"{admin}/tenants/{tenant}/refresh", headers=shown, timeout=30).raise_for_status()
    time.sleep(max(KILLED_AT_S - (time.perf_counter() - began), 0))
    replicas = httpx.get(f"{admin}/replicas", headers=shown, timeout=30).json()["replicas"]
    psutil.Process(replicas[0]["pid"]).kill()
    marks["replica killed"] = time.perf_counter() - began


def plot_run(outcomes: Sequence[Outcome], marks: dict[str, float]) -> None:
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    seconds = range(int(max(one.at_s for one in outcomes)))
    by_second: dict[int, list[Outcome]] = {second: [] for second in seconds}
    for one in outcomes:
        by_second.setdefault(int(one.at_s), []).append(one)
    for tier in TIERS:
        if not any(one.tier == tier for one in outcomes):
            continue
        share = [sum(one.tier == tier for one in by_second[s]) / max(len(by_second[s]), 1) for s in seconds]
        upper.plot(list(seconds), share, color=COLOURS[tier], label=tier)
        p50 = [
            np.median([1000 * o.latency_s for o in by_second[s] if o.tier == tier] or [np.nan])
            for s in seconds
        ]
        lower.plot(list(seconds), p50, color=COLOURS[tier], label=f"{tier}, median")
    p99 = [np.percentile([1000 * one.latency_s for one in by_second[s]] or [np.nan], 99) for s in seconds]
    lower.plot(list(seconds), p99, color="black", linewidth=0.8, linestyle=":", label="all, p99")
    failed = [one.at_s for one in outcomes if one.status != 200]
    lower.scatter(failed, [1.0] * len(failed), marker="x", color="black", label=f"failed: {len(failed)}")
    upper.set(ylabel="share of requests, by where\nthe model was found", ylim=(0, 1))
    lower.set(xlabel="seconds into the run", ylabel="latency, ms", yscale="log")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right", fontsize="small")
        for name, at_s in marks.items():
            axes.axvline(at_s, color="grey", linestyle="--", linewidth=1)
            axes.annotate(
                name,
                (at_s, 0.02),
                xycoords=("data", "axes fraction"),
                fontsize="small",
                xytext=(3, 0),
                textcoords="offset points",
            )
    figure.suptitle(f"{len(outcomes)} requests, Zipf(1.0) over {TENANTS} tenants, 2 replicas of 8 slots")
    written(figure, "run")


# -- memory


def draw_memory() -> None:
    each = {count: deployments_bytes(count) for count in DEPLOYMENTS}
    shared = asyncio.run(sharing_bytes())
    document = {"a_deployment_each": each, "shared_layers": shared}
    (FOLDER / "memory.json").write_text(json.dumps(document, indent=2) + "\n")
    out.print(json.dumps(document))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    per_one = each[DEPLOYMENTS[-1]] / DEPLOYMENTS[-1]
    axes.plot(
        list(each),
        [value / 1e9 for value in each.values()],
        "o-",
        color="#b5442e",
        label="a deployment each, measured",
    )
    drawn_on = [DEPLOYMENTS[-1], SHARING[-1]]
    axes.plot(drawn_on, [per_one * count / 1e9 for count in drawn_on], "--", color="#b5442e",
              label=f"the same, drawn on with {per_one / 1e6:.0f} MB each")  # fmt: skip
    axes.plot(list(shared), [value / 1e9 for value in shared.values()], "o-", color="#2b7a4b",
              label="one flatshare replica, layers shared but the last, measured")  # fmt: skip
    axes.set(xlabel="tenants", ylabel="memory of the processes, GB", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.suptitle("mnist-cnn: all tenants resident (proportional set size)")
    written(figure, "memory")


def deployments_bytes(count: int) -> int:
    """Memory of so many replicas of a plain Ray Serve deployment that holds one model each."""
    script = HERE / "one_model.py"
    started = subprocess.Popen(
        [sys.executable, script, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert started.stdin is not None and started.stdout is not None
    try:
        if started.stdout.readline().strip() != "ready":
            raise SystemExit("the deployments did not start")
        replicas = [
            one
            for one in psutil.Process(started.pid).children(recursive=True)
            if "ServeReplica" in " ".join(one.cmdline())
        ]
        assert len(replicas) == count, [one.cmdline() for one in replicas]
        return sum(one.memory_full_info().pss for one in replicas)
    finally:
        started.stdin.close()
        started.wait(60)


async def sharing_bytes() -> dict[int, int]:
    """Memory of one replica without Serve's actor around it, with its host tier's files, and so many tenants."""
    store = RegistrySettings().open_store()
    registry = Registry(store, actor="pictures")
    torch.manual_seed(0)
    base = dict(NETWORK.build().state_dict())
    last = [name for name in base if name.startswith("fc2")]
    host = tempfile.TemporaryDirectory(
        prefix="flatshare-pictures-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    )
    replica = Replica.build(
        Settings(slots=SHARING[-1], host_dir=host.name, usage_interval_s=0, view_ttl_s=600), store
    )
    found: dict[int, int] = {}
    with progress_bar("tenants") as progress:
        for number in range(SHARING[-1]):
            tenant = f"tenant-{number}"
            registry.create_tenant(TenantId(tenant))
            weights = base | {name: torch.randn_like(base[name]) for name in last}
            registry.register(TenantId(tenant), save(weights), NETWORK.name, NETWORK.tensors)
            await replica.preload(str(ModelRef.parse(tenant)))
            if number + 1 in SHARING:
                assert len(replica.cache.resident_records()) == number + 1, "all are resident"
                found[number + 1] = psutil.Process().memory_full_info().pss
            progress(number + 1, SHARING[-1])
    await replica.close()
    host.cleanup()
    return found


# -- slots


def draw_slots() -> None:
    command = [
        str(Path(sys.executable).parent / "flatshare"), "plan", "--tenants", "500", "--requests", "60000",
        "--target", "0.8", "--plot", str(FOLDER / "plan.svg"),
    ]  # fmt: skip
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
