"""Nothing that tests start outlives pytest, however pytest ends.

A process that tests start bears a mark in its environment, and so does all that it starts, a detached
``flatshare up`` or a raylet too: nothing that hangs on parents would find those. A keeper waits for pytest's end and
ends what still bears the mark. It is this file, run as a script with nothing but the standard library: every pytest
starts one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Final

MARK: Final = "STARTED_BY_PYTEST"
STOP_S: Final = 20.0
"""Seconds that ``flatshare up`` and the like have to end what is theirs; then all are killed."""


def pytest_configure() -> None:
    """Start the keeper; let SIGTERM end the tests as Ctrl-C does, with the teardown of their fixtures."""
    mark = secrets.token_hex(16)
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # what ends pytest's group must not end it
        # Nor the keeper of a pytest that runs this one as its test.
        env={name: value for name, value in os.environ.items() if name != MARK},
    )
    os.environ[MARK] = mark
    ours, stopping = os.getpid(), False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if os.getpid() == ours and not stopping:
            stopping = True  # a second one must not cut the teardown short
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def keep(pytest_pid: int, mark: str) -> None:
    """Wait for pytest's end, then end what bears the mark: the oldest of each family first, they end the rest."""
    with contextlib.suppress(ProcessLookupError):
        pytest = os.pidfd_open(pytest_pid)
        if os.getppid() == pytest_pid:  # else it is gone, and this may be another with its id
            _ended([pytest])
    family = _marked(mark)
    parents = {pid: _parent(pid) for pid in family}
    oldest = [handle for pid, handle in family.items() if parents[pid] not in family]
    _send(oldest, signal.SIGTERM)
    _ended(oldest, STOP_S)
    _send([*family.values(), *_marked(mark).values()], signal.SIGKILL)


def _marked(mark: str) -> dict[int, int]:
    """Handles (pidfd) of the processes that bear the mark, by id."""
    words = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # gone, or somebody else's
                handle = os.pidfd_open(int(entry.name))
                if words in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = handle
                else:
                    os.close(handle)
    return found


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    return 0


def _send(handles: Iterable[int], number: int) -> None:
    for handle in handles:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)


def _ended(handles: Iterable[int], timeout_s: float | None = None) -> None:
    """Wait until all of them have ended; not longer than the time given, if any."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for handle in handles:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        select.select([handle], [], [], left)


if __name__ == "__main__":
    keep(int(sys.argv[1]), sys.argv[2])
