"""Composed deployments on a real platform: the notebook's section 4, kills, scaling, a step of one's own."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import torch
from numpy.typing import NDArray

from flatshare.bench.load import Load, send_all
from flatshare.bench.workload import BenchRequest
from flatshare.mnist.pixels import preprocess

from .conftest import MODEL, Platform, end, processes_of, start

API = Path(__file__).parents[2] / "platform/API.md"
PIXELS: NDArray[np.uint8] = np.random.default_rng(4).integers(0, 256, (10, 28, 28), dtype=np.uint8)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, s3_url_e2e: str) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("state")
    # API.md's step of one's own, as it stands there.
    (found,) = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", API.read_text(), re.DOTALL)
    (folder / f"{found[0]}.py").write_text(found[1])
    pipelines = {
        "images": {
            "max_replicas": 3,
            "target_ongoing_requests": 1,
            "upscale_delay_s": 1,
            "cpus_per_replica": 0.1,
        },
        "inverted": {"step": f"{found[0]}:Inverted", "cpus_per_replica": 0.1},
    }
    running = start(
        folder, s3_url_e2e, "pipelines", "--replicas", "2", "--slots", "3",
        PYTHONPATH=str(folder), FLATSHARE_PIPELINES=json.dumps(pipelines), FLATSHARE_CPUS_PER_REPLICA="0.5",
    )  # fmt: skip
    for number in range(3):
        running.add(f"t{number}", 900 + number)
    yield running
    end(running)


def right(platform: Platform, tenant: str, pixels: NDArray[np.uint8]) -> list[int]:
    return platform.right(f"{tenant}@1", preprocess(pixels))


def steps_of(platform: Platform, name: str = "images") -> list[int]:
    title = f"ray::ServeReplica:flatshare-pipeline-{name}"
    found = []
    for one in processes_of(platform):
        try:
            if " ".join(one.cmdline()).startswith(title):
                found.append(one.pid)
        except psutil.Error:
            pass  # it ended between two looks
    return found


def test_the_notebooks_composed_app(platform: Platform) -> None:
    image_batch = {"image": PIXELS}
    url = f"{platform.url}/pipelines/images"
    headers = {MODEL: "t1", "authorization": f"Bearer {platform.key('t1')}"}
    # Verbatim from the notebook (4.3), with the path and the headers added.
    json_request = json.dumps({"image": image_batch["image"].tolist()})
    response = requests.post(url, json=json_request, headers=headers)
    assert response.json()["predicted_label"] == right(platform, "t1", PIXELS)
    assert response.headers["x-flatshare-tenant"] == "t1"
    assert requests.get(f"{platform.url}/pipelines", headers=headers).json() == {
        "pipelines": ["images", "inverted"]
    }
    # A key of another tenant may not, whatever the step is.
    other = {MODEL: "t0", "authorization": headers["authorization"]}
    assert requests.post(url, json=json_request, headers=other).status_code == 404


def test_the_readmes_step_of_ones_own(platform: Platform) -> None:
    reply = platform.http.post(
        f"{platform.url}/pipelines/inverted", json={"image": PIXELS.tolist()}, headers={MODEL: "t2"}
    )
    assert reply.json() == {"predicted_label": right(platform, "t2", 255 - PIXELS)}
    wrong = platform.http.post(
        f"{platform.url}/pipelines/inverted", json={"picture": 1}, headers={MODEL: "t2"}
    )
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (500, "step_failed")
    assert "KeyError" not in wrong.text and "Traceback" not in wrong.text


def test_a_killed_step_costs_no_request_and_steps_scale_while_the_pool_stays(platform: Platform) -> None:
    before = [one["pid"] for one in platform.fleet()["replicas"]]
    assert len(steps_of(platform)) == 1
    expected = {f"t{n}": right(platform, f"t{n}", PIXELS) for n in range(3)}
    killed = threading.Event()
    most = 0

    def shots() -> Iterator[BenchRequest]:
        nonlocal most
        began = time.monotonic()
        number = 0
        while time.monotonic() - began < 16 and number < 20_000:
            row, tenant = number % 10, f"t{number % 3}"
            if number % 100 == 99:
                running = steps_of(platform)
                most = max(most, len(running))
                if not killed.is_set() and time.monotonic() - began > 3:
                    psutil.Process(running[0]).kill()
                    killed.set()
            body = json.dumps({"image": PIXELS[row : row + 1].tolist()}).encode()
            yield BenchRequest(tenant, body, (expected[tenant][row],))
            number += 1

    load = Load(requests=20_000, concurrency=8, headers=platform.admin)
    outcomes = asyncio.run(send_all(f"{platform.url}/pipelines/images", shots(), load))
    assert killed.is_set()
    assert [(one.status, one.code) for one in outcomes if one.status != 200] == []
    assert all(one.right for one in outcomes) and len(outcomes) > 500
    assert most == 3, "the step scales by its own load"
    assert [one["pid"] for one in platform.fleet()["replicas"]] == before, "and the pool does not"


def test_what_a_step_gets_is_what_a_torch_user_would_send(platform: Platform) -> None:
    """Rows that torchvision made, sent to /predict, and pixels sent to the pipeline have the same labels."""
    from torchvision import transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    rows: Any = torch.stack([transform(image) for image in PIXELS]).numpy()
    direct = platform.predict("t0", rows).json()
    reply = platform.http.post(
        f"{platform.url}/pipelines/images", json={"image": PIXELS.tolist()}, headers={MODEL: "t0"}
    )
    assert reply.json() == direct
