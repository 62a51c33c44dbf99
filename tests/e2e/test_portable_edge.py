"""``--edge serve``: Serve's own proxy with our router; and the ``DeploymentHandle`` form."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Platform, end, random_rows, start

HANDLE_CLIENT = """
import asyncio, json, sys
import numpy as np
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
from flatshare.pool.handle import pool_handle
from flatshare_registry.errors import NotFound

rows = np.load(sys.argv[2])
handle = pool_handle()
answers = [
    handle.options(multiplexed_model_id=model).predict.remote({"image": rows}).result(timeout_s=60)
    for model in ("one", "two", "one")
]
try:
    handle.options(multiplexed_model_id="nobody").predict.remote({"image": rows}).result(timeout_s=60)
    refused = ""
except NotFound as error:
    refused = error.cause.message
streaming = handle.options(multiplexed_model_id="two", stream=True)
streamed = [one["predicted_label"].tolist() for one in streaming.predict_each.remote([{"image": rows[:1]}, {"image": rows}])]
print(json.dumps({"streamed": streamed, "labels": [one["predicted_label"].tolist() for one in answers],
                  "keys": sorted(answers[0]), "refused": refused}))
"""


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory, s3_url_e2e: str) -> Iterator[Platform]:
    running = start(
        tmp_path_factory.mktemp("state"),
        s3_url_e2e,
        "portable",
        "--edge",
        "serve",
        "--replicas",
        "2",
        "--slots",
        "8",
    )
    yield running
    end(running)


def test_models_keep_their_home_replica(portable: Platform) -> None:
    rows = random_rows(3)
    for number in range(4):
        portable.add(f"home-{number}", number)
    homes: dict[str, Counter[str]] = {}
    for _ in range(10):
        for number in range(4):
            tenant = f"home-{number}"
            reply = portable.predict(tenant, rows)
            assert reply.json() == {"predicted_label": portable.right(f"{tenant}@1", rows)}
            homes.setdefault(tenant, Counter())[reply.headers["x-flatshare-replica"]] += 1
    for tenant, replicas in homes.items():
        assert max(replicas.values()) >= 9, f"{tenant} moved about: {replicas}"
    # All four may have the same home by chance (replica ids are random), hence slots for all of them;
    # each is loaded there, and once more at most where one request spilled.
    assert portable.fleet()["totals"]["loads"] <= 8


def test_errors_and_limits_are_the_same_without_haproxy(portable: Platform) -> None:
    reply = portable.predict("nobody", random_rows(1))
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    huge = portable.http.post(
        f"{portable.url}/predict",
        content=b"x" * (9 * 1024**2),
        headers={"serve_multiplexed_model_id": "home-0"},
        timeout=60,
    )
    assert (huge.status_code, huge.json()["error"]["code"]) == (413, "too_large")


def test_the_handle_form(portable: Platform, tmp_path: Path) -> None:
    import numpy as np

    rows = random_rows(2)
    portable.add("one", 51)
    portable.add("two", 52)
    np.save(tmp_path / "rows.npy", rows)
    state = json.loads(
        next(Path(portable.environment["XDG_STATE_HOME"]).rglob("platform-*.json")).read_text()
    )
    done = subprocess.run(
        [sys.executable, "-c", HANDLE_CLIENT, state["ray_address"], str(tmp_path / "rows.npy")],
        env={
            **portable.environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{portable.environment['XDG_STATE_HOME']}/flatshare/ray.token",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    one, two = portable.right("one@1", rows), portable.right("two@1", rows)
    assert answer["labels"] == [one, two, one]
    assert answer["streamed"] == [two[:1], two]
    assert answer["keys"] == ["image", "predicted_label"]
    assert answer["refused"] == "there is no tenant nobody"
