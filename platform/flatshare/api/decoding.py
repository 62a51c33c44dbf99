"""Decodes bodies that are long, or that expand, into rows: in a few threads, tenants taking turns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from flatshare.residency.fair_semaphore import FairSemaphore

__all__ = ["INLINE_BYTES", "DecodeRoom"]

INLINE_BYTES: Final = 64 * 1024
"""Longest body that is decoded on the event loop: it takes a millisecond, and a thread would cost as much.
What can expand (images, multipart, compressed bodies) is never decoded there, however short it is."""

DECODE_THREADS: Final = 2
"""Bodies decoded at a time. It bounds the memory that decoding needs beside the bodies themselves."""

MAX_WAITING: Final = 1024
"""Bodies that wait for their turn; one more is refused."""

WAIT_S: Final = 30.0
"""Seconds that a body waits for its turn; the request's own deadline is usually sooner."""

T = TypeVar("T")


class DecodeRoom:
    """A few threads for decoding. Must be used on one event loop.

    A thread can't be interrupted, so what runs in here is bounded by its input: limits on bytes, rows,
    segments and seconds are the decoders'. A caller that goes away leaves its thread to finish, and the
    thread's place stays taken until then.

    Parameters
    ----------
    threads
        How many bodies are decoded at a time.
    """

    def __init__(self, threads: int = DECODE_THREADS) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._places = FairSemaphore(threads, MAX_WAITING)

    @property
    def busy(self) -> int:
        """Threads that decode now."""
        return self._places.ongoing

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread when it is this tenant's turn, and return its result.

        Raises
        ------
        Overloaded, DeadlineExceeded
            Too many bodies wait, or this one waited too long.
        """
        await self._places.enter(WAIT_S, tenant)
        loop = asyncio.get_running_loop()
        box: list[T] = []  # a future would keep the result in a cycle (threads.py)
        try:
            running = self._threads.submit(lambda: box.append(work()))
        except BaseException:
            self._places.leave()
            raise

        def ended(_: Future[None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._places.leave)

        running.add_done_callback(ended)
        await asyncio.wrap_future(running)
        return box.pop()

    def here_or_there(self, tenant: str, size_bytes: int, work: Callable[[], T]) -> T | Awaitable[T]:
        """Run short work at once; for long work return an awaitable. Use :meth:`run` for what can expand."""
        return self.run(tenant, work) if size_bytes > INLINE_BYTES else work()

    def close(self) -> None:
        """Take nothing more; what runs goes on to its end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
