"""An event loop whose time moves to the next timer at once, for tests that wait for nothing outside."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _JumpingClock(selectors.DefaultSelector):
    """Instead of waiting for a timer, moves the time to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "nothing is left to wait for, and something waits: a deadlock"
        self.now += max(timeout, 0)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock: _JumpingClock) -> None:
        super().__init__(clock)
        self._simulated = clock

    def time(self) -> float:
        return self._simulated.now


def in_simulated_time(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end, which must leave no task behind."""
    loop = _Loop(_JumpingClock())
    try:
        loop.run_until_complete(work)
        left = asyncio.all_tasks(loop)
        assert not left, f"tasks were left behind: {left}"
    finally:
        loop.close()
