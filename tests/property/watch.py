"""Sends one request to an application in this process and measures what it costs: loop lag, memory, time.

A loop's lag is what another request on it would have waited: the worst gap between two turns of a heartbeat.
Memory is the growth of the resident set at its peak, of this process and of those that it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from .hostile import Request

__all__ = ["Cost", "Reply", "Watch", "send"]

BEAT_S: Final = 0.001
KEPT_BYTES: Final = 10**6
"""How much is kept of an answer: a stream's may be 40 MB, and that would be this test's memory."""

_TRIM_FROM: Final = 8 * 1024**2


@dataclass(frozen=True)
class Cost:
    """Of one request."""

    lag_s: float = 0.0
    peak_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Reply:
    """What came back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)


async def send(app: Any, request: Request) -> Reply:
    """Hand a request to an application as a server does; a piece of the body is not there before the loop has turned."""
    reply, over = Reply(), asyncio.Event()
    parts = _parts(request)
    left = len(parts)

    async def receive() -> dict[str, Any]:
        nonlocal left
        if not left:
            await over.wait()
            return {"type": "http.disconnect"}
        left -= 1
        await asyncio.sleep(0)
        return {"type": "http.request", "body": parts[len(parts) - left - 1], "more_body": left > 0}

    async def answer(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {
                name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]
            }
        else:
            if len(reply.body) < KEPT_BYTES:
                reply.body += message.get("body", b"")
            if not message.get("more_body", False):
                over.set()

    raw = request.path.encode("utf-8")
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "scheme": "http",
        "method": request.method, "path": unquote(request.path), "raw_path": raw, "root_path": "",
        "query_string": request.query.encode("utf-8"), "client": ("127.0.0.1", 9), "server": ("test", 80),
        "headers": [(b"host", b"test"), *(
            (name.encode("latin-1"), value.encode("utf-8")) for name, value in request.headers
        )],
    }  # fmt: skip
    await app(scope, receive, answer)
    return reply


def _parts(request: Request) -> list[bytes]:
    parts, at = [], 0
    for size in request.pieces:
        parts.append(request.body[at : at + size])
        at += size
    return [*parts, request.body[at:]]


class Watch:
    """Measures; must be used on one event loop, one request at a time."""

    def __init__(self) -> None:
        self.cost = Cost()

    @contextlib.asynccontextmanager
    async def measuring(self) -> AsyncIterator[None]:
        """What runs within this is measured; afterwards :attr:`cost` has it."""
        worst, running = 0.0, True

        async def beat() -> None:
            nonlocal worst
            last = time.perf_counter()
            while running:
                await asyncio.sleep(BEAT_S)
                now = time.perf_counter()
                worst, last = max(worst, now - last - BEAT_S), now

        memory = _Memory()
        heart = asyncio.create_task(beat())
        await asyncio.sleep(0)
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            await asyncio.sleep(0)  # a gap that the request has just made is noticed by the next beat
            running = False
            await heart
            grown = memory.grown()
            self.cost = Cost(worst, grown, seconds)
            if grown > _TRIM_FROM:
                gc.collect()
                _trim()


class _Memory:
    """The peak of the resident set since this was made, beyond what it was then (Linux)."""

    def __init__(self) -> None:
        self._before: dict[Path, int] = {}
        for process in _family():
            with contextlib.suppress(OSError):
                (process / "clear_refs").write_text("5")  # proc(5): the peak begins anew
                self._before[process] = _kilobytes(process, "VmRSS:")

    def grown(self) -> int:
        total = 0
        for process in _family():
            with contextlib.suppress(OSError):
                total += max(_kilobytes(process, "VmHWM:") - self._before.get(process, 0), 0)
        return total * 1024


def _family() -> list[Path]:
    own = Path("/proc/self")
    found = [own.resolve()]
    for task in (own / "task").iterdir():
        with contextlib.suppress(OSError):
            found += [Path("/proc", child) for child in (task / "children").read_text().split()]
    return found


def _kilobytes(process: Path, name: str) -> int:
    for line in (process / "status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def _trim() -> None:
    """Give freed memory back to the system, so that the next peak is seen (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
