"""How many replicas serve a model: one, its home, until its load is too much for one.

Pure: time and loads come as arguments, so that the fleet's keeper and a simulator decide alike. The first N
homes of the ring have the copies, so all that know the number know the places. Growing is quick, because a
caller waits; shrinking waits, so that a load that comes in waves does not move a model with each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from flatshare.placement.balance import homes_of
from flatshare.placement.load import ReplicaLoad, demand
from flatshare.placement.ring import ring_of

__all__ = ["COOL_S", "SHRINK_AT", "Spread", "decide_copies"]

SHRINK_AT: Final = 0.6
"""A copy goes when each of the remaining ones would have less than this share of the target. Otherwise copies
of a model whose demand is just at a step would come and go."""

COOL_S: Final = 10.0
"""Seconds that demand must have been so low."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A model with copies.

    Attributes
    ----------
    places
        Its first homes, best first; at least two.
    cool_since
        When its demand became too low for so many; None while it is not.
    """

    places: tuple[int, ...]
    cool_since: float | None = None


def decide_copies(
    now: float,
    loads: Sequence[ReplicaLoad],
    before: Mapping[str, Spread],
    target: float,
    moved: Mapping[str, int] | None = None,
) -> dict[str, Spread]:
    """Which models should have copies now, and where.

    Parameters
    ----------
    now
        Seconds, by the same clock as ``before``.
    loads
        Of all replicas that answer.
    before
        What was decided last.
    target
        Requests under way that one replica should have of one model.
    moved
        Homes other than the ring's (``placement.balance``).

    Returns
    -------
    dict
        Models that should be in more than one place. Constant loads change nothing; more demand never means
        fewer copies.
    """
    ring = ring_of(load.place for load in loads)
    ongoing = demand(loads)
    found: dict[str, Spread] = {}
    for model_ref in sorted({*ongoing, *before}):
        spread = before.get(model_ref)
        count = len(spread.places) if spread is not None else 1
        wanted = math.ceil(ongoing.get(model_ref, 0.0) / target)
        cool_since = None
        if wanted > count:
            count = wanted
        elif ongoing.get(model_ref, 0.0) < SHRINK_AT * target * (count - 1):
            cool_since = spread.cool_since if spread is not None else None
            cool_since = now if cool_since is None else cool_since
            if now - cool_since >= COOL_S:
                count = max(math.ceil(ongoing.get(model_ref, 0.0) / (SHRINK_AT * target)), 1)
                cool_since = None
        places = tuple(homes_of(ring, moved or {}, model_ref, count))
        if len(places) > 1:
            found[model_ref] = Spread(places, cool_since)
    return found
