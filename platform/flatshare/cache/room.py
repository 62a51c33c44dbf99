"""Loads that wait for room, in order: each lease that ends wakes the one that has waited longest."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

__all__ = ["RoomQueue"]


class RoomQueue:
    """A queue of waiters; must be used on one event loop."""

    def __init__(self) -> None:
        self._waiters: deque[asyncio.Future[None]] = deque()

    def wake_one(self) -> None:
        """Room may have come free: let the one that has waited longest look."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    async def wait(self, timeout_s: float) -> bool:
        """Wait until room may have come free; False when the time is over."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(max(timeout_s, 0)):
                await waiter
        except TimeoutError:
            return waiter.done() and not waiter.cancelled()  # woken in the very moment
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.wake_one()  # the room was meant for us: pass it on
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._waiters.remove(waiter)
        return True
