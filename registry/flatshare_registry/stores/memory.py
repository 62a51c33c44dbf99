"""A store in this process's memory: for tests and for trying things in a notebook."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from flatshare_registry.errors import AlreadyExists, Conflict, InvalidInput, NotFound
from flatshare_registry.stores.base import (
    CHUNK_BYTES,
    BlobMeta,
    ByteRange,
    Create,
    PutMode,
    StoredBlob,
    UpdateIf,
    check_key,
    check_prefix,
)

__all__ = ["MemoryStore"]


class MemoryStore:
    """Objects in a dict behind one lock; atomic across threads, invisible to other processes.

    Parameters
    ----------
    name
        Shown in :attr:`url`.
    clock
        Gives the time of writes in POSIX seconds.
    """

    def __init__(self, name: str = "", clock: Callable[[], float] = time.time) -> None:
        self.url = f"memory://{name}"
        self._clock = clock
        self._lock = threading.Lock()
        self._objects: dict[str, StoredBlob] = {}  # guarded by _lock
        self._writes = 0  # guarded by _lock; makes every ETag new

    def get(self, key: str, byte_range: ByteRange | None = None) -> StoredBlob:
        """See :class:`BlobStore`."""
        blob = self._find(key)
        if byte_range is None:
            return blob
        if byte_range.end > blob.meta.size_bytes:
            raise InvalidInput(f"range ends at {byte_range.end}, {key} has {blob.meta.size_bytes} bytes")
        return StoredBlob(blob.data[byte_range.start : byte_range.end], blob.meta)

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        """See :class:`BlobStore`."""
        data = self.get(key, byte_range).data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    def get_unless(self, key: str, etag: str) -> StoredBlob | None:
        """See :class:`BlobStore`."""
        blob = self._find(key)
        return None if blob.meta.etag == etag else blob

    def head(self, key: str) -> BlobMeta:
        """See :class:`BlobStore`."""
        return self._find(key).meta

    def put(self, key: str, data: bytes | memoryview, mode: PutMode) -> BlobMeta:
        """See :class:`BlobStore`."""
        check_key(key)
        with self._lock:
            there = self._objects.get(key)
            if isinstance(mode, Create) and there is not None:
                raise AlreadyExists(f"{key} already exists")
            if isinstance(mode, UpdateIf) and (there is None or there.meta.etag != mode.etag):
                raise Conflict(f"{key} changed meanwhile")
            self._writes += 1
            content = bytes(data)
            meta = BlobMeta(key, f'"{self._writes}"', len(content), self._clock())
            self._objects[key] = StoredBlob(content, meta)
            return meta

    def list(self, prefix: str, *, after: str = "") -> Iterator[BlobMeta]:
        """See :class:`BlobStore`."""
        check_prefix(prefix)
        with self._lock:
            found = [
                blob.meta for key, blob in self._objects.items() if key.startswith(prefix) and key > after
            ]
        yield from sorted(found, key=lambda meta: meta.key)

    def delete(self, key: str) -> None:
        """See :class:`BlobStore`."""
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def purge(self, key: str, *, keep_latest: bool = False) -> int:
        """See :class:`BlobStore`: no versions are kept here."""
        check_key(key)
        with self._lock:
            return 0 if keep_latest else int(self._objects.pop(key, None) is not None)

    def purge_all(self, prefix: str) -> int:
        """See :class:`BlobStore`."""
        return sum(self.purge(meta.key) for meta in list(self.list(prefix)))

    def history(self, prefix: str) -> Iterator[str]:
        """See :class:`BlobStore`: nothing is kept here."""
        return (meta.key for meta in list(self.list(prefix)))

    def shows_versions(self, key: str) -> bool:
        """See :class:`BlobStore`: no versions are kept here."""
        check_key(key)
        return True

    def _find(self, key: str) -> StoredBlob:
        check_key(key)
        with self._lock:
            blob = self._objects.get(key)
        if blob is None:
            raise NotFound(f"{key} does not exist")
        return blob
