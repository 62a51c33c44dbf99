"""When a key was used last, to the hour: for people who want to know which keys can go."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Final

from cachetools import LRUCache

from flatshare.threads import ThreadWork
from flatshare_registry import layout
from flatshare_registry.errors import RegistryError
from flatshare_registry.ids import TenantId
from flatshare_registry.records import ApiKey
from flatshare_registry.stores.base import BlobStore, Overwrite

__all__ = ["KeyUse"]

HOUR_S: Final = 3600
MAX_KEYS: Final = 50_000
MAX_WAITING: Final = 1_000
"""Most notes that wait to be written; beyond it a note is left to the next request."""


class KeyUse:
    """Writes one small object per key and hour, after the request; if the store is down, a note is lost.

    Parameters
    ----------
    threads
        Where the blocking writes run: threads that nothing else waits for.
    clock
        POSIX seconds.
    """

    def __init__(self, store: BlobStore, threads: Executor, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._threads = threads
        self._clock = clock
        self._places = threading.BoundedSemaphore(MAX_WAITING)
        self._noted: LRUCache[str, int] = LRUCache(MAX_KEYS)
        self._work = ThreadWork()

    def __call__(self, tenant: TenantId, key: ApiKey) -> None:
        """A key was found good."""
        # Each key's hour begins at a different time; otherwise all would be written in the same second.
        now = int(self._clock())
        period = (now + zlib.crc32(key.id.encode()) % HOUR_S) // HOUR_S
        if self._noted.get(key.id) != period and self._places.acquire(blocking=False):
            self._noted[key.id] = period
            note = partial(self._write, tenant, key.id, now // HOUR_S * HOUR_S)
            writing = self._work.submit(self._threads, tenant, note)
            writing.add_done_callback(lambda _: self._places.release())

    async def stop(self, tenant: TenantId, timeout_s: float) -> bool:
        """Write nothing more for an erased tenant; returns whether the writes under way have ended."""
        self._work.stop(tenant)
        return await self._work.ended(tenant, timeout_s)

    def _write(self, tenant: TenantId, key_id: str, used_at: int) -> None:
        if self._work.is_stopped(tenant):
            return
        with contextlib.suppress(RegistryError):  # a note that is lost is written in the next hour
            document = json.dumps({"used_at": used_at}).encode()
            self._store.put(layout.used_key(tenant, key_id), document, Overwrite())
