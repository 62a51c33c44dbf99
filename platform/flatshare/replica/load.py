"""How busy a replica is: requests are counted, and those under way are sampled ten times a second.

None of it runs on a request's path.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from flatshare.weights.tiers import ModelKey

__all__ = ["LoadMeter", "Measured", "Reading"]

SAMPLE_S: Final = 0.1
LAG_SAMPLES: Final = 300
"""For how many samples a late one is told: half a minute, so that a scrape sees what was between two."""

WINDOW_S: Final = 2.0
"""Over how long means are taken: short, so that a hot model is seen within seconds."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One sample.

    Attributes
    ----------
    requests
        Counted since the start.
    leases
        By resident model; only models that have any.
    """

    ongoing: int
    loading: int
    requests: int
    leases: Mapping[ModelKey, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over the window; see :class:`flatshare.placement.load.ReplicaLoad`."""

    ongoing: float
    loading: float
    requests_per_s: float
    idle_s: float
    models: Mapping[ModelKey, float]


class LoadMeter:
    """Takes samples at intervals, and reports the latest ones. To be used on one event loop.

    Parameters
    ----------
    read
        Takes one sample; must be quick.
    """

    def __init__(self, read: Callable[[], Reading], clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._seen: deque[tuple[float, Reading]] = deque()
        self._last_request_at = clock()
        self._lags: deque[float] = deque([0.0], maxlen=LAG_SAMPLES)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.get_running_loop().create_task(self._watch(), name="measure the load")

    def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()

    def look(self) -> None:
        """Look once."""
        now = self._clock()
        reading = self._read()
        if self._seen and reading.requests != self._seen[-1][1].requests:
            self._last_request_at = now
        self._seen.append((now, reading))
        # Keep one sample from before the window: the requests within the window are counted from there.
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW_S:
            self._seen.popleft()

    def measured(self) -> Measured:
        """What was seen in the last :data:`WINDOW_S` seconds."""
        self.look()
        readings = [reading for _, reading in self._seen]
        count = len(readings)
        leases: dict[ModelKey, float] = {}
        for reading in readings:
            for key, number in reading.leases.items():
                leases[key] = leases.get(key, 0.0) + number / count
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return Measured(
            ongoing=sum(reading.ongoing for reading in readings) / count,
            loading=sum(reading.loading for reading in readings) / count,
            requests_per_s=(last.requests - first.requests) / (ended - began) if ended > began else 0.0,
            idle_s=self._clock() - self._last_request_at,
            models=leases,
        )

    @property
    def lag_s(self) -> float:
        """The latest that the event loop came to a sample, of the last half minute's, in seconds."""
        return max(self._lags)

    async def _watch(self) -> None:
        while True:
            self.look()
            due = self._clock() + SAMPLE_S
            await asyncio.sleep(SAMPLE_S)
            self._lags.append(max(self._clock() - due, 0.0))
