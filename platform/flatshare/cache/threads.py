"""Work in a thread whose result nobody keeps by accident."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

__all__ = ["in_thread"]

T = TypeVar("T")


async def in_thread(threads: Executor | None, work: Callable[[], T]) -> T:
    """Run ``work`` in an executor (None: the loop's own) and return what it returns.

    ``run_in_executor`` leaves its result in a reference cycle (the future's callbacks refer to the
    future, CPython 3.11 to 3.13), which lives until the cycle collector comes by: a model that was
    evicted meanwhile would keep its memory. Here only the caller has the result.
    """
    box: list[T] = []
    await asyncio.get_running_loop().run_in_executor(threads, lambda: box.append(work()))
    return box.pop()
