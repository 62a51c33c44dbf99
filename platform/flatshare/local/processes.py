"""Processes by id and start time, and waiting until they have ended."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Sequence

import psutil

__all__ = ["Process", "descendants", "same_process", "wait_until_ended"]

Process = tuple[int, float]
"""Process id and start time: ids are used again."""


def descendants() -> tuple[Process, ...]:
    """All that this process has started, and what those have."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append((child.pid, child.create_time()))
    return tuple(found)


def same_process(pid: int, started_at: float) -> psutil.Process | None:
    """The process with this id, if it started then: ids are used again."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started_at) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if same else None


def wait_until_ended(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait for processes to end; returns those that have not ended in time.

    A zombie counts as ended: the first process of a container may never collect it.
    """
    poll = select.poll()
    waited: dict[int, psutil.Process] = {}
    try:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                waited[handle := os.pidfd_open(process.pid)] = process
                poll.register(handle, select.POLLIN)
        pending = {handle: process for handle, process in waited.items() if process.is_running()}
        deadline = time.monotonic() + timeout_s
        while pending and (left := deadline - time.monotonic()) > 0:
            for handle, _ in poll.poll(left * 1000):
                poll.unregister(handle)
                pending.pop(handle, None)
        return list(pending.values())
    finally:
        for handle in waited:
            os.close(handle)
