"""Loads that wait for room, in order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["RoomQueue"]


class RoomQueue:
    """Waiters, each with a function that tells whether there is room for it; must be used on one event loop.

    Whenever something comes free, :meth:`wake` asks them in order and releases the first that has room. When
    that one ends it calls :meth:`wake` again, so no waiter sleeps while there is room for it. A waiter that
    can't use the room is passed over and keeps its place. If a function raises, that waiter alone fails: the
    caller of :meth:`wake` is another request, of another tenant.
    """

    def __init__(self) -> None:
        self._waiters: list[tuple[asyncio.Future[None], Callable[[], bool]]] = []

    def wake(self) -> None:
        """Something may have come free."""
        for waiter, has_room in self._waiters:
            if waiter.done():
                continue
            try:
                found = has_room()
            except Exception as error:
                waiter.set_exception(error)
                continue
            if found:
                waiter.set_result(None)
                return

    async def wait(self, has_room: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until there is room; False when the time is over.

        Parameters
        ----------
        has_room
            Cheap, and without effect: it is asked at each wake. What it raises is raised here.
        """
        if has_room():
            return True
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (waiter, has_room)
        self._waiters.append(place)
        used = False
        try:
            async with asyncio.timeout(max(timeout_s, 0)):
                await waiter
            used = True
        except TimeoutError:
            used = (
                waiter.done() and not waiter.cancelled() and waiter.exception() is None
            )  # in the very moment
            return used
        finally:
            self._waiters.remove(place)
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None and not used:
                self.wake()  # cancelled just as it was released: the next waiter gets the room
        return True
