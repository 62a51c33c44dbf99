"""What a device gives: passes of one and of many models, apart and stacked; requests through a replica; loads.

Everything in one process, without HTTP: what a GPU changes is behind the door. The first device of this
process is measured (``--device cpu`` takes the CPU). Small networks are bound by launches on a GPU, so the
question is how many models meet in a pass, and whether their weights are worth stacking (``stack_models``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save

from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.cli.output import err, out, print_table
from flatshare.device.host_memory import keep_freed_memory
from flatshare.device.opening import open_device
from flatshare.device.protocol import Device
from flatshare.engine.passes import forward
from flatshare.engine.stacked import Stacks
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare.models.stages import Model, device_tensor, plan_of
from flatshare.replica.build import Replica
from flatshare.settings import Settings
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.stores.memory import MemoryStore

NAMES = ("mnist-cnn", "mnist-resnet18")
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables as a document")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=3, help="of each load through a replica")
    parser.add_argument("--passes", type=int, default=60, help="of each kind that are timed")
    parser.add_argument("--tenants", type=int, action="append", help="of a load (repeatable; 1, 20, 200)")
    parser.add_argument("--concurrency", type=int, action="append", help="in flight (repeatable; 16, 128)")
    options = parser.parse_args()
    keep_freed_memory()  # as a replica does
    device = open_device(options.device)
    card = torch.cuda.get_device_name() if device.torch_device.type == "cuda" else "CPU"
    out.print(f"{card}; torch {torch.__version__}")
    tables: dict[str, list[Row]] = {"passes": [], "loads": [], "requests": []}

    def add(table: str, row: Row) -> None:
        """Said and written at once: what was measured is there when the rest is cut off."""
        tables[table].append(row)
        err.print(f"{table}: " + ", ".join(f"{name} {value}" for name, value in row.items()), highlight=False)
        if options.json:
            document = {"card": card, "torch": torch.__version__, **tables}
            options.json.write_text(json.dumps(document, indent=1) + "\n")

    for name in NAMES:
        for row in passes_of(device, name, options.passes):
            add("passes", row)
        add("loads", loads_of(device, name, options.passes))
    for tenants in options.tenants or [1, 20, 200]:
        for in_flight in options.concurrency or [16, 128]:
            for rows, stacked in [(1, False), (1, True), (64, False)]:
                if not (stacked and tenants == 1):
                    opened = open_device(options.device)
                    add(
                        "requests",
                        asyncio.run(requests_of(opened, tenants, in_flight, rows, stacked, options.seconds)),
                    )
    for title, found in tables.items():
        show(title, found)
    return 0


def show(title: str, rows: list[Row]) -> None:
    columns = [name if isinstance(rows[0][name], str) else f"{name}#" for name in rows[0]]
    print_table(title, columns, [tuple(f"{value:,}" if not isinstance(value, str) else value for value in row.values()) for row in rows])  # fmt: skip


def weights_of(seed: int, name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(architecture(name).build().state_dict())


def on_device(device: Device, seed: int, name: str) -> Model:
    net = architecture(name)
    plan = plan_of(net)
    placed = device.place(
        {
            key: device_tensor(one, channels_last=net.channels_last)
            for key, one in weights_of(seed, name).items()
        }
    )
    return Model(
        tuple(plan.stage(index, placed) for index in range(len(plan.names))), {}, "", name, net.channels_last
    )


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 1, 28, 28), dtype=np.float32) * 2 - 1


def passes_of(device: Device, name: str, repeats: int) -> Iterator[Row]:
    """Milliseconds of a pass from host rows to host logits, one after the other."""
    models = [on_device(device, seed, name) for seed in range(16)]
    stacks = Stacks(architecture, device.padded)
    for count, size in [(1, 1), (1, 16), (1, 64), (1, 256), (4, 1), (16, 1), (16, 4)]:
        rows = [images(size, seed) for seed in range(count)]

        def one(with_stacks: Stacks | None, count: int = count, rows: list[np.ndarray] = rows) -> None:
            device.launch(
                rows, lambda given: forward(models[:count], given, device.padded, with_stacks)
            ).wait()

        row: Row = {"network": name, "models": count, "rows each": size, "apart ms": median_ms(lambda: one(None), repeats)}  # fmt: skip
        row["stacked ms"] = median_ms(lambda: one(stacks), repeats) if count > 1 else 0.0
        row["images/s"] = round(count * size / min(row["apart ms"], row["stacked ms"] or 1e9) * 1e3)
        yield row


def loads_of(device: Device, name: str, repeats: int) -> Row:
    """Milliseconds until a model's tensors are on the device, and until they are overwritten again."""
    times: dict[str, list[float]] = {"place ms": [], "scrub ms": []}
    given = [weights_of(seed, name) for seed in range(4)]
    channels_last = architecture(name).channels_last
    for number in range(repeats):
        tensors = {
            key: device_tensor(one, channels_last=channels_last) for key, one in given[number % 4].items()
        }
        began = time.perf_counter()
        placed = device.place(tensors)
        wait(device)
        middle = time.perf_counter()
        device.scrub(placed.values())
        wait(device)
        times["place ms"].append((middle - began) * 1e3)
        times["scrub ms"].append((time.perf_counter() - middle) * 1e3)
        del placed
    size = sum(one.nbytes for one in given[0].values())
    return {"network": name, "MB": round(size / 1e6, 1), **{key: round(statistics.median(all_), 3) for key, all_ in times.items()}}  # fmt: skip


def wait(device: Device) -> None:
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize()


async def requests_of(
    device: Device, tenants: int, in_flight: int, rows: int, stacked: bool, seconds: float
) -> Row:
    """Requests of resident models through a replica: enter, quota, queue, pass, answer."""
    store = MemoryStore()
    registry = Registry(store)
    net = architecture("mnist-cnn")
    for number in track(range(tenants), f"{tenants} tenants", transient=True, disable=not out.is_terminal):
        registry.create_tenant(TenantId(f"t{number}"))
        registry.register(
            TenantId(f"t{number}"), save(weights_of(number, net.name)), net.name, net.tensors,
            probe=lambda data: probe_logits(net, data),
        )  # fmt: skip
    settings = Settings(
        host_dir="off", device="auto", slots=tenants + 1, stack_models=stacked,
        max_ongoing_requests=1024, max_queued_requests=4096, tenant_share=1.0,
    )  # fmt: skip
    replica = Replica.build(settings, store, device=device)
    given = images(rows)
    times: list[float] = []
    refs = [ModelRef.parse(f"t{number}") for number in range(tenants)]

    async def ask(number: int) -> None:
        with await replica.service.enter(LOCAL_OPERATOR, refs[number % tenants]) as ticket:
            await replica.service.predict(ticket, lambda network: given)

    async def caller(number: int, until: float) -> None:
        while time.perf_counter() < until:
            began = time.perf_counter()
            await ask(number)
            times.append((time.perf_counter() - began) * 1e3)
            number += in_flight

    for number in range(tenants):
        await ask(number)
    warm = time.perf_counter() + 1
    await asyncio.gather(*(caller(number, warm) for number in range(in_flight)))
    times.clear()
    began = time.perf_counter()
    await asyncio.gather(*(caller(number, began + seconds) for number in range(in_flight)))
    took = time.perf_counter() - began
    stacks = replica.inference._stacks
    passes = stacks.passes if stacks is not None else 0
    await replica.close()
    return {
        "tenants": tenants, "in flight": in_flight, "rows": rows, "stacked": "yes" if stacked else "no",
        "requests/s": round(len(times) / took), "images/s": round(len(times) * rows / took),
        "p50 ms": round(float(np.quantile(times, 0.5)), 2), "p99 ms": round(float(np.quantile(times, 0.99)), 2),
        "stacked passes": passes,
    }  # fmt: skip


def median_ms(work: Callable[[], None], repeats: int) -> float:
    for _ in range(5):
        work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return round(statistics.median(times), 3)


if __name__ == "__main__":
    sys.exit(main())
