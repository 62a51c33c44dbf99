"""How many replicas a pool needs. Pure: what is known now and what was wanted lately come as arguments.

Serve's own policy samples a gauge: 45 requests a second of a millisecond each look like none, and it scaled
a loaded pool to zero. Here requests are counted, and a pool that was asked lately has at least one replica.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flatshare.placement.load import ReplicaLoad

__all__ = ["Bounds", "Wish", "decide_replicas", "wish"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an operator allows.

    Attributes
    ----------
    minimum, maximum
        Replicas. Equal: there is nothing to decide.
    target_ongoing_requests
        Requests in a pass, or waiting for one, that one replica should have.
    target_loading_requests
        Requests waiting for a load that one replica should have.
    upscale_delay_s, downscale_delay_s
        Seconds for which more, or fewer, replicas must have been wanted.
    idle_s
        Seconds without a request before the last replica goes.
    """

    minimum: int
    maximum: int
    target_ongoing_requests: float = 4.0
    target_loading_requests: float = 8.0
    upscale_delay_s: float = 2.0
    downscale_delay_s: float = 60.0
    idle_s: float = 60.0

    def clamped(self, replicas: int) -> int:
        """The nearest number that is allowed."""
        return min(max(replicas, self.minimum), self.maximum)


@dataclass(frozen=True, slots=True)
class Wish:
    """How many replicas the load of one moment wants."""

    at: float
    replicas: int


def wish(
    now: float,
    loads: Sequence[ReplicaLoad],
    bounds: Bounds,
    waiting: int = 0,
    asked_s: float = math.inf,
) -> Wish:
    """How many replicas this moment's load wants, within the bounds.

    Parameters
    ----------
    waiting
        Requests that wait before the pool, because it has no replica.
    asked_s
        Seconds since such a request was seen.
    """
    ongoing = sum(load.ongoing for load in loads)
    loading = sum(load.loading for load in loads)
    idle_s = min((load.idle_s for load in loads), default=math.inf)
    asked = (
        waiting > 0 or min(idle_s, asked_s) < bounds.idle_s or any(load.requests_per_s > 0 for load in loads)
    )
    return Wish(
        now,
        bounds.clamped(
            max(
                math.ceil((ongoing + waiting) / bounds.target_ongoing_requests),
                math.ceil(loading / bounds.target_loading_requests),
                1 if asked else 0,
            )
        ),
    )


def decide_replicas(
    now: float, current: int, wishes: Sequence[Wish], bounds: Bounds
) -> tuple[int, tuple[Wish, ...]]:
    """The number of replicas to have, and the wishes to remember.

    Scales up if every wish of the last ``upscale_delay_s`` is higher: to the lowest of them. Scales down if
    every wish of the last ``downscale_delay_s`` is lower: to the highest of them. Goes from zero to one at
    once, since a caller waits, and to zero without another delay, since ``idle_s`` was one.

    Parameters
    ----------
    wishes
        Since the last change of ``current``, oldest first; the last one is this moment's.
    """
    kept = tuple(one for one in wishes if one.at > now - _memory_s(bounds))
    if not kept:
        return bounds.clamped(current), ()
    latest = kept[-1].replicas
    allowed = bounds.clamped(current)
    if allowed != current:
        return allowed, kept
    if current == 0 and latest > 0:
        return 1, kept
    began = wishes[0].at
    lately_up = [one.replicas for one in kept if one.at >= now - bounds.upscale_delay_s]
    if now - began >= bounds.upscale_delay_s and min(lately_up, default=current) > current:
        return min(lately_up), kept
    if latest == 0:
        return 0, kept
    lately_down = [one.replicas for one in kept if one.at >= now - bounds.downscale_delay_s]
    if now - began >= bounds.downscale_delay_s and max(lately_down, default=current) < current:
        return max(lately_down), kept
    return current, kept


def _memory_s(bounds: Bounds) -> float:
    """A little more than the longer delay, so that its first wish is still there when it has passed."""
    return max(bounds.upscale_delay_s, bounds.downscale_delay_s) + 60.0
