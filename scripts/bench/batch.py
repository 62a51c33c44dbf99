"""``flatshare batch`` beside the bare forward pass of the cores, and beside sending the rows to the service.

Rows are raw pixels of 28 x 28 in one Parquet file (octets, or lists of numbers), spread evenly over the tenants; results of the batch and of
the service are compared row by row. ``bare`` is one process a core, with the module in memory and its rows in
arrays, 64 rows a pass: no registry, no load, no decoding. The service is a platform with a replica a core that
has room for 20 models; a client sends each tenant's rows, 64 a request, 16 requests at a time, as octets.

``rows_per_s`` counts from the first row that a process takes; ``whole_s`` from the command's start to its end,
with the start of Ray and of its processes. Ends with 1 when a label was unequal or a row has none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import uvloop
from contenders import BIN, CONTENDERS, Capacity
from numpy.typing import NDArray
from safetensors.torch import save

from flatshare.api.schemas import MODEL_ID_HEADER
from flatshare.bench.client import Connection, Target
from flatshare.cli.context import credentials
from flatshare.cli.output import err, print_table
from flatshare.models.architecture import architecture
from flatshare_registry import Registry, TenantId
from flatshare_registry.settings import RegistrySettings

NETWORK = architecture("mnist-cnn")
PASS_ROWS = 64
AT_A_TIME = 16
SLOTS = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tenants", type=int, nargs="*", default=[50], help="a measurement for each number")
    parser.add_argument(
        "--column", choices=["octets", "lists"], default="octets", help="how the Parquet file holds an image"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results as a document")
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"XDG_STATE_HOME": folder, "FLATSHARE_STORE": (Path(folder) / "store").as_uri()}
        registry = Registry(RegistrySettings().open_store(), actor="bench-batch")
        say("registering models")
        names = [f"tenant-{number:04}" for number in range(max(arguments.tenants))]
        for seed, name in enumerate(names):
            torch.manual_seed(seed)
            registry.create_tenant(TenantId(name))
            registry.register(
                TenantId(name), save(dict(NETWORK.build().state_dict())), NETWORK.name, NETWORK.tensors
            )
        for tenants in arguments.tenants:
            say(f"{arguments.rows} rows of {tenants} tenants")
            found.append(measured(Path(folder), names[:tenants], arguments.rows, arguments.column))
    columns = [name for name in found[0] if name != "failed"]
    print_table("", [f"{name}#" for name in columns], [[one[name] for name in columns] for one in found])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2))
    return 1 if any(one["unequal"] or one["failed"] for one in found) else 0


def measured(folder: Path, names: list[str], rows: int, column: str) -> dict[str, Any]:
    pixels = np.random.default_rng(1).integers(0, 256, (rows, 28, 28), dtype=np.uint8)
    owners = np.array(names)[np.arange(rows) % len(names)]
    image: Any = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 28 * 28)
    if column == "octets":
        image = pa.FixedSizeBinaryArray.from_buffers(pa.binary(28 * 28), rows, [None, pa.py_buffer(pixels)])
    source, out = folder / f"{len(names)}.parquet", folder / f"out-{len(names)}"
    pq.write_table(pa.table({"image": image, "tenant": owners}), source)
    bare = bare_rows_per_s(pixels)
    say(f"bare: {bare:.0f} rows/s")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flatshare-bench-", dir="/dev/shm") as host:
        ran = subprocess.run(
            [BIN / "flatshare", "batch", "--input", source, "--model-column", "tenant", "--output", out, "--json"],
            capture_output=True, text=True, env={**os.environ, "FLATSHARE_HOST_DIR": host},
        )  # fmt: skip
    whole_s = time.monotonic() - began
    if ran.returncode:
        raise SystemExit(ran.stderr)
    report = json.loads(ran.stdout)
    say(f"batch: {report['rows_per_s']:.0f} rows/s")
    table = pq.read_table(out, columns=["row", "predicted_label"])
    labels = np.full(rows, -1)
    labels[table.column("row").to_numpy()] = table.column("predicted_label").to_numpy()
    served, service = served_labels(pixels, owners, names)
    say(f"service: {service:.0f} rows/s")
    return {
        "rows": rows,
        "tenants": len(names),
        "rows_per_s": round(report["rows_per_s"]),
        "bare_rows_per_s": round(bare),
        "service_rows_per_s": round(service),
        "of_bare": round(report["rows_per_s"] / bare, 2),
        "whole_s": round(whole_s, 1),
        "loads": report["loads"],
        "unequal": int((labels != served).sum()),
        "failed": report["failed"],
    }


def bare_rows_per_s(pixels: NDArray[np.uint8]) -> float:
    """One process a core, all at once."""
    cores = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(cores), context.Queue()
    parts = np.array_split(pixels, cores)
    workers = [context.Process(target=bare_pass, args=(part, barrier, answers)) for part in parts]
    for one in workers:
        one.start()
    times = [answers.get() for _ in workers]
    for one in workers:
        one.join()
    return len(pixels) / (max(ended for _, ended in times) - min(began for began, _ in times))


def bare_pass(pixels: NDArray[np.uint8], barrier: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    model = NETWORK.build()
    if NETWORK.channels_last:
        model = model.to(memory_format=torch.channels_last)
    rows = torch.from_numpy(NETWORK.preprocess(pixels))
    with torch.inference_mode():
        model(rows[:PASS_ROWS])
        barrier.wait()
        began = time.time()
        for start in range(0, len(rows), PASS_ROWS):
            model(rows[start : start + PASS_ROWS]).argmax(dim=1)
    answers.put((began, time.time()))


def served_labels(
    pixels: NDArray[np.uint8], owners: NDArray[Any], names: list[str]
) -> tuple[NDArray[np.int64], float]:
    """What the service answers, and how many rows a second."""
    labels = np.full(len(pixels), -1)
    requests: list[tuple[NDArray[np.int64], str]] = []
    for name in names:
        mine = np.flatnonzero(owners == name)
        requests += [(mine[start : start + PASS_ROWS], name) for start in range(0, len(mine), PASS_ROWS)]
    with CONTENDERS["flatshare"].start(Capacity(os.cpu_count() or 1, SLOTS)) as url:
        target = Target.of(url.replace("/predict", "/classify"))
        shown = {**credentials(url), "content-type": "application/octet-stream"}

        async def client(todo: Iterator[tuple[NDArray[np.int64], str]]) -> None:
            connection = Connection(target)
            for numbers, name in todo:
                body = pixels[numbers].tobytes()
                reply = await connection.post(target.request({**shown, MODEL_ID_HEADER: name}, body), 60)
                if reply.status == 200:
                    labels[numbers] = json.loads(reply.body)["predicted_label"]
            connection.close()

        async def all_of_them() -> None:
            todo = iter(requests)
            await asyncio.gather(*[client(todo) for _ in range(AT_A_TIME)])

        began = time.monotonic()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(all_of_them())
        return labels, len(pixels) / (time.monotonic() - began)


def say(text: str) -> None:
    err.print(text, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
