"""Which replica should load what, before the set of replicas changes: so that a change finds models warm.
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flatshare.placement.load import Held
from flatshare.placement.ring import Ring

__all__ = ["after_loss", "to_load"]


def after_loss(names: Mapping[int, str], leaving: str) -> dict[int, str]:
    """Places once a replica has gone, as Serve gives them anew: who is beyond the end takes a free number.

    Serve 2.60 does it so (``_perform_minimal_rank_reassignment``): a replica keeps its number where it can.

    Parameters
    ----------
    names
        Replicas by place.
    """
    staying = {place: name for place, name in names.items() if name != leaving}
    free = [place for place in range(len(staying)) if place not in staying]
    beyond = sorted(place for place in staying if place >= len(staying))
    moved = dict(zip(beyond, free, strict=False))
    return {moved.get(place, place): name for place, name in staying.items()}


def to_load(held: Sequence[Held], names: Mapping[int, str]) -> dict[str, list[str]]:
    """What each replica should load to be a home of what the fleet holds now; most recently used first.

    Parameters
    ----------
    held
        What replicas hold, those that leave included.
    names
        Replicas by place, as they will be.

    Returns
    -------
    dict
        By replica; no longer than its slots, and nothing that it holds already.
    """
    ring = Ring(names)
    has = {one.replica: set(one.models) for one in held}
    slots = {one.replica: one.slots for one in held}
    default = max(slots.values(), default=0)
    wanted: dict[str, list[str]] = {name: [] for name in names.values()}
    # Everybody's most recent before anybody's second: a list each is by recency, their ages are not compared.
    longest = max((len(one.models) for one in held), default=0)
    for position in range(longest):
        for one in held:
            if position >= len(one.models):
                continue
            place = ring.home(one.models[position])
            if place is None:
                continue
            name = names[place]
            model_ref = one.models[position]
            if model_ref not in has.get(name, set()) and model_ref not in wanted[name]:
                wanted[name].append(model_ref)
    return {name: refs[: slots.get(name, default)] for name, refs in wanted.items() if refs}
