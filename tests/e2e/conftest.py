"""One real platform for a module: Ray, replicas, edge and an S3 over HTTP, all started by the CLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from flatshare.models.architecture import architecture
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import PRODUCTION, TenantId
from flatshare_registry.records import Scope
from flatshare_registry.stores.open import open_store
from flatshare_registry.stores.s3 import S3Options
from flatshare_registry.testing.ports import free_ports
from flatshare_registry.testing.s3_server import CREDENTIALS

NETWORK = architecture("mnist-cnn")
MODEL = "serve_multiplexed_model_id"
FLATSHARE = str(Path(sys.executable).parent / "flatshare")
UP_TIMEOUT_S = 180


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/e2e" in str(item.path):
            item.add_marker(pytest.mark.e2e)


@dataclass
class Platform:
    """A running platform, and what its tenants' models really say."""

    url: str
    port: int
    environment: dict[str, str]
    registry: Registry
    modules: dict[str, nn.Module] = field(default_factory=dict)

    @cached_property
    def admin_key(self) -> str:
        """Made by ``up``, in a file of its own."""
        return (Path(self.environment["XDG_STATE_HOME"]) / "flatshare" / "admin.key").read_text().strip()

    @property
    def admin(self) -> dict[str, str]:
        """The header that shows it."""
        return {"authorization": f"Bearer {self.admin_key}"}

    @cached_property
    def http(self) -> httpx.Client:
        """A client that shows it."""
        return httpx.Client(headers=self.admin, timeout=60)

    def key(self, tenant: str, *scopes: Scope) -> str:
        """A new key of a tenant, known to every replica."""
        made = self.registry.tenancy.create_key(TenantId(tenant), scopes or (Scope.PREDICT,))
        self.http.post(f"{self.url}/admin/tenants/{tenant}/refresh").raise_for_status()
        return made.text

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [FLATSHARE, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=UP_TIMEOUT_S,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def cli_json(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "--json").stdout)

    def add(self, tenant: str, seed: int, *, promote: bool = False, tell: bool = True) -> int:
        """Register random weights as a tenant's next version; a new tenant need not be told of."""
        parsed = TenantId(tenant)
        if not any(head.tenant == tenant for head in self.registry.list_tenants()):
            self.registry.create_tenant(parsed)
        torch.manual_seed(seed)
        module = NETWORK.build()
        record = self.registry.register(
            parsed,
            save(dict(module.state_dict())),
            NETWORK.name,
            NETWORK.tensors,
            alias=PRODUCTION if promote else None,
        ).version
        self.modules[record.name] = module
        if tell:
            self.http.post(f"{self.url}/admin/tenants/{tenant}/refresh").raise_for_status()
        return record.version

    def right(self, name: str, rows: NDArray[np.float32]) -> list[int]:
        """What this version says, worked out here."""
        with torch.inference_mode():
            labels: list[int] = self.modules[name](torch.from_numpy(rows)).argmax(dim=1).tolist()
            return labels

    def predict(self, model: str, rows: NDArray[np.float32]) -> httpx.Response:
        return self.http.post(f"{self.url}/predict", json={"image": rows.tolist()}, headers={MODEL: model})

    def fleet(self) -> Any:
        return self.http.get(f"{self.url}/admin/replicas").raise_for_status().json()

    def residents(self) -> dict[str, set[str]]:
        """Models by replica."""
        return {
            one["replica"]: {f"{model['tenant']}@{model['version']}" for model in one["models"]}
            for one in self.fleet()["replicas"]
        }


def random_rows(count: int, seed: int = 0) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = (
        np.random.default_rng(seed).random((count, 1, 28, 28), dtype=np.float32) * 2 - 1
    )
    return rows


def start(folder: Path, s3_url: str, prefix: str, *options: str, **settings: str) -> Platform:
    """``flatshare up --detach`` with everything of its own."""
    port, serve_port = free_ports(2)
    store = f"s3://models/{prefix}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("FLATSHARE_", "RAY_"))},
        **CREDENTIALS,
        "AWS_ENDPOINT_URL": s3_url,
        "FLATSHARE_STORE": store,
        # Where a company's machines are: nothing within the platform may ask this proxy.
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "no_proxy": "127.0.0.1",
        "XDG_STATE_HOME": str(folder),
        "FLATSHARE_HOST_DIR": str(folder / "host"),
        "FLATSHARE_USAGE_INTERVAL_S": "1",
        **settings,
    }
    platform = Platform(
        f"http://127.0.0.1:{port}",
        port,
        environment,
        Registry(open_store(store, S3Options(endpoint_url=s3_url)), actor="e2e"),
    )
    platform.cli(
        "up", "--detach", "--ray", "local", "--port", str(port), "--serve-port", str(serve_port), *options
    )
    return platform


def processes_of(platform: Platform) -> list[psutil.Process]:
    """The ``up`` process and all below it."""
    state = json.loads(
        next(Path(platform.environment["XDG_STATE_HOME"]).rglob("platform-*.json")).read_text()
    )
    up = psutil.Process(state["pid"])
    return [up, *up.children(recursive=True)]


def end(platform: Platform) -> None:
    """``flatshare down``; nothing may be left."""
    family = processes_of(platform)
    names = {one.pid: one.name() for one in family}
    platform.cli("down", "--port", str(platform.port))
    _, alive = psutil.wait_procs(family, timeout=10)
    left = [names[one.pid] for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    for one in alive:
        one.kill()
    assert left == [], "down left processes behind"


@pytest.fixture(scope="package")
def s3_url_e2e() -> Iterator[str]:
    """An S3 server in a process of its own: in this one it would share the interpreter lock with clients."""
    os.environ |= CREDENTIALS
    server = subprocess.Popen(
        [sys.executable, "-m", "flatshare_registry.testing.s3_server", "--bucket", "models"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    yield server.stdout.readline().strip()
    server.terminate()
    server.wait(10)


@pytest.fixture(scope="package")
def platform(tmp_path_factory: pytest.TempPathFactory, s3_url_e2e: str) -> Iterator[Platform]:
    """Two replicas of three slots behind HAProxy, shared by the tests that do not change it."""
    (metrics_port,) = free_ports(1)
    running = start(
        tmp_path_factory.mktemp("state"), s3_url_e2e, "shared", "--replicas", "2", "--slots", "3",
        FLATSHARE_EDGE_METRICS_PORT=str(metrics_port),
    )  # fmt: skip
    yield running
    end(running)
