"""One actor's work without Ray: a bad row costs itself, and what can't go on says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from flatshare.batch import actor as actor_module
from flatshare.batch.actor import UnitRunner
from flatshare.batch.inputs import open_input
from flatshare.batch.units import units_of
from flatshare.errors import DeviceBroken
from flatshare.models.architecture import architecture
from flatshare.settings import Settings
from flatshare_registry import Registry, TenantId
from flatshare_registry.settings import RegistrySettings

NETWORK = architecture("mnist-cnn")
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(store=(tmp_path / "store").as_uri(), slots=2, host_dir="off", device="cpu")
    registry = Registry(RegistrySettings(store=settings.store).open_store())
    registry.create_tenant(TenantId("acme"))
    torch.manual_seed(0)
    registry.register(
        TenantId("acme"), save(dict(NETWORK.build().state_dict())), NETWORK.name, NETWORK.tensors
    )
    return settings


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    source = open_input(str(folder))
    counts = [rows for _, rows in source.files]
    units = units_of(counts, "acme@1", np.zeros(sum(counts), bool))
    batch = {
        "version": [one.version for one in units], "file": [one.file for one in units],
        "first": [one.first for one in units], "numbers": [one.numbers.tobytes() for one in units],
        "once": [one.once for one in units],
    }  # fmt: skip
    return UnitRunner(source, settings, False)(batch)  # type: ignore[arg-type]  # Ray gives arrays


def test_a_bad_row_costs_no_other_its_label(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    (folder / "07.png").write_bytes(b"no image")
    (folder / "21.png").unlink()
    (folder / "21.png").symlink_to("/nowhere")
    found = run(settings, folder)
    errors = {
        str(file).rpartition("/")[2]: str(error)
        for file, error in zip(found["file"], found["error"], strict=True)
        if error
    }
    assert set(errors) == {"07.png"} | ({"21.png"} if "21.png" in errors else set())
    assert "07.png" in errors
    good = found["error"] == ""
    model = NETWORK.build()
    torch.manual_seed(0)
    model = NETWORK.build()
    rows = [int(str(file).rpartition("/")[2][:2]) for file in found["file"][good]]
    with torch.inference_mode():
        right = model(torch.from_numpy(NETWORK.preprocess(PIXELS[rows]))).argmax(1).numpy()
    assert (found["predicted_label"][good] == right).all() and good.sum() >= 38


def test_a_process_whose_device_is_lost_ends(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    ended: list[int] = []

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        ended.append(code)
        raise Ended

    async def broken(self: object, *_: object) -> None:
        raise DeviceBroken("lost")

    monkeypatch.setattr(actor_module.os, "_exit", end)
    monkeypatch.setattr("flatshare.batch.core.OfflineCore._try", broken)
    with pytest.raises(Ended):
        run(settings, tmp_path / "x.npy")
    assert ended == [1]
