"""Places that go round the tenants that wait for them: one that floods waits behind itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator

__all__ = ["Turns"]


class Turns:
    """So many places at a time; must be used on one event loop.

    A semaphore gives its places in order of coming: a tenant that asks for a thousand of its own versions
    would have all others wait behind these.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def hold(self, tenant: str) -> AsyncIterator[None]:
        """Inside while a place is held; waits for it as long as it takes."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(tenant)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, tenant: str) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._pass_on()  # it was given the place in the moment of leaving
            raise

    def _pass_on(self) -> None:
        """Give a place to the next tenant that waits; it is free when nobody does."""
        while self._waiting:
            tenant, waiters = self._waiting.popitem(last=False)
            waiter = waiters.popleft()
            if waiters:
                self._waiting[tenant] = waiters  # at the end of the ring
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1
