"""Stores around another one: what is done around each call of it, and one that counts."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from flatshare_registry.errors import Unavailable
from flatshare_registry.stores.base import BlobMeta, BlobStore, ByteRange, PutMode, StoredBlob

__all__ = ["CountedStore", "StoreCounts", "WrappedStore"]


class WrappedStore(ABC):
    """Passes each call on to another store, within :meth:`around`.

    Promises what that store promises, and is as safe to call from several threads.
    """

    def __init__(self, inner: BlobStore) -> None:
        self.inner = inner

    @abstractmethod
    def around(self, operation: str, key: str) -> AbstractContextManager[None]:
        """Entered before a call (``get``, ``head``, ``put``, ``list`` or ``delete``) and left after it.

        A call that gives an iterator is entered at its first element and left after its last.
        """
        ...

    @property
    def url(self) -> str:
        """See :class:`BlobStore`."""
        return self.inner.url

    def get(self, key: str, byte_range: ByteRange | None = None) -> StoredBlob:
        """See :class:`BlobStore`."""
        with self.around("get", key):
            return self.inner.get(key, byte_range)

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        """See :class:`BlobStore`."""
        with self.around("get", key):
            yield from self.inner.chunks(key, byte_range)

    def get_unless(self, key: str, etag: str) -> StoredBlob | None:
        """See :class:`BlobStore`."""
        with self.around("get", key):
            return self.inner.get_unless(key, etag)

    def head(self, key: str) -> BlobMeta:
        """See :class:`BlobStore`."""
        with self.around("head", key):
            return self.inner.head(key)

    def put(self, key: str, data: bytes | memoryview, mode: PutMode) -> BlobMeta:
        """See :class:`BlobStore`."""
        with self.around("put", key):
            return self.inner.put(key, data, mode)

    def list(self, prefix: str, *, after: str = "") -> Iterator[BlobMeta]:
        """See :class:`BlobStore`."""
        with self.around("list", prefix):
            yield from self.inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        """See :class:`BlobStore`."""
        with self.around("delete", key):
            self.inner.delete(key)

    def purge(self, key: str, *, keep_latest: bool = False) -> int:
        """See :class:`BlobStore`."""
        with self.around("delete", key):
            return self.inner.purge(key, keep_latest=keep_latest)

    def purge_all(self, prefix: str) -> int:
        """See :class:`BlobStore`."""
        with self.around("delete", prefix):
            return self.inner.purge_all(prefix)

    def history(self, prefix: str) -> Iterator[str]:
        """See :class:`BlobStore`."""
        with self.around("list", prefix):
            yield from self.inner.history(prefix)

    def shows_versions(self, key: str) -> bool:
        """See :class:`BlobStore`."""
        with self.around("list", key):
            return self.inner.shows_versions(key)


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """Requests of one process since it began.

    Attributes
    ----------
    requests
        Calls of the store; a listing of many pages is one.
    errors
        Of these, calls that the store did not answer, or not in time, after its own retries.
    """

    requests: int = 0
    errors: int = 0


class CountedStore(WrappedStore):
    """Counts what is asked of a store, and how often it did not answer."""

    def __init__(self, inner: BlobStore) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._requests = self._errors = 0

    @property
    def counts(self) -> StoreCounts:
        """So far."""
        with self._lock:
            return StoreCounts(self._requests, self._errors)

    @contextmanager
    def around(self, operation: str, key: str) -> Iterator[None]:
        """See :class:`WrappedStore`."""
        with self._lock:
            self._requests += 1
        try:
            yield
        except Unavailable:
            with self._lock:
                self._errors += 1
            raise
