"""The offline core and the notebook's class: the labels of the service, row by row, whatever the form of the rows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save

from flatshare.api.app import create_app
from flatshare.api.identity import Identities
from flatshare.batch.classifier import OfflineClassifier
from flatshare.batch.core import OfflineCore, rows_of
from flatshare.errors import BadInput, Suspended
from flatshare.models.architecture import architecture
from flatshare.replica.build import Replica
from flatshare.settings import Settings
from flatshare_registry import Registry, TenantId
from flatshare_registry.errors import NotFound
from flatshare_registry.settings import RegistrySettings

NETWORK = architecture("mnist-cnn")
PIXELS: NDArray[np.uint8] = np.random.default_rng(3).integers(0, 256, (150, 28, 28), dtype=np.uint8)
READY = NETWORK.preprocess(PIXELS)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=(tmp_path / "store").as_uri(), slots=2, host_dir="off", device="cpu")


@pytest.fixture
def registry(settings: Settings) -> Registry:
    registry = Registry(RegistrySettings(store=settings.store).open_store())
    for seed, name in enumerate(("acme", "globex", "initech")):
        registry.create_tenant(TenantId(name))
        torch.manual_seed(seed)
        registry.register(
            TenantId(name), save(dict(NETWORK.build().state_dict())), NETWORK.name, NETWORK.tensors
        )
    return registry


@pytest.fixture
def core(settings: Settings, registry: Registry) -> Iterator[OfflineCore]:
    with OfflineCore(settings) as core:
        yield core


def png(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


async def served(settings: Settings, registry: Registry, path: str, **request: Any) -> list[int]:
    replica = Replica.build(settings, registry.store)
    app = create_app(
        replica.service, Identities(replica.heads, None), replica="r1", max_body_bytes=10**7, max_rows=1024
    )
    try:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://localhost"
        ) as client:
            reply = await client.post(path, **request)
            labels: list[int] = reply.raise_for_status().json()["predicted_label"]
            return labels
    finally:
        await replica.close()


async def test_labels_are_those_of_the_service_row_by_row(settings: Settings, registry: Registry) -> None:
    named = {"serve_multiplexed_model_id": "globex"}
    octets = {**named, "content-type": "application/octet-stream"}
    pixels = await served(settings, registry, "/classify", content=PIXELS.tobytes(), headers=octets)
    ready = await served(settings, registry, "/predict", json={"image": READY.tolist()}, headers=named)
    files = [("image", ("x.png", png(one), "image/png")) for one in PIXELS[:70]]
    images = await served(settings, registry, "/classify", files=files, headers=named)
    with OfflineCore(settings) as core:
        for rows in (PIXELS, PIXELS[:, None], PIXELS.reshape(-1, 784)):
            labels, record = core.predict("globex", rows)
            assert (labels.tolist(), record.name) == (pixels, "globex@1")
        assert core.predict("globex@1", READY)[0].tolist() == ready
        assert core.predict("globex", READY.astype(np.float64).reshape(-1, 784))[0].tolist() == ready
        assert core.predict("globex", [png(one) for one in PIXELS[:70]])[0].tolist() == images
        assert core.loads == 1


def test_the_notebooks_class_groups_rows_by_the_model_that_a_column_names(
    settings: Settings, registry: Registry
) -> None:
    tenants = np.array(["acme", "globex", "initech"])[np.arange(150) % 3]
    found = OfflineClassifier(model_column="tenant", settings=settings)({"image": READY, "tenant": tenants})
    assert found["image"] is READY
    with OfflineCore(settings) as core:
        for name in ("acme", "globex", "initech"):
            labels, record = core.predict(name, READY)
            mine = tenants == name
            assert (found["predicted_label"][mine] == labels[mine]).all()
            assert set(found["model"][mine]) == {f"{name}@1"} and set(found["digest"][mine]) == {
                record.digest
            }
    one = OfflineClassifier("acme", settings=settings).predict({"image": READY})
    assert (
        one["predicted_label"]
        == OfflineClassifier("acme@1", settings=settings)({"image": READY})["predicted_label"]
    ).all()
    for wrong in ({}, {"model": "a", "model_column": "b"}):
        with pytest.raises(BadInput):
            OfflineClassifier(settings=settings, **wrong)


def test_what_the_service_refuses_is_refused(
    core: OfflineCore, registry: Registry, settings: Settings
) -> None:
    with pytest.raises(NotFound):
        core.predict("nobody", READY)
    with pytest.raises(NotFound):
        core.predict("acme@9", READY)
    with pytest.raises(BadInput, match="raw pixels"):
        core.predict("acme", PIXELS.astype(np.int64))
    with OfflineCore(settings, ready=True) as ready:
        assert ready.predict("acme", PIXELS.astype(np.int64))[0].shape == (150,)
    with pytest.raises(BadInput):
        core.predict("acme", PIXELS[:, :27])
    with pytest.raises(BadInput):
        core.predict("acme", [b"no image"])
    registry.tenancy.suspend(TenantId("globex"))
    with pytest.raises(Suspended):
        core.predict("globex", READY)


def test_rows_of_three_channels_keep_their_order() -> None:
    network = architecture("mnist-resnet18")
    channels, height, width = network.input.shape
    flat = np.random.default_rng(0).integers(0, 256, (2, network.input.row_values), dtype=np.uint8)
    shape = (height, width) if channels == 1 else (height, width, channels)
    assert (rows_of(flat, network) == rows_of(flat.reshape(2, *shape), network)).all()


def test_weights_that_are_used_once_take_no_room_on_the_node(
    settings: Settings, registry: Registry, tmp_path: Path
) -> None:
    host = tmp_path / "host"
    with OfflineCore(settings.model_copy(update={"host_dir": str(host)})) as core:
        labels, _ = core.predict("acme", PIXELS, once=True)
        assert not list(host.rglob("tensors/*/*"))
        core.predict("globex", PIXELS)
        assert list(host.rglob("tensors/*/*"))
        core.predict("initech", PIXELS, once=True)  # two slots: acme goes
        again, _ = core.predict("acme", PIXELS)
        assert (again == labels).all()
        assert core.loads == 4
