"""Objects that several writers share: refreshed while a writer comes to name them, removed without loss.

A delete that a client sends twice, because the first answer was lost, may come after somebody else has put
the object there again. So the remover of a blob keeps a copy aside (*held*) until it has read the heads again
after the last delete. A blob that one of them has come to name is put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from flatshare_registry import layout
from flatshare_registry.errors import AlreadyExists, NotFound
from flatshare_registry.ids import TenantId
from flatshare_registry.records import TenantHead
from flatshare_registry.store_clock import store_now
from flatshare_registry.stores.base import BlobMeta, BlobStore, Create, Overwrite

__all__ = ["BLOB_REFRESH_S", "BlobRemoval", "NamedBlobs", "put_if_gone", "put_shared"]

BLOB_REFRESH_S: Final = 3600.0
"""A writer that comes to name an existing object older than this writes it again, so that ``gc`` (whose grace
period is never shorter than twice this) can't take it in the meantime."""

READ_THREADS: Final = 16
"""Heads read at a time."""


def put_shared(store: BlobStore, key: str, data: bytes | memoryview) -> bool:
    """Put an object that others may have put there, too; an old one is written again. Returns whether it was
    missing.
    """
    try:
        store.put(key, data, Create())
        return True
    except AlreadyExists:
        try:
            # By the store's clock, as gc counts: this machine's may be behind.
            stale = store_now(store) - store.head(key).modified_s > BLOB_REFRESH_S
        except NotFound:  # collected between the two calls
            stale = True
        if stale:
            store.put(key, data, Overwrite())
        return False


def put_if_gone(store: BlobStore, key: str, data: bytes | memoryview) -> None:
    """Put an object there again if it was removed before it was named; to be called once it is named."""
    try:
        store.head(key)
    except NotFound:
        with contextlib.suppress(AlreadyExists):
            store.put(key, data, Create())


class NamedBlobs:
    """Which blobs the heads name. Heads that did not change since are not read again.

    Parameters
    ----------
    but
        A tenant whose head does not count.
    """

    def __init__(self, store: BlobStore, but: TenantId | None = None) -> None:
        self._store = store
        self._but = but
        self._seen: dict[str, tuple[str, Collection[str]]] = {}

    def now(self) -> set[str]:
        """Digests that are named now.

        Raises
        ------
        Corrupt
            A head can't be read: it may name anything.
        """
        heads = [
            meta
            for meta in self._store.list(layout.TENANTS)
            if layout.tenant_of_head(meta.key) not in (None, self._but)
        ]
        with ThreadPoolExecutor(READ_THREADS) as threads:
            return {digest for found in threads.map(self._names, heads) for digest in found}

    def _names(self, meta: BlobMeta) -> Collection[str]:
        known = self._seen.get(meta.key)
        if known is not None and known[0] == meta.etag:
            return known[1]
        try:
            blob = self._store.get(meta.key)
        except NotFound:
            return ()
        head = TenantHead.decode(blob.data, meta.key)
        named = tuple(head.versions.values()) if head.state.exists else ()
        self._seen[meta.key] = (blob.meta.etag, named)
        return named


class BlobRemoval:
    """Removes blobs, each with every version that a bucket has kept of it.

    Call :meth:`take` for each blob to remove, then :meth:`settle`. If this is interrupted, :meth:`restore` of
    the next removal puts back the blobs that are named.

    Parameters
    ----------
    held
        Prefix of the copies.
    named
        The heads that may come to name a blob.
    """

    def __init__(self, store: BlobStore, held: str, named: NamedBlobs) -> None:
        self._store = store
        self._held = held
        self._named = named

    def take(self, digest: str) -> int:
        """Remove a blob, and keep a copy aside; returns how many versions were removed."""
        key = layout.blob_key(digest)
        with contextlib.suppress(NotFound):  # then hidden versions may be left
            self._store.put(self._held_key(digest), self._store.get(key).data, Overwrite())
        return self._store.purge(key)

    def settle(self, taken: Iterable[str]) -> set[str]:
        """Put back what has been named meanwhile, and delete the copies; returns what was put back."""
        going = set(taken)
        if not going:
            return set()
        back = going & self._named.now()
        for digest in back:
            self._put_back(digest)
        for digest in going:
            self._store.purge(self._held_key(digest))
        return back

    def restore(self, *, older_than_s: float = 0.0) -> None:
        """Put back named blobs that an interrupted removal had taken, and delete its copies.

        Parameters
        ----------
        older_than_s
            Younger copies may be of a removal under way: their blobs are put back, and the copies stay.
        """
        held = [(meta, self._digest(meta.key)) for meta in self._store.list(self._held)]
        if not held:
            return
        named = self._named.now()
        now_s = store_now(self._store)
        for meta, digest in held:
            if digest in named:
                self._put_back(digest)
            if now_s - meta.modified_s >= older_than_s:
                self._store.purge(meta.key)

    def _put_back(self, digest: str) -> None:
        with contextlib.suppress(AlreadyExists, NotFound):
            data = self._store.get(self._held_key(digest)).data
            self._store.put(layout.blob_key(digest), data, Create())

    def _held_key(self, digest: str) -> str:
        return f"{self._held}{digest}.safetensors"

    @staticmethod
    def _digest(key: str) -> str:
        return key.rpartition("/")[2].partition(".")[0]
