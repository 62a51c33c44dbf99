"""Send shots and note each outcome: closed loop (so many at a time) or open loop (so many a second)."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import orjson
import uvloop

from flatshare.api.schemas import MODEL_ID_HEADER
from flatshare.bench.client import Connection, NoAnswer, Target
from flatshare.bench.workload import BenchRequest

__all__ = ["Load", "Outcome", "run_load", "send_all"]

CLIENT_TIMEOUT_S: Final = 60.0
MAX_KEPT_REQUESTS: Final = 20_000
"""Requests put together in advance: about 6 kB each."""

MAX_OPEN: Final = 2000
"""Open-loop requests in flight at a time; beyond it the machine, not the platform, is measured."""

Progress = Callable[[int], None]
"""Called with the number of requests that are done."""


@dataclass(frozen=True, slots=True)
class Load:
    """How to send.

    Attributes
    ----------
    requests, duration_s
        Stop after so many, or after so long; at least one is given.
    concurrency
        Closed loop: requests in flight at a time.
    rate
        Open loop: requests a second, whatever the answers; None for closed loop. Latency then
        counts from when a request was due, so a stall is not hidden by the waiting it causes.
    at_s
        When each request is due, in seconds from the start: a recorded trace. Then ``rate`` is not looked at.
    headers
        Sent with every request: an API key.
    """

    requests: int | None = None
    duration_s: float | None = None
    concurrency: int = 16
    rate: float | None = None
    at_s: Sequence[float] | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request's fate.

    Attributes
    ----------
    at_s
        When it was sent (closed loop) or due (open loop), from the start of the run.
    status
        HTTP status; 0 when there was no answer.
    code
        ``ok``, our error code, ``no_answer``, or ``cut_answer``: the connection ended within it.
    right
        Whether the labels were those expected; None if nothing was expected.
    """

    model: str
    at_s: float
    latency_s: float
    status: int
    code: str
    tier: str = ""
    replica: str = ""
    version: str = ""
    right: bool | None = None


async def send_all(
    url: str, shots: Iterator[BenchRequest], load: Load, progress: Progress | None = None
) -> list[Outcome]:
    """Send until the load is done; outcomes in the order in which they came in.

    Parameters
    ----------
    url
        Of the route, not of the platform.
    shots
        Endless, or the run ends with them.
    """
    outcomes: list[Outcome] = []
    target = Target.of(url)
    requests: dict[tuple[str, int], bytes] = {}  # bodies come from a small pool: put together once
    idle: list[Connection] = []
    started = time.perf_counter()
    end_s = load.duration_s if load.duration_s is not None else float("inf")
    if load.requests is not None:
        shots = itertools.islice(shots, load.requests)

    async def send(shot: BenchRequest, due_s: float) -> None:
        request = requests.get((shot.model, id(shot.body)))
        if request is None:
            headers = {
                **load.headers, **dict(shot.headers),
                MODEL_ID_HEADER: shot.model, "content-type": shot.content_type,
            }  # fmt: skip
            request = target.request(headers, shot.body)
            if len(requests) < MAX_KEPT_REQUESTS:
                kept.append(shot.body)  # so that its id stays its own
                requests[shot.model, id(shot.body)] = request
        connection = idle.pop() if idle else Connection(target)
        try:
            outcomes.append(await _send(connection, request, shot, started, due_s))
        finally:
            idle.append(connection)
        if progress is not None:
            progress(len(outcomes))

    async def worker() -> None:
        for shot in shots:
            now_s = time.perf_counter() - started
            if now_s >= end_s:
                return
            await send(shot, now_s)

    kept: list[bytes] = []
    try:
        if load.at_s is not None:
            await _open_loop(zip(load.at_s, shots, strict=False), end_s, started, send)
        elif load.rate is not None:
            even = (number / load.rate for number in itertools.count())
            await _open_loop(zip(even, shots, strict=False), end_s, started, send)
        else:
            await asyncio.gather(*[worker() for _ in range(load.concurrency)])
    finally:
        for connection in idle:
            connection.close()
    return outcomes


def run_load(
    url: str, shots: Iterator[BenchRequest], load: Load, progress: Progress | None = None
) -> list[Outcome]:
    """:func:`send_all` from code that is not async, on uvloop: it takes less CPU than asyncio's own loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(send_all(url, shots, load, progress))


async def _open_loop(
    due: Iterable[tuple[float, BenchRequest]],
    end_s: float,
    started: float,
    send: Callable[[BenchRequest, float], Awaitable[None]],
) -> None:
    """Start each request when it is due."""
    places = asyncio.Semaphore(MAX_OPEN)
    running: set[asyncio.Task[None]] = set()

    async def send_one(shot: BenchRequest, due_s: float) -> None:
        try:
            await send(shot, due_s)
        finally:
            places.release()

    for due_s, shot in due:
        if due_s >= end_s:
            break
        wait_s = started + due_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)  # the schedule itself, not a wait for something to happen
        await places.acquire()
        task = asyncio.create_task(send_one(shot, due_s))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def _send(
    connection: Connection, request: bytes, shot: BenchRequest, started: float, due_s: float
) -> Outcome:
    try:
        reply = await connection.post(request, CLIENT_TIMEOUT_S)
    except NoAnswer as error:
        code = "cut_answer" if error.begun else "no_answer"
        return Outcome(shot.model, due_s, time.perf_counter() - started - due_s, 0, code)
    return Outcome(
        model=shot.model,
        at_s=due_s,
        latency_s=time.perf_counter() - started - due_s,
        status=reply.status,
        code="ok" if reply.status == 200 else _code(reply.body, reply.status),
        tier=reply.headers.get("x-flatshare-tier", ""),
        replica=reply.headers.get("x-flatshare-replica", ""),
        version=reply.headers.get("x-flatshare-version", ""),
        right=_right(reply.body, shot) if reply.status == 200 else None,
    )


def _right(body: bytes, shot: BenchRequest) -> bool | None:
    if shot.expected is None:
        return None
    try:
        return bool(orjson.loads(body)["predicted_label"] == list(shot.expected))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return False


def _code(body: bytes, status: int) -> str:
    try:
        return str(orjson.loads(body)["error"]["code"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"http_{status}"
