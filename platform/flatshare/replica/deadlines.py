"""Deadlines of many requests that all have the same time limit: one timer for all, not one for each."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Deadlines"]

T = TypeVar("T")


class Deadlines(Generic[T]):
    """Calls back for each item that is not removed in time. Must be used on one event loop.

    A timer of the event loop costs as much as the rest of a request's bookkeeping, and nearly every one would
    be cancelled. Here items stay in the order in which they were added, so the first is always due first.

    Parameters
    ----------
    seconds
        From :meth:`add` to the call.
    expire
        Called with an item that was not removed in time; by then it is removed.
    """

    def __init__(self, seconds: float, expire: Callable[[T], None]) -> None:
        self._seconds = seconds
        self._expire = expire
        self._due: OrderedDict[T, float] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._due)

    def add(self, item: T) -> None:
        """Start an item's time."""
        loop = asyncio.get_running_loop()
        self._due[item] = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._look)

    def remove(self, item: T) -> None:
        """Stop an item's time; harmless if it was removed already."""
        self._due.pop(item, None)

    def close(self) -> None:
        """Remove all items; nothing is called any more."""
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._due:
            item, due = next(iter(self._due.items()))
            if due > loop.time():
                self._timer = loop.call_at(due, self._look)
                return
            del self._due[item]
            self._expire(item)
