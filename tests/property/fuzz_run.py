"""Runs hostile requests against every route of both planes, and says what each cost and which broke a rule.

The rules (:class:`Bounds`): no 5xx but a stated 503, 504 or 507; errors in one form; no secret, no traceback; and of
loop lag, memory and time no more than a bound. Loop lag is bounded by what the largest honest request takes on the
same machine in the same run. A request that is too slow is sent again: a machine that was busy is not, a second time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ..contract.planes import MODEL, Control, Data, data_plane
from .body_bombs import LIMIT
from .hostile import Maker, Request, Route, routes_of
from .watch import Cost, Reply, Watch, send

__all__ = ["Bounds", "Finding", "Plane", "Planes", "RouteResult", "baseline", "judged", "run_route"]

STATED: Final = {503: "retry-after", 504: None, 507: None}
"""Statuses of 500 and more that are answers, and the header that each must have."""

TRIES: Final = 3
TIMEOUT_S: Final = 60.0
"""Seconds, beyond what a request may take, after which nobody waits for its answer any more."""

LINE_S: Final = 0.002
"""Seconds that each line of a stream may take beside: a line is a request, and a body may have 200,000."""

CONTROL_LIVES: Final = 50
"""Requests after which the control plane is made anew: what it was made to create stays in its registry."""


@dataclass(frozen=True)
class Bounds:
    """What one request may cost.

    Attributes
    ----------
    peak_bytes
        A JSON body of empty lists takes 25 times its length as Python objects, and is not refused before it is read.
    """

    lag_s: float = 0.25
    peak_bytes: int = 40 * LIMIT
    seconds: float = 10.0


@dataclass(frozen=True)
class Finding:
    """A request that broke a rule: the one of this number, of this route and seed."""

    route: Route
    number: int
    what: str
    request: str


@dataclass
class RouteResult:
    """What a route's requests cost at worst."""

    route: Route
    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    worst: Cost = field(default_factory=Cost)
    findings: list[Finding] = field(default_factory=list)

    def add(self, reply: Reply | None, cost: Cost) -> None:
        self.requests += 1
        self.statuses[reply.status if reply is not None else 0] += 1
        self.worst = Cost(
            max(self.worst.lag_s, cost.lag_s),
            max(self.worst.peak_bytes, cost.peak_bytes),
            max(self.worst.seconds, cost.seconds),
        )


@dataclass
class Plane:
    """One of the two applications, and an operator's key for it."""

    name: str
    app: Any
    key: str
    secrets: list[str]
    routes: list[Route]
    key_id: str = ""


def _plane(name: str, made: Data | Control) -> Plane:
    texts = [text for text in made.keys.texts.values() if text is not None]
    # Secrets of keys that exist: the made-up ones are what a request may hold anyway.
    secrets = [secret for text in texts if len(set(secret := text.split("_", 2)[2])) > 5]
    key = made.keys.texts["admin"]
    assert key is not None
    return Plane(name, made.app, key, secrets, routes_of(made.app._app), made.keys.victim)


class Planes:
    """Both planes; the control plane can be made anew."""

    def __init__(self, data: Data, folder: Path) -> None:
        self._folder = folder
        self.data = _plane("data", data)
        self.control = self.fresh_control()

    def fresh_control(self) -> Plane:
        self.control = _plane("control", Control(Path(tempfile.mkdtemp(dir=self._folder))))
        return self.control

    def all(self) -> Iterator[tuple[Plane, Route]]:
        for plane in (self.data, self.control):
            for route in plane.routes:
                yield plane, route

    @classmethod
    @contextlib.contextmanager
    def made(cls) -> Iterator[Planes]:
        """Both, while this lasts."""
        with tempfile.TemporaryDirectory() as folder, data_plane() as data:
            yield cls(data, Path(folder))


def honest(key: str, size: int = LIMIT) -> Request:
    """The largest request that is all right: as many rows as may be, in JSON that was indented to fill the limit."""
    row = [[0.12345678901234567] * 28] * 28
    text = json.dumps({"image": [[row]] * 8})
    text += " " * (size - len(text))
    return Request(
        "POST",
        "/predict",
        (("x-api-key", key), (MODEL, "acme"), ("content-type", "application/json")),
        text.encode(),
    )


async def baseline(plane: Plane, bounds: Bounds, watch: Watch) -> Bounds:
    """The bounds for this machine: a lag of ten times that of the largest honest request is not held against anybody."""
    lags = []
    for _ in range(5):  # the first ones also load the model and what else is loaded once
        async with watch.measuring():
            reply = await send(plane.app, honest(plane.key))
        assert reply.status == 200, bytes(reply.body)
        lags.append(watch.cost.lag_s)
    return replace(bounds, lag_s=max(bounds.lag_s, 10 * sorted(lags)[2]))


def judged(request: Request, reply: Reply, secrets: Sequence[str]) -> Iterator[str]:
    """What is wrong with a reply."""
    text = bytes(reply.body).decode("utf-8", "replace")
    if not 200 <= reply.status < 600:
        yield f"status {reply.status}"
    if reply.status >= 500:
        needed = STATED.get(reply.status, "")
        if needed == "" or (needed is not None and needed not in reply.headers):
            yield f"status {reply.status}: {text[:200]}"
    if "Traceback" in text:
        yield "a traceback"
    if any(secret in text or secret in str(reply.headers) for secret in secrets):
        yield "a secret"
    if reply.status >= 400 and request.method != "HEAD":
        try:
            document = json.loads(text)
            error = document["error"]
            code = document["code"] if isinstance(error, str) else error["code"]
            message = error if isinstance(error, str) else error["message"]
        except (ValueError, TypeError, KeyError):
            yield f"an error in no form of ours: {text[:200]}"
            return
        if not code.replace("_", "").isalpha():
            yield f"the code {code!r}"
        if len(message) > 600 or not message.isprintable():
            yield f"a message of {len(message)} characters, printable: {message.isprintable()}"


async def measured(
    app: Any, request: Request, bounds: Bounds, watch: Watch
) -> tuple[Reply | None, Cost, str]:
    """The reply, what it cost, and what was wrong with sending it. What is slow is sent again; the least counts."""
    best: Cost | None = None
    for _ in range(TRIES):
        reply, failure = None, ""
        async with watch.measuring():
            try:
                async with asyncio.timeout(TIMEOUT_S + bounds.seconds):
                    reply = await send(app, request)
            except TimeoutError:
                failure = f"no answer in {TIMEOUT_S + bounds.seconds:g} s"
            except Exception as error:  # what an application raises, a server logs with its traceback
                failure = f"raised {type(error).__name__}: {str(error)[:200]}"
        now = watch.cost
        # Memory is not asked again: what was freed may be kept by the allocator, and not grow a second time.
        best = (
            now
            if best is None
            else Cost(min(now.lag_s, best.lag_s), best.peak_bytes, min(now.seconds, best.seconds))
        )
        if best.lag_s <= bounds.lag_s and best.seconds <= bounds.seconds:
            break
    assert best is not None
    return reply, best, failure


async def run_one(
    plane: Plane, request: Request, bounds: Bounds, watch: Watch, result: RouteResult, number: int = 0
) -> Reply | None:
    """Send one request and note what it cost, and what was wrong."""
    if request.path.endswith("/stream"):
        bounds = replace(bounds, seconds=bounds.seconds + LINE_S * request.body.count(b"\n"))
    reply, cost, failure = await measured(plane.app, request, bounds, watch)
    result.add(reply, cost)
    wrong: list[str] = [failure] if failure else []
    if reply is not None:
        wrong += judged(request, reply, plane.secrets)
    if cost.lag_s > bounds.lag_s:
        wrong.append(f"held the loop for {cost.lag_s * 1e3:.0f} ms (bound {bounds.lag_s * 1e3:.0f})")
    if cost.peak_bytes > bounds.peak_bytes:
        wrong.append(f"took {cost.peak_bytes / 1e6:.0f} MB at its peak (bound {bounds.peak_bytes / 1e6:.0f})")
    if cost.seconds > bounds.seconds:
        wrong.append(f"took {cost.seconds:.1f} s (bound {bounds.seconds:g})")
    result.findings += [Finding(result.route, number, what, str(request)) for what in wrong]
    return reply


async def run_route(
    planes: Planes,
    plane: Plane,
    route: Route,
    numbers: Iterable[int],
    *,
    seed: int,
    bounds: Bounds,
    watch: Watch,
) -> RouteResult:
    """Send the requests of these numbers (of those that a seed makes for a route)."""
    result = RouteResult(route)
    wanted = set(numbers)
    maker = Maker(hash_of(seed, route), plane.key, plane.key_id)
    for number in range(max(wanted, default=-1) + 1):
        if plane.name == "control" and number % CONTROL_LIVES == 0:
            plane = planes.fresh_control()
            maker.key, maker.key_id = plane.key, plane.key_id
        request = maker.request(route)
        if number in wanted:
            await run_one(plane, request, bounds, watch, result, number)
    return result


def hash_of(seed: int, route: Route) -> int:
    """A seed for a route; Python's own hash differs between processes."""
    return int.from_bytes(f"{seed} {' '.join(route)}".encode()) % 2**61
