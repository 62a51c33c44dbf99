"""sha256 of tensors whose bytes arrive in pieces, beside the thread that receives and writes them."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from types import TracebackType
from typing import Final

from flatshare.telemetry.tracing import record

__all__ = ["Hasher"]

BESIDE_FROM_BYTES: Final = 64 * 1024
"""Smaller pieces are hashed at once: that takes less than handing them to a thread."""

AHEAD: Final = 2
"""Pieces that may wait to be hashed; whoever brings more waits, so they don't pile up in memory."""


class Hasher:
    """Hashes one tensor after another, large pieces in a thread of its own.

    A context manager, used by one thread.

    In a load of 4.8 MB from S3, the hash takes 3 ms and the rest, on the same core, 10 ms; side by side they
    take 10.5 ms (medians of 40, 2 vCPUs).
    """

    def __init__(self) -> None:
        self._began_s = self._ended_s = self._busy_s = 0.0  # of whoever hashes, one at a time
        self._hash = hashlib.sha256()
        self._todo: queue.Queue[memoryview | None] = queue.Queue(AHEAD)
        self._thread: threading.Thread | None = None
        self._beside = False

    def __enter__(self) -> Hasher:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread, after the pieces that it has."""
        if self._thread is not None:
            self._todo.put(None)
            self._thread.join()
        if self._began_s:
            record("verify", self._began_s, self._ended_s, {"flatshare.busy_ms": self._busy_s * 1000})

    def update(self, data: memoryview) -> None:
        """Take the next bytes of a tensor, which must not change until :meth:`hexdigest`."""
        if not self._beside and len(data) < BESIDE_FROM_BYTES:
            self._take(data)
            return
        self._beside = True  # what follows must wait its turn
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="hasher", daemon=True)
            thread.start()
            self._thread = thread  # now there is something to join
        self._todo.put(data)

    def hexdigest(self) -> str:
        """The digest of all bytes since the last one; waits for the thread."""
        if self._beside:
            self._todo.join()
            self._beside = False
        found, self._hash = self._hash.hexdigest(), hashlib.sha256()
        return found

    def _take(self, data: memoryview) -> None:
        now_s = time.monotonic()
        self._began_s = self._began_s or now_s
        self._hash.update(data)
        self._ended_s = time.monotonic()
        self._busy_s += self._ended_s - now_s

    def _work(self) -> None:
        while (data := self._todo.get()) is not None:
            self._take(data)
            del data  # it may be the last reference to megabytes
            self._todo.task_done()
