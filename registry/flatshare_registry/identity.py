"""A store's identity: a random id that it keeps, so that two stores are never taken for each other.

A URL is no identity: two endpoints can have buckets of the same name, and one store can have several URLs.
"""

from __future__ import annotations

import json
import secrets
import threading
from typing import Final

from flatshare_registry import layout
from flatshare_registry.errors import AlreadyExists, Corrupt, NotFound
from flatshare_registry.stores.base import BlobStore, Create

__all__ = ["STORE_HEADER", "StoreIdentity", "ensure_identity", "read_identity"]

STORE_HEADER: Final = "x-flatshare-store"
"""Names the store that is meant, in a call that changes something."""


def read_identity(store: BlobStore) -> str | None:
    """A store's id; None when nothing was ever written there.

    Raises
    ------
    Corrupt
        What it keeps is no id.
    """
    try:
        data = store.get(layout.IDENTITY).data
    except NotFound:
        return None
    try:
        found = json.loads(data)["id"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str) or not found.isalnum() or len(found) > 64:
        raise Corrupt(f"{layout.IDENTITY} does not hold the store's id")
    return found


def ensure_identity(store: BlobStore) -> str:
    """A store's id, made when it has none; of two who make one, one wins. Raises as :func:`read_identity`."""
    known = read_identity(store)
    if known is not None:
        return known
    made = secrets.token_hex(16)
    try:
        store.put(layout.IDENTITY, json.dumps({"id": made}).encode(), Create())
    except AlreadyExists:
        return ensure_identity(store)
    return made


class StoreIdentity:
    """A store's id, read once. May be called from several threads; blocks at the first call."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: str | None = None

    def __call__(self) -> str:
        """The id. Raises as :func:`ensure_identity`; then the next call asks again."""
        with self._lock:
            if self._known is None:
                self._known = ensure_identity(self._store)
            return self._known
