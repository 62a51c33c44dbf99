"""Moves popular models that share a home by chance, until no replica has much more than its share.

A hash spreads models evenly, but not their requests. With the eight most popular of 2,000 models on one of
two replicas, that replica has two thirds of the requests, these models take its slots, and the fleet has 0.93
of the hits that one cache with the same slots has. A few moves fix this. They are few and they last; every
other model has its home on the ring.

Pure: rates and earlier moves come as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from flatshare.placement.load import ReplicaLoad
from flatshare.placement.ring import Ring

__all__ = ["LEAST_RATE", "MOST_MOVED", "MOVE_TICKS", "RATE_SHARE", "decide_moves", "homes_of"]

UNEVEN: Final = 1.15
"""A model moves when the busiest replica has more than this times the mean."""

NOISE: Final = 3.0
"""Standard deviations by which its load must also exceed that."""

GAIN: Final = 0.9
"""Share of half the gap between two replicas that a moved model may have. With more, two replicas would swap
it for ever.
"""

WORTH: Final = 0.05
"""A model must have at least this share of what may move, or the load that a move costs is wasted."""

RATE_SHARE: Final = 0.2
"""Weight of a new second's rate in the mean of rates: about five seconds."""

MOVE_TICKS: Final = 3
"""Decisions between two moves, so that one is felt before the next."""

LEAST_RATE: Final = 20.0
"""Total requests a second below which no replica is busy enough for its share to mean anything."""

MOST_MOVED: Final = 256
"""Models that have a home other than the ring's: each is a row in every edge's map."""


def homes_of(ring: Ring, moved: Mapping[str, int], model_ref: str, count: int) -> list[int]:
    """The first homes of a model: where it was moved to, then the ring's."""
    place = moved.get(model_ref)
    if place is None or place not in ring.places:
        return ring.homes(model_ref, count)
    others = [one for one in ring.homes(model_ref, count + 1) if one != place]
    return [place, *others][:count]


def decide_moves(
    loads: Sequence[ReplicaLoad], rates: Mapping[int, float], moved: Mapping[str, int]
) -> dict[str, int]:
    """Where models live that do not live at the ring's home; at most one is new.

    Parameters
    ----------
    loads
        Of all replicas that answer: their popular models.
    rates
        Requests a second by place, a mean of some seconds: a peak of a moment moves nothing.
    moved
        What was decided before.

    Returns
    -------
    dict
        Place by model ref. A place that the pool has no more is left out.
    """
    places = sorted(load.place for load in loads)
    settled = places == list(range(len(places)))
    kept = {ref: place for ref, place in moved.items() if not settled or place in rates}
    if len(kept) >= MOST_MOVED:  # those that nobody asks for any more go home
        asked = {ref for load in loads for ref in load.popular}
        kept = {ref: place for ref, place in kept.items() if ref in asked}
    if not settled or len(places) < 2 or set(rates) != set(places) or len(kept) >= MOST_MOVED:
        return kept
    mean = sum(rates.values()) / len(rates)
    # A mean over some seconds of random requests is uneven by itself, and more so the fewer requests come. Of
    # 20 replicas with 3 requests a second each, one is always far above; moves would only cost loads.
    chance = NOISE * math.sqrt(mean * RATE_SHARE / (2 - RATE_SHARE))
    busiest = max(places, key=lambda place: (rates[place], -place))
    calmest = min(places, key=lambda place: (rates[place], place))
    if rates[busiest] <= UNEVEN * mean + chance:
        return kept
    popular = next(load.popular for load in loads if load.place == busiest)
    room = (rates[busiest] - rates[calmest]) / 2 * GAIN
    fitting = [(rate, ref) for ref, rate in popular.items() if WORTH * room <= rate <= room]
    if fitting:
        kept[max(fitting)[1]] = calmest
    return kept
