"""Admission: how many requests a replica works on at a time, and how many may wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from types import TracebackType

from flatshare.errors import DeadlineExceeded, Overloaded

__all__ = ["Admission"]


class Admission:
    """Lets ``max_ongoing`` requests in; ``max_queued`` more wait in order; others are refused at once.

    Must be used on one event loop. :meth:`enter` then :meth:`leave`, or ``async with admission.hold(s)``.
    """

    def __init__(self, max_ongoing: int, max_queued: int) -> None:
        self.max_ongoing = max_ongoing
        self.max_queued = max_queued
        self.ongoing = 0
        self.refused = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def queued(self) -> int:
        """Requests that wait now."""
        return len(self._waiting)

    def hold(self, timeout_s: float) -> _Hold:
        """An async context that is inside while the request is let in."""
        return _Hold(self, timeout_s)

    async def enter(self, timeout_s: float) -> None:
        """Wait to be let in.

        Raises
        ------
        Overloaded
            ``max_queued`` requests already wait. Raised at once.
        DeadlineExceeded
            Not let in within ``timeout_s``.
        """
        if self.ongoing < self.max_ongoing:
            self.ongoing += 1
            return
        if self.queued >= self.max_queued:
            self.refused += 1
            raise Overloaded(
                f"this replica works on {self.max_ongoing} requests and {self.max_queued} more wait; retry"
            )
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self.leave()  # let in at the moment of leaving: pass the place on
            else:
                waiter.cancel()
                with contextlib.suppress(ValueError):
                    self._waiting.remove(waiter)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(f"waited {timeout_s:g} s for a free place") from None
            raise

    def leave(self) -> None:
        """Give the place to the request that has waited longest."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self.ongoing -= 1


class _Hold:
    """``async with``: enter and leave."""

    __slots__ = ("_admission", "_timeout_s")

    def __init__(self, admission: Admission, timeout_s: float) -> None:
        self._admission = admission
        self._timeout_s = timeout_s

    async def __aenter__(self) -> None:
        await self._admission.enter(self._timeout_s)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.leave()
