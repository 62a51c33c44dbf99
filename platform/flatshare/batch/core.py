"""A replica's core in a process of Ray Data: the cache, the host tier and the engine, without a door.

A batch runs with the store's own credentials, which is an operator's right: no key is asked for, no quota is
spent, and the tenants' logs have one entry for the whole batch (``batch/job.py``). The limit on what a tenant
may keep on a device applies here too, and a suspended tenant is refused.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from flatshare.codecs.images import decode_images
from flatshare.codecs.payload import decode_array
from flatshare.device.host_memory import keep_freed_memory
from flatshare.errors import BadInput, DeviceBroken, ModelFailed, Overloaded, Suspended, Wedged
from flatshare.models.architecture import Architecture, architecture
from flatshare.replica.build import Replica
from flatshare.settings import Settings
from flatshare_registry.errors import InvalidInput, Unavailable
from flatshare_registry.ids import ModelRef
from flatshare_registry.records import TenantState, VersionRecord

__all__ = ["OfflineCore", "Rows", "rows_of"]

Rows = NDArray[np.float32] | NDArray[np.uint8] | list[bytes]
"""What a batch gives: what the model takes ``(N, *shape)``, raw pixels ``(N, H, W)`` or image files."""

WAIT_S: Final = 300.0
"""Seconds for which rows are tried while the store does not answer, or there is no room."""

AGAIN_S: Final = 2.0
"""Seconds between two tries."""

FILES_AT_ONCE: Final = 64
"""Image files decoded in one call: their decoder has a budget of seconds for each."""


class OfflineCore:
    """One process's models and passes. Methods may be called from any thread.

    Parameters
    ----------
    settings
        As of a replica of the pool: store, slots, device, host tier.
    ready
        Whether whole numbers of 0 to 255 that are not unsigned bytes are model-ready, and not raw pixels.
    """

    def __init__(self, settings: Settings, *, ready: bool = False) -> None:
        self._ready = ready
        self._once: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="offline", daemon=True)
        self._thread.start()
        self._replica = asyncio.run_coroutine_threadsafe(self._build(settings), self._loop).result()

    async def _build(self, settings: Settings) -> Replica:
        keep_freed_memory()
        replica = Replica.build(
            settings, settings.open_store(), keeps=lambda record: record.digest not in self._once
        )
        replica.inference.ready()
        return replica

    def predict(
        self, version: str, rows: Rows, *, once: bool = False
    ) -> tuple[NDArray[np.int64], VersionRecord]:
        """Labels ``(N,)`` of rows, and exactly what ran.

        Parameters
        ----------
        version
            ``acme@7``, or another ref.
        once
            No other unit of this batch will ask for it: its weights are not written to the node's tier.

        Raises
        ------
        BadInput
            The rows do not fit this model.
        NotFound, Suspended, Unavailable, Corrupt, ModelFailed
            The version can't be served.
        """
        return self.start(version, rows, once=once).result()

    def start(
        self, version: str, rows: Rows, *, once: bool = False
    ) -> Future[tuple[NDArray[np.int64], VersionRecord]]:
        """As :meth:`predict`, without waiting: a model is loaded while another one computes."""
        return asyncio.run_coroutine_threadsafe(self._predict(version, rows, once), self._loop)

    async def _predict(self, version: str, rows: Rows, once: bool) -> tuple[NDArray[np.int64], VersionRecord]:
        """Retried while the store does not answer or there is no room: nobody waits for a single call."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                return await self._try(version, rows, once)
            except (Unavailable, Overloaded) as error:
                if isinstance(error, Wedged | DeviceBroken) or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(AGAIN_S)

    async def _try(self, version: str, rows: Rows, once: bool) -> tuple[NDArray[np.int64], VersionRecord]:
        ref = ModelRef.parse(version)
        replica = self._replica
        record = await replica.resolver.said(ref, WAIT_S)
        if (await replica.heads.head(ref.tenant)).state is TenantState.SUSPENDED:
            raise Suspended(f"tenant {ref.tenant} is suspended")
        try:
            network = architecture(record.architecture)
        except InvalidInput as error:
            raise ModelFailed(f"{record.name}: its architecture is not installed here") from error
        ready = rows_of(rows, network, ready=self._ready)
        if once:
            self._once.add(record.digest)
        else:
            self._once.discard(record.digest)
        with await replica.cache.lease(record, WAIT_S) as lease:
            logits = await replica.inference.run(lease, ready)
        return logits.argmax(axis=1), record

    def check(self) -> None:
        """Return if this process can go on. Raises ``Wedged`` and ``DeviceBroken``."""
        self._replica.check_health()

    @property
    def loads(self) -> int:
        """Models loaded so far."""
        return self._replica.cache.stats.loads

    def close(self) -> None:
        """End its threads and free its models."""
        asyncio.run_coroutine_threadsafe(self._replica.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> OfflineCore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def rows_of(rows: Rows, network: Architecture, *, ready: bool = False) -> NDArray[np.float32]:
    """Turn rows into a model's input, as the service does with the same rows in a request.

    Files are treated as by ``/classify``, unsigned bytes as its raw pixels, all other numbers as by
    ``/predict``.

    Raises
    ------
    BadInput
        They do not fit this model.
    """
    if isinstance(rows, list):
        parts = [
            decode_images(rows[start : start + FILES_AT_ONCE], network, FILES_AT_ONCE)
            for start in range(0, len(rows), FILES_AT_ONCE)
        ]
        return np.concatenate(parts)
    if rows.shape[1:] == (network.input.row_values,):  # Parquet knows no shapes
        rows = rows.reshape(-1, *(_pixel_shape(network) if rows.dtype == np.uint8 else network.input.shape))
    if rows.dtype == np.uint8:
        wanted = _pixel_shape(network)
        if rows.shape[1:] not in {wanted, (1, *wanted)}:
            raise BadInput(f"raw pixels have shape {rows.shape}; they must be {('N', *wanted)}")
        pixels: NDArray[np.uint8] = np.ascontiguousarray(rows, np.uint8)
        return network.preprocess(pixels.reshape(-1, *wanted))
    return decode_array(rows, network.input, len(rows), ready=ready)


def _pixel_shape(network: Architecture) -> tuple[int, ...]:
    channels, height, width = network.input.shape
    return (height, width) if channels == 1 else (height, width, channels)
