"""At most one run under way for each key: callers that ask meanwhile share its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

__all__ = ["SingleFlight"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Runs by key. All methods must be called on one event loop.

    A run is a task that belongs to no caller: no caller's cancellation ends it. Its failure is raised to
    those that wait for it; if nobody does, asyncio does not report it as a forgotten exception.

    Parameters
    ----------
    what
        Names the tasks, for whoever looks at them.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._runs: dict[K, asyncio.Task[V]] = {}

    def __len__(self) -> int:
        """Runs under way that can be joined."""
        return len(self._runs)

    def __contains__(self, key: K) -> bool:
        return key in self._runs

    @property
    def tasks(self) -> list[asyncio.Task[V]]:
        """Runs under way that can be joined."""
        return list(self._runs.values())

    def begin(self, key: K, make: Callable[[], Coroutine[Any, Any, V]]) -> asyncio.Task[V]:
        """The run of a key that is under way, or a new one."""
        task = self._runs.get(key)
        if task is None:
            task = self._runs[key] = asyncio.create_task(make(), name=f"{self._what} {key}")
            task.add_done_callback(lambda done: self._ended(key, done))
        return task

    async def join(self, key: K, make: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """What the run of a key gives, or raises; a caller that goes away does not end it."""
        return await asyncio.shield(self.begin(key, make))

    def forget(self, key: K) -> None:
        """Make the next caller begin a new run; callers that wait for the old one still get its outcome."""
        self._runs.pop(key, None)

    def _ended(self, key: K, task: asyncio.Task[V]) -> None:
        if self._runs.get(key) is task:
            del self._runs[key]
        if not task.cancelled():
            task.exception()  # looked at
