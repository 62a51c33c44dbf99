"""The two halves of a load, as the cache sees them: fetch the bytes, then place them on the device."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from flatshare.cache.tiers import Tier
from flatshare.errors import ModelFailed
from flatshare.models.architecture import architecture
from flatshare.models.materialize import device_bytes, materialize
from flatshare_registry import layout
from flatshare_registry.errors import Corrupt, InvalidInput, InvalidWeights, NotFound
from flatshare_registry.records import VersionRecord
from flatshare_registry.stores.base import BlobStore
from flatshare_registry.weights import check_architecture, check_layout

__all__ = ["DevicePlacer", "Fetched", "Placed", "Placer", "StoreSource", "WeightsSource"]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A whole safetensors file whose sha256 is the record's, and where it came from."""

    data: bytes
    tier: Tier


@dataclass(frozen=True, slots=True)
class Placed:
    """A module that is ready to run, and the device bytes that it takes (measured, not claimed)."""

    module: nn.Module
    size_bytes: int


class WeightsSource(Protocol):
    """Gets a version's bytes. The next tier (host) will be a source in front of this one."""

    async def fetch(self, record: VersionRecord) -> Fetched:
        """The bytes, verified.

        Raises
        ------
        Corrupt
            They are not what the record says, or are gone.
        Unavailable
            The store did not answer.
        """
        ...


class Placer(Protocol):
    """Puts verified bytes on the device."""

    def check(self, record: VersionRecord) -> None:
        """Refuse, before anything is fetched or evicted, what can't be placed.

        Raises
        ------
        ModelFailed
            Its architecture is not installed here, or has other tensors.
        """
        ...

    async def prepare(self, record: VersionRecord, fetched: Fetched) -> nn.Module:
        """Build the module in host memory: whatever can be wrong with a version shows here.

        Raises
        ------
        ModelFailed
            It does not build.
        """
        ...

    async def place(self, record: VersionRecord, module: nn.Module) -> Placed:
        """Move a module to the device.

        Raises
        ------
        ModelFailed
            The device refused (out of memory, say).
        """
        ...


class StoreSource:
    """Fetches from the registry's store, in threads.

    Parameters
    ----------
    store
        Any blob store; its own time-outs and retries hold.
    threads
        Where the blocking calls run.
    """

    def __init__(self, store: BlobStore, threads: Executor) -> None:
        self._store = store
        self._threads = threads

    async def fetch(self, record: VersionRecord) -> Fetched:
        """See :class:`WeightsSource`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._fetch, record)

    def _fetch(self, record: VersionRecord) -> Fetched:
        try:
            data = self._store.get(layout.blob_key(record.digest)).data
        except NotFound as error:
            raise Corrupt(f"the weights of {record.name} are gone from the store") from error
        if hashlib.sha256(data).hexdigest() != record.digest:
            raise Corrupt(f"the stored weights of {record.name} do not have the registered sha256")
        try:
            check_layout(data, record.tensors)
        except InvalidWeights as error:
            raise Corrupt(f"the version record of {record.name} does not fit its weights") from error
        return Fetched(data, Tier.STORE)


class DevicePlacer:
    """Makes modules on one device, in threads.

    Parameters
    ----------
    device
        ``cpu`` or ``cuda``; the only difference between the two is this argument.
    threads
        Where the work runs.
    """

    def __init__(self, device: torch.device, threads: Executor) -> None:
        self._device = device
        self._threads = threads

    def check(self, record: VersionRecord) -> None:
        """See :class:`Placer`."""
        try:
            network = architecture(record.architecture)
            check_architecture(record.tensors, network.name, network.tensors)
        except InvalidInput as error:
            raise ModelFailed(f"{record.name} can't be served here: {error.message}") from error

    async def prepare(self, record: VersionRecord, fetched: Fetched) -> nn.Module:
        """See :class:`Placer`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, record, fetched)

    async def place(self, record: VersionRecord, module: nn.Module) -> Placed:
        """See :class:`Placer`."""
        if self._device.type == "cpu":
            return Placed(module, device_bytes(module))
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._move, record, module)

    def _prepare(self, record: VersionRecord, fetched: Fetched) -> nn.Module:
        try:
            return materialize(architecture(record.architecture), record, fetched.data)
        except ModelFailed:
            raise
        except Exception as error:  # whatever an operator's own architecture raises is that version's failure
            raise ModelFailed(f"{record.name} could not be built: {type(error).__name__}") from error

    def _move(self, record: VersionRecord, module: nn.Module) -> Placed:
        """The lines that only a device other than the CPU runs."""
        try:
            moved = module.to(self._device)
            if self._device.type == "cuda":
                # The copies ran on this thread's stream; inference runs on another thread's.
                torch.cuda.current_stream(self._device).synchronize()
        except Exception as error:  # CUDA raises RuntimeError of several kinds, OutOfMemoryError among them
            raise ModelFailed(f"{record.name} could not be placed on {self._device}") from error
        return Placed(moved, device_bytes(moved))
