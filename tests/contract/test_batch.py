"""``flatshare batch`` on a Ray of its own: every row labelled once, failures told, and one that is killed goes on.

That a label is the service's is in ``tests/unit/flatshare/batch/test_core.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from flatshare.models.architecture import architecture
from flatshare_registry import Registry, TenantId
from flatshare_registry.ids import PRODUCTION
from flatshare_registry.settings import RegistrySettings

NETWORK = architecture("mnist-cnn")
PIXELS: NDArray[np.uint8] = np.random.default_rng(8).integers(0, 256, (600, 28, 28), dtype=np.uint8)
TENANTS = np.array([f"batch-{n % 4}" for n in range(600)])
FLATSHARE = str(Path(sys.executable).parent / "flatshare")


class Place:
    """A store in a folder, and a command that works on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        store = (folder / "store").as_uri()
        self.registry = Registry(RegistrySettings(store=store).open_store(), actor="test")
        self.modules: dict[str, nn.Module] = {}
        self.environment: Mapping[str, str] = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("FLATSHARE_", "RAY_"))},
            "FLATSHARE_STORE": store, "FLATSHARE_HOST_DIR": str(folder / "host"), "XDG_STATE_HOME": str(folder),
        }  # fmt: skip
        for number in range(4):
            self.registry.create_tenant(TenantId(f"batch-{number}"))
            self.add(f"batch-{number}", number)

    def add(self, tenant: str, seed: int) -> None:
        torch.manual_seed(seed)
        module = NETWORK.build()
        weights = save(dict(module.state_dict()))
        made = self.registry.register(
            TenantId(tenant), weights, NETWORK.name, NETWORK.tensors, alias=PRODUCTION
        ).version
        self.modules[made.name] = module

    def right(self, name: str, pixels: NDArray[np.uint8]) -> list[int]:
        with torch.inference_mode():
            labels: list[int] = (
                self.modules[name](torch.from_numpy(NETWORK.preprocess(pixels))).argmax(1).tolist()
            )
            return labels

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [FLATSHARE, *arguments], env=self.environment, capture_output=True, text=True, timeout=240
        )

    def cli_json(self, *arguments: str) -> Any:
        done = self.cli(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("batch"))


@pytest.fixture(scope="module")
def table(place: Place) -> Path:
    path = place.folder / "x.parquet"
    image = pa.FixedSizeListArray.from_arrays(pa.array(PIXELS.reshape(-1)), 784)
    pq.write_table(pa.table({"image": image, "tenant": TENANTS}), path)
    return path


def rows_of(folder: Path) -> dict[int, dict[str, object]]:
    rows = [row for part in folder.glob("part-*.parquet") for row in pq.read_table(part).to_pylist()]
    found = {row["row"]: row for row in rows}
    assert len(found) == len(rows), "no row twice"
    return found


def labelled(folder: Path) -> dict[int, dict[str, object]]:
    """Rows with a label; one that failed at first has a row without one, too."""
    rows = [row for part in folder.glob("part-*.parquet") for row in pq.read_table(part).to_pylist()]
    return {row["row"]: row for row in rows if row["error"] is None}


def test_every_row_has_its_models_label_and_every_tenant_can_read_of_it(
    place: Place, table: Path, tmp_path: Path
) -> None:
    command = ("batch", "--input", str(table), "--model-column", "tenant", "--output", str(tmp_path / "out"))
    place.cli("tenants", "suspend", "batch-3")
    failed = place.cli(*command)
    assert failed.returncode == 6 and "150 rows have no label: tenant batch-3 is suspended" in failed.stderr
    assert sum(row["predicted_label"] is not None for row in rows_of(tmp_path / "out").values()) == 450
    place.cli("tenants", "resume", "batch-3")
    done = place.cli_json(*command)
    assert (done["rows"], done["done_before"], done["models"], done["failed"]) == (150, 450, 1, {})
    rows = labelled(tmp_path / "out")
    for number in range(4):
        mine = np.flatnonzero(f"batch-{number}" == TENANTS)
        assert [rows[row]["predicted_label"] for row in mine.tolist()] == place.right(
            f"batch-{number}@1", PIXELS[mine]
        )
        record = place.registry.version(TenantId(f"batch-{number}"), 1)
        assert {rows[row]["digest"] for row in mine.tolist()} == {record.digest}
        entry = place.cli_json("audit", "show", f"batch-{number}")[-1]
        assert (entry["action"], entry["detail"]["rows"]) == ("batch.run", "150")


def test_one_that_is_killed_goes_on_with_the_versions_that_it_began_with(
    place: Place, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    np.save(tmp_path / "x.npy", np.tile(PIXELS, (80, 1, 1)))
    command = [
        FLATSHARE,
        "batch",
        "--input",
        str(tmp_path / "x.npy"),
        "--model",
        "batch-1",
        "--output",
        str(out),
    ]
    running = subprocess.Popen(command, env=place.environment, start_new_session=True)
    process = psutil.Process(running.pid)
    while not list(out.glob("part-*.parquet")):
        assert running.poll() is None, "it ended before it was killed: make it longer"
        try:
            running.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    family = [process, *process.children(recursive=True)]
    for one in family:
        one.kill()
    psutil.wait_procs(family, timeout=20)
    before = len(rows_of(out))
    assert 0 < before < 48_000
    place.add("batch-1", 999)
    done = place.cli_json(*command[1:])
    assert (done["rows"], done["done_before"]) == (48_000 - before, before)
    rows = rows_of(out)
    assert len(rows) == 48_000 and {row["model"] for row in rows.values()} == {"batch-1@1"}
    other = place.cli("batch", "--input", str(table), "--model", "batch-1", "--output", str(out))
    assert other.returncode == 2 and "name a new folder" in other.stderr
    assert json.loads((out / "_batch.json").read_text())["versions"] == {"batch-1": "batch-1@1"}
