"""``POST /pipelines/<name>`` over ASGI, on a real service; the step runs in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from flatshare.api.app import create_app
from flatshare.api.identity import Identities
from flatshare.errors import NoSuchPipeline, StepFailed
from flatshare.mnist.preprocessor import Preprocessor
from flatshare.pipelines.steps import batch_of
from flatshare_registry import Quotas, TenantId

from .conftest import World

PIXELS: NDArray[np.int64] = np.random.default_rng(1).integers(0, 256, (3, 28, 28))
ACME = {"serve_multiplexed_model_id": "acme"}


class Here:
    """Steps of this process."""

    names = ("images",)

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.makes: Any = None
        self.cancelled = asyncio.Event()

    def check(self, name: str) -> None:
        if name not in self.names:
            raise NoSuchPipeline(f"there is no pipeline {name}")

    async def arrays(self, name: str, body: bytes, request_id: str, tenant: str) -> Any:
        self.asked.append((request_id, tenant))
        if self.makes == "nothing, ever":
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        if isinstance(self.makes, Exception):
            raise self.makes
        return self.makes if self.makes is not None else Preprocessor().run(batch_of(body))


@pytest.fixture
def here() -> Here:
    return Here()


@pytest.fixture
async def client(world: World, here: Here) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(
        world.service, Identities(world.heads, None), replica="r1", max_body_bytes=150_000, max_rows=8,
        pipelines=here,
    )  # fmt: skip
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def test_the_notebooks_body_goes_through_the_step_to_the_model(
    world: World, client: httpx.AsyncClient, here: Here
) -> None:
    expected = world.right("acme", Preprocessor().run({"image": PIXELS})["image"])
    batch = {"image": PIXELS.tolist()}
    form = await client.post(  # as ``curl -d`` sends it
        "/pipelines/images", content=json.dumps(batch),
        headers={**ACME, "content-type": "application/x-www-form-urlencoded", "x-request-id": "mine"},
    )  # fmt: skip
    assert form.json() == {"predicted_label": expected}
    for body in (batch, json.dumps(batch)):  # an object, or the string of one
        reply = await client.post("/pipelines/images", json=body, headers={**ACME, "x-request-id": "mine"})
        assert (reply.status_code, reply.json()) == (200, {"predicted_label": expected})
        assert reply.headers["x-flatshare-version"] == "1"
    assert here.asked == [("mine", "acme")] * 3
    assert (await client.get("/pipelines")).json() == {"pipelines": ["images"]}


async def test_predict_names_the_pipeline_to_who_sends_raw_pixels(client: httpx.AsyncClient) -> None:
    reply = await client.post("/predict", json={"image": PIXELS.tolist()}, headers=ACME)
    assert reply.status_code == 400
    assert "/classify" in reply.json()["error"]["message"]
    assert "/pipelines/images" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("makes", "status", "code"),
    [
        (StepFailed("the step of pipeline images failed"), 500, "step_failed"),
        ({"other": np.zeros((1, 1, 28, 28))}, 500, "step_failed"),
        ({"image": np.zeros((9, 1, 28, 28))}, 413, "too_large"),
        ({"image": np.zeros((1, 1, 27, 28))}, 400, "bad_input"),
        ({"image": np.full((1, 1, 28, 28), np.nan)}, 400, "bad_input"),
    ],
)
async def test_what_a_step_makes_is_checked_and_the_place_comes_back(
    world: World, client: httpx.AsyncClient, here: Here, makes: Any, status: int, code: str
) -> None:
    here.makes = makes
    reply = await client.post("/pipelines/images", json={"image": PIXELS.tolist()}, headers=ACME)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert (world.service.admission.ongoing, world.service.quotas.held_bytes) == (0, 0)


async def test_wrong_calls_cost_no_step(client: httpx.AsyncClient, here: Here) -> None:
    body = {"image": PIXELS.tolist()}
    wrong = [
        await client.post("/pipelines/nothing", json=body, headers=ACME),
        await client.post("/pipelines/images", json=body),
        await client.post("/pipelines/images", json=body, headers={"serve_multiplexed_model_id": "nobody"}),
        await client.post("/pipelines/images", content=b"x", headers={**ACME, "content-type": "image/png"}),
        await client.post("/pipelines/images", content=b"1" * 200_000, headers=ACME),
        await client.get("/pipelines/images", headers=ACME),
    ]
    assert [one.status_code for one in wrong] == [404, 400, 404, 400, 413, 405]
    assert wrong[0].json()["error"]["code"] == "no_such_pipeline"
    assert here.asked == []


async def test_a_tenants_rate_counts_and_a_step_that_hangs_ends_with_the_deadline(
    world: World, client: httpx.AsyncClient, here: Here
) -> None:
    world.service._timeout_s = 0.2
    here.makes = "nothing, ever"
    reply = await client.post("/pipelines/images", json={"image": PIXELS.tolist()}, headers=ACME)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert here.cancelled.is_set(), "nobody works on for a caller that was told so"
    world.service._timeout_s, here.makes = 5, None
    world.registry.tenancy.set_quotas(TenantId("globex"), Quotas(requests_per_s=0.001, burst=1))
    headers = {"serve_multiplexed_model_id": "globex"}
    replies = [
        await client.post("/pipelines/images", json={"image": PIXELS.tolist()}, headers=headers)
        for _ in range(2)
    ]
    assert [one.status_code for one in replies] == [200, 429]
