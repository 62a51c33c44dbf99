"""Replicas killed by SIGKILL under load: how many requests fail, are cut, or are answered wrongly.

A platform of its own on loopback, and clients that send bodies of 3 kB, 40 kB and 500 kB without a pause. A replica
is killed at random as soon as another one runs, again and again. What the edge may send again (bodies of up to 64 KiB)
must be answered, all of it. A longer one gets a 502 in JSON, or, on a connection that carried requests before, is
closed without a word, which HAProxy does so that the client sends it again. Ends with 1 when a request failed otherwise.
The edge's access log is on: each request has one line there, but for those that are closed without a word.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from contenders import CONTENDERS, Capacity
from safetensors.torch import save

from flatshare.bench.load import Load, Outcome, run_load
from flatshare.bench.workload import BenchRequest
from flatshare.cli.context import credentials
from flatshare.cli.output import err, out, print_table, progress_bar
from flatshare.codecs.tensors import DTYPE_HEADER, SHAPE_HEADER
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare_registry import Registry, TenantId
from flatshare_registry.settings import RegistrySettings

NETWORK = architecture("mnist-cnn")
ROWS = {"3kb": 1, "40kb": 13, "500kb": 160}
"""Rows of a body, as 32-bit floats; each length has tenants of its own, so that an answer tells its length."""

RESENT = ("3kb", "40kb")
"""Bodies that the edge may send again."""

TENANTS = 2  # of each length
LONGEST_WAIT_S = 120
"""Seconds within which a second replica must run again."""

SETTLE_S = (0.3, 1.5)
"""Between two kills, once two replicas run: so that they hit replicas at different moments of their lives."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the results as a document")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FLATSHARE_STORE"] = f"file://{folder}/store"
        os.environ["XDG_STATE_HOME"] = f"{folder}/state"
        log = Path(folder) / "access.log"
        os.environ["FLATSHARE_ACCESS_LOG"] = str(log)
        shots = requests(arguments.seed)
        with CONTENDERS["flatshare"].start(Capacity(arguments.replicas, TENANTS * len(ROWS))) as url:
            killer = Killer(url, arguments.kills, arguments.replicas, arguments.seed)
            killer.start()
            load = Load(requests=None, concurrency=arguments.concurrency, headers=credentials(url))
            outcomes = run_load(url, itertools.takewhile(lambda _: killer.is_alive(), shots), load)
            killer.join()
        lines = [one for one in map(json.loads, log.read_text().splitlines()) if one["path"] == "/predict"]
    if killer.error is not None:
        err.print(f"the kills ended early: {killer.error}")
    document = {**results(killer, outcomes), "lines": len(lines), "ids": len({one["id"] for one in lines})}
    document["answered_lines"] = sum(one["status"] == 200 and one["tier"] != "-" for one in lines)
    print_table(
        "", ["body", "requests#", "ok#", "502 in JSON#", "closed#", "failed#", "cut#", "wrong#"],
        [(name, *(one[key] for key in ("requests", "ok", "bad_gateway", "closed", "failed", "cut", "wrong")))
         for name, one in document["bodies"].items()],
    )  # fmt: skip
    out.print(
        f"{document['kills']} kills under {document['requests']} requests, {document['lines']} lines of log"
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(document, indent=2))
    good = killer.error is None and not (document["failed"] or document["cut"] or document["wrong"])
    return 0 if good else 1


def requests(seed: int) -> Iterator[BenchRequest]:
    """Endless: a random tenant's random body, with what it rightly answers."""
    registry = Registry(RegistrySettings().open_store(), actor="kills")
    dice = np.random.default_rng(seed)
    pool: list[BenchRequest] = []
    for seed_of_model, (name, count) in enumerate(itertools.product(ROWS, range(TENANTS))):
        torch.manual_seed(seed_of_model)
        module = NETWORK.build()
        tenant = TenantId(f"{name}-{count}")
        registry.create_tenant(tenant)
        registry.register(
            tenant, save(dict(module.state_dict())), NETWORK.name, NETWORK.tensors,
            probe=lambda weights: probe_logits(NETWORK, weights),
        )  # fmt: skip
        rows = dice.random((ROWS[name], *NETWORK.input.shape), dtype=np.float32)
        with torch.inference_mode():
            labels = tuple(module(torch.from_numpy(rows)).argmax(dim=1).tolist())
        headers = ((DTYPE_HEADER, "float32"), (SHAPE_HEADER, ",".join(map(str, rows.shape))))
        pool.append(BenchRequest(str(tenant), rows.tobytes(), labels, "application/octet-stream", headers))
    # One body of 500 kB costs as much as a hundred of 3 kB: seldom enough that the others are many.
    weights = np.repeat([0.7, 0.25, 0.05], TENANTS) / TENANTS

    def endless() -> Iterator[BenchRequest]:
        while True:
            for index in dice.choice(len(pool), size=1024, p=weights).tolist():
                yield pool[index]

    return endless()


class Killer(threading.Thread):
    """Kills replicas, one after the other, each when another one runs."""

    def __init__(self, url: str, kills: int, replicas: int, seed: int) -> None:
        super().__init__(name="killer", daemon=True)
        self._base = url.removesuffix("/predict")
        self._wanted = kills
        self._replicas = replicas
        self._dice = random.Random(seed)
        self._client = httpx.Client(headers=credentials(url), timeout=30)
        self.kills = 0
        self.error: str | None = None

    def run(self) -> None:
        """Until there were enough, or no second replica came back."""
        try:
            with progress_bar("kills") as progress:
                while self.kills < self._wanted:
                    threading.Event().wait(
                        self._dice.uniform(*SETTLE_S)
                    )  # a moment of their choice, not an event
                    psutil.Process(self._dice.choice(self._running())).kill()
                    self.kills += 1
                    progress(self.kills, self._wanted)
                self._running()
        except Exception as error:
            self.error = str(error) or type(error).__name__

    def _running(self) -> list[int]:
        """Process ids of replicas, once all run and answer."""
        pause = threading.Event()
        for _ in range(LONGEST_WAIT_S * 5):
            try:
                found: dict[str, Any] = self._client.get(f"{self._base}/admin/replicas").json()
                pids = [one["pid"] for one in found.get("replicas", []) if one.get("state") == "RUNNING"]
                if (
                    len(pids) == self._replicas
                    and not found["not_answering"]
                    and all(map(psutil.pid_exists, pids))
                ):
                    return pids
            except (httpx.HTTPError, ValueError, KeyError):
                pass
            pause.wait(0.2)  # readiness shows only by asking
        raise TimeoutError(f"no {self._replicas} replicas within {LONGEST_WAIT_S} s")


def results(killer: Killer, outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts, in all and by body."""
    bodies: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in ROWS}
    other: collections.Counter[str] = collections.Counter()
    for one in outcomes:
        name = one.model.partition("-")[0]
        counts = bodies[name]
        counts["requests"] += 1
        if one.code == "ok":
            counts["wrong" if one.right is False else "ok"] += 1
        elif one.code == "cut_answer":
            counts["cut"] += 1
        elif name not in RESENT and one.code in ("bad_gateway", "no_answer"):
            counts["bad_gateway" if one.code == "bad_gateway" else "closed"] += 1
        else:
            counts["failed"] += 1
            other[f"{name}: {one.code}"] += 1
    keys = ("requests", "ok", "bad_gateway", "closed", "failed", "cut", "wrong")
    by_body = {name: {key: counts[key] for key in keys} for name, counts in bodies.items()}
    return {
        "kills": killer.kills,
        **{key: sum(one[key] for one in by_body.values()) for key in keys},
        "bodies": by_body,
        "other": dict(other),
    }


if __name__ == "__main__":
    sys.exit(main())
