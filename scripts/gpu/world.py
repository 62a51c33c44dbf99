"""What the checks run on: a device, CUDA's or a simulated one, and a replica over many tenants' models."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parent))

from flatshare.api.identity import LOCAL_OPERATOR
from flatshare.device.cuda import CudaDevice
from flatshare.device.runtime import CudaRuntime
from flatshare.device.testing.simulated_cuda import SimulatedCuda
from flatshare.device.torch_cuda import TorchCuda
from flatshare.models.architecture import Architecture, architecture
from flatshare.models.probe import probe_logits
from flatshare.replica.build import Replica
from flatshare.settings import Settings
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.stores.memory import MemoryStore

MIB = 1024**2


@dataclass
class Place:
    """Where checks run, and how long they may take."""

    simulated: bool
    models: int
    seconds: float
    repeats: int

    def runtime(self) -> CudaRuntime:
        return SimulatedCuda(1 << 32) if self.simulated else TorchCuda()

    def device(self) -> CudaDevice:
        return CudaDevice(self.runtime())

    def synchronize(self) -> None:
        if not self.simulated:
            torch.cuda.synchronize()


def network() -> Architecture:
    return architecture("mnist-cnn")


def weights(seed: int, name: str = "mnist-cnn") -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(architecture(name).build().state_dict())


def rows_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 1, 28, 28), dtype=np.float32) * 2 - 1


@dataclass
class World:
    """A replica on the device, and a registry of ``t0 … tN`` in memory."""

    device: CudaDevice
    replica: Replica
    _wanted: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, place: Place, tenants: int, **given: Any) -> World:
        store = MemoryStore()
        registry = Registry(store)
        for number in range(tenants):
            registry.create_tenant(TenantId(f"t{number}"))
            registry.register(
                TenantId(f"t{number}"), save(weights(number)), network().name, network().tensors,
                probe=lambda data: probe_logits(network(), data),
            )  # fmt: skip
        device = place.device()
        settings = Settings(host_dir="off", device="auto", **given)
        return cls(device, Replica.build(settings, store, device=device))

    async def ask(self, tenant: int, rows: np.ndarray) -> np.ndarray:
        service = self.replica.service
        with await service.enter(LOCAL_OPERATOR, ModelRef.parse(f"t{tenant}")) as ticket:
            return (await service.predict(ticket, lambda network: rows)).logits

    def error_of(self, tenant: int, rows: np.ndarray, found: np.ndarray) -> float:
        """Largest difference from the CPU's logits."""
        module = network().build()
        module.load_state_dict(weights(tenant))
        with torch.inference_mode():
            wanted = module(torch.from_numpy(rows)).numpy()
        return float(np.abs(found - wanted).max())


async def during(work: Awaitable[Any], beside: Callable[[], Awaitable[Any]]) -> Any:
    """A piece of work while another goes on again and again."""
    running = asyncio.ensure_future(work)

    async def again() -> int:
        turns = 0
        while not running.done():
            await beside()
            turns += 1
        return turns

    turns = await again()
    return await running, turns


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(np.array(values), share))


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
