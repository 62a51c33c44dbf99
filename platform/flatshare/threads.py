"""Work in threads: nothing keeps its results by accident, and it is tracked until it has ended.

A task that times out or is cancelled does not end its thread: the thread goes on, and can still read and
write a tenant's weights. An erasure must know that nothing of a tenant is left, so it waits for the threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

__all__ = ["ThreadWork", "in_thread"]

T = TypeVar("T")


async def in_thread(threads: Executor | None, work: Callable[[], T]) -> T:
    """Run ``work`` in an executor (None: the loop's own) and return what it returns.

    ``run_in_executor`` leaves its result in a reference cycle (the future's callbacks refer to the
    future, CPython 3.11 to 3.13), which lives until the cycle collector comes by: a model that was
    evicted meanwhile would keep its memory. Here only the caller has the result. The work sees the caller's
    context variables: what it does is part of the caller's trace.
    """
    box: list[T] = []
    context = contextvars.copy_context()
    await asyncio.get_running_loop().run_in_executor(threads, lambda: box.append(context.run(work)))
    return box.pop()


class ThreadWork:
    """What threads do for each tenant, from when it is handed over until the thread has ended it.

    All methods may be called from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()  # guarded by _lock
        self._stopped: set[str] = set()  # guarded by _lock
        self._waiting: dict[str, list[Callable[[], None]]] = {}  # guarded by _lock

    def submit(self, threads: Executor, tenant: str, work: Callable[[], T]) -> Future[T]:
        """Hand work over; it counts until it has ended, or was cancelled before it began.

        It sees the caller's context variables.
        """
        with self._lock:
            self._running[tenant] += 1
        try:
            future = threads.submit(contextvars.copy_context().run, work)
        except BaseException:
            self._end(tenant)
            raise
        future.add_done_callback(lambda _: self._end(tenant))
        return future

    @contextlib.contextmanager
    def counted(self, tenant: str) -> Iterator[bool]:
        """Count what is done in here for a tenant, as if a thread did it; False when it is stopped."""
        with self._lock:
            self._running[tenant] += 1
        try:
            yield not self.is_stopped(tenant)
        finally:
            self._end(tenant)

    async def run(self, threads: Executor, tenant: str, work: Callable[[], T]) -> T:
        """As :func:`in_thread`; the work counts also when the caller has gone."""
        box: list[T] = []
        await asyncio.wrap_future(self.submit(threads, tenant, lambda: box.append(work())))
        return box.pop()

    def stop(self, tenant: str) -> None:
        """Keep nothing that a thread finishes for this tenant from now on: the tenant is erased, for good."""
        with self._lock:
            self._stopped.add(tenant)

    def is_stopped(self, tenant: str) -> bool:
        """Whether a thread must throw away what it has of a tenant."""
        with self._lock:
            return tenant in self._stopped

    async def ended(self, tenant: str, timeout_s: float) -> bool:
        """Wait until no thread works for a tenant; whether that is so."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(done.set)

        with self._lock:
            if not self._running[tenant]:
                del self._running[tenant]
                return True
            self._waiting.setdefault(tenant, []).append(tell)
        try:
            async with asyncio.timeout(max(timeout_s, 0)):
                await done.wait()
            return True
        except TimeoutError:
            return False

    def _end(self, tenant: str) -> None:
        with self._lock:
            self._running[tenant] -= 1
            if self._running[tenant]:
                return
            del self._running[tenant]
            waiting = self._waiting.pop(tenant, [])
        for tell in waiting:
            tell()
