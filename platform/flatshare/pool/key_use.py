"""When a key was used last, to the hour: for people who want to know which keys can go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from cachetools import LRUCache

from flatshare_registry import layout
from flatshare_registry.errors import RegistryError
from flatshare_registry.ids import TenantId
from flatshare_registry.records import ApiKey
from flatshare_registry.stores.base import BlobStore, Overwrite

__all__ = ["KeyUse"]

HOUR_S: Final = 3600
MAX_KEYS: Final = 50_000


class KeyUse:
    """Writes one small object a key and hour, behind the request; a store that is down loses a note.

    Parameters
    ----------
    threads
        Where the blocking writes run.
    clock
        POSIX seconds.
    """

    def __init__(self, store: BlobStore, threads: Executor, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._threads = threads
        self._clock = clock
        self._noted: LRUCache[str, int] = LRUCache(MAX_KEYS)

    def __call__(self, tenant: TenantId, key: ApiKey) -> None:
        """A key was found good."""
        hour = int(self._clock()) // HOUR_S
        if self._noted.get(key.id) != hour:
            self._noted[key.id] = hour
            self._threads.submit(self._write, tenant, key.id, hour * HOUR_S)

    def _write(self, tenant: TenantId, key_id: str, used_at: int) -> None:
        try:
            document = json.dumps({"used_at": used_at}).encode()
            self._store.put(layout.used_key(tenant, key_id), document, Overwrite())
        except RegistryError:
            self._noted.pop(key_id, None)
