"""Stores that misbehave on purpose, and a clock that moves when told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from flatshare_registry.errors import Unavailable
from flatshare_registry.stores.base import BlobMeta, BlobStore, ByteRange, PutMode, StoredBlob

__all__ = ["CrashAtStep", "DisorderedStore", "FaultyStore", "ManualClock"]


class ManualClock:
    """POSIX seconds that advance only when told."""

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move time forward."""
        self.now_s += seconds


class FaultyStore:
    """Passes calls on to another store; a hook sees each first and may raise, wait or count.

    Parameters
    ----------
    inner
        The store that does the work.
    before
        Called as ``before(operation, key)`` before each call; what it raises the caller gets.
    after
        Called the same way after a call took effect: raising here is a lost answer.
    """

    def __init__(
        self,
        inner: BlobStore,
        before: Callable[[str, str], None] = lambda operation, key: None,
        after: Callable[[str, str], None] = lambda operation, key: None,
    ) -> None:
        self.inner = inner
        self.before = before
        self.after = after

    @property
    def url(self) -> str:
        return self.inner.url

    def get(self, key: str, byte_range: ByteRange | None = None) -> StoredBlob:
        self.before("get", key)
        blob = self.inner.get(key, byte_range)
        self.after("get", key)
        return blob

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        self.before("get", key)
        yield from self.inner.chunks(key, byte_range)
        self.after("get", key)

    def get_unless(self, key: str, etag: str) -> StoredBlob | None:
        self.before("get", key)
        blob = self.inner.get_unless(key, etag)
        self.after("get", key)
        return blob

    def head(self, key: str) -> BlobMeta:
        self.before("head", key)
        return self.inner.head(key)

    def put(self, key: str, data: bytes | memoryview, mode: PutMode) -> BlobMeta:
        self.before("put", key)
        meta = self.inner.put(key, data, mode)
        self.after("put", key)
        return meta

    def list(self, prefix: str, *, after: str = "") -> Iterator[BlobMeta]:
        self.before("list", prefix)
        return self.inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self.before("delete", key)
        self.inner.delete(key)
        self.after("delete", key)

    def purge_all(self, prefix: str) -> int:
        self.before("delete", prefix)
        removed = self.inner.purge_all(prefix)
        self.after("delete", prefix)
        return removed

    def history(self, prefix: str) -> Iterator[str]:
        self.before("list", prefix)
        return self.inner.history(prefix)

    def shows_versions(self, key: str) -> bool:
        self.before("list", key)
        return self.inner.shows_versions(key)

    def purge(self, key: str, *, keep_latest: bool = False) -> int:
        self.before("delete", key)
        removed = self.inner.purge(key, keep_latest=keep_latest)
        self.after("delete", key)
        return removed


class DisorderedStore(FaultyStore):
    """Lists the last key first, as a store may that keeps no order (S3's directory buckets)."""

    def list(self, prefix: str, *, after: str = "") -> Iterator[BlobMeta]:
        return iter(sorted(super().list(prefix, after=after), key=lambda meta: meta.key, reverse=True))

    def history(self, prefix: str) -> Iterator[str]:
        return iter(sorted(super().history(prefix), reverse=True))


class CrashAtStep:
    """A ``before`` or ``after`` hook that fails the n-th write, counted from 0."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seen = 0
        self.crashed = False

    def __call__(self, operation: str, key: str) -> None:
        if operation not in ("put", "delete"):
            return
        if self.seen == self.step:
            self.crashed = True
            raise Unavailable(f"injected: {operation} {key}")
        self.seen += 1
