"""What a pipeline's hop costs: the same pixels to ``/pipelines/images`` and to ``/classify``, one at a time.

Both answer for raw pixels with one model; ``/classify`` takes octets, the pipeline the notebook's JSON, which
its step parses. So a third contender is JSON to ``/predict``, whose replica parses as much. The step alone is
asked by a handle of this process, by value and by reference. Turn by turn; medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import torch
from contenders import CONTENDERS, Capacity
from safetensors.torch import save

from flatshare.api.schemas import MODEL_ID_HEADER
from flatshare.cli.context import credentials
from flatshare.cli.output import print_table
from flatshare.local.state import PlatformState
from flatshare.models.architecture import architecture
from flatshare_registry import Registry, TenantId
from flatshare_registry.settings import RegistrySettings

NETWORK = architecture("mnist-cnn")

STEP_CLIENT = """
import json, statistics, sys, time
from flatshare.local.ray_token import cluster_token_file
from flatshare.pool.environment import prepare
address = sys.argv[1]
prepare("haproxy", cluster_token_file(address))
from flatshare.local.cluster import joined_cluster
with joined_cluster(address):
    from flatshare.pool import steps
    from ray import serve
    handle = serve.get_deployment_handle(steps.STEP_DEPLOYMENT, app_name=steps.step_app("images"))
    ways = {"by_value": handle, "by_reference": handle.options(_by_reference=True)}
    found = {}
    for line in sys.stdin:
        rows, turns = json.loads(line)
        body = json.dumps({"image": [[[7] * 28] * 28] * rows}).encode()
        for turn in range(turns + 2):
            for name, way in ways.items():
                began = time.perf_counter()
                way.run.remote(steps.StepRequest(body, "r", "acme")).result(timeout_s=60)
                if turn > 1:
                    found.setdefault(name, {}).setdefault(rows, []).append((time.perf_counter() - began) * 1000)
    print(json.dumps({name: {rows: statistics.median(times) for rows, times in by.items()} for name, by in found.items()}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64, 256, 512])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--json", metavar="FILE", help="write the results as a document")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "XDG_STATE_HOME": folder, "FLATSHARE_STORE": (Path(folder) / "store").as_uri(),
            "FLATSHARE_PIPELINES": json.dumps({"images": {}}),
        }  # fmt: skip
        registry = Registry(RegistrySettings().open_store(), actor="bench-pipeline")
        registry.create_tenant(TenantId("acme"))
        torch.manual_seed(0)
        registry.register(
            TenantId("acme"), save(dict(NETWORK.build().state_dict())), NETWORK.name, NETWORK.tensors
        )
        with CONTENDERS["flatshare"].start(Capacity(1, 2)) as url:
            found = [measured(url.removesuffix("/predict"), rows, arguments.turns) for rows in arguments.rows]
            state = PlatformState.load(urlsplit(url).port or 0)
            assert state is not None, "it was just started"
            asked = "".join(json.dumps([rows, arguments.turns]) + "\n" for rows in arguments.rows)
            done = subprocess.run(
                [sys.executable, "-c", STEP_CLIENT, state.ray_address],
                input=asked,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            steps = json.loads(done.stdout.splitlines()[-1])
            for one in found:
                one |= {f"step_{way}": round(steps[way][str(one["rows"])], 2) for way in steps}
    print_table("", [f"{name}#" for name in found[0]], [list(one.values()) for one in found])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2))
    return 0


def measured(base: str, rows: int, turns: int) -> dict[str, Any]:
    pixels = np.random.default_rng(rows).integers(0, 256, (rows, 28, 28), dtype=np.uint8)
    body = json.dumps({"image": pixels.tolist()}).encode()
    ready = json.dumps({"image": NETWORK.preprocess(pixels).round(4).tolist()}).encode()
    headers = {**credentials(base), MODEL_ID_HEADER: "acme", "content-type": "application/json"}
    octets = {**headers, "content-type": "application/octet-stream"}
    times: dict[str, list[float]] = {"classify": [], "predict": [], "pipeline": []}
    with httpx.Client(timeout=60) as client:
        ways: dict[str, Callable[[], httpx.Response]] = {
            "classify": lambda: client.post(f"{base}/classify", content=pixels.tobytes(), headers=octets),
            "predict": lambda: client.post(f"{base}/predict", content=ready, headers=headers),
            "pipeline": lambda: client.post(f"{base}/pipelines/images", content=body, headers=headers),
        }
        for turn in range(turns + 3):
            for name, way in ways.items():
                began = time.perf_counter()
                reply = way()
                if reply.status_code != 200:
                    raise SystemExit(f"{name} answered {reply.status_code}: {reply.text}")
                if turn > 2:
                    times[name].append((time.perf_counter() - began) * 1000)
    medians = {f"{name}_ms": round(statistics.median(one), 2) for name, one in times.items()}
    return {"rows": rows, "json_kB": round(len(body) / 1000, 1), **medians}


if __name__ == "__main__":
    sys.exit(main())
