"""Stores that misbehave on purpose, and a clock that moves when told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flatshare_registry.errors import Unavailable
from flatshare_registry.stores.base import BlobMeta, BlobStore
from flatshare_registry.stores.wrapped import WrappedStore

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


class FaultyStore(WrappedStore):
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
        super().__init__(inner)
        self.before = before
        self.after = after

    @contextmanager
    def around(self, operation: str, key: str) -> Iterator[None]:
        """See :class:`WrappedStore`."""
        self.before(operation, key)
        yield
        if operation in ("get", "put", "delete"):
            self.after(operation, key)


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
