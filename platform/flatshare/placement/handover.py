"""Which replica should load what, before the set of replicas changes: so that a change finds models warm.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from flatshare.placement.balance import homes_of
from flatshare.placement.load import Held
from flatshare.placement.ring import ring_of

__all__ = ["after_loss", "to_load"]


def after_loss(names: Mapping[int, str], leaving: str) -> dict[int, str]:
    """Places after a replica has gone, as Serve reassigns them: a replica beyond the end takes a free number.

    This is how Serve 2.60 does it (``_perform_minimal_rank_reassignment``): numbers are kept where possible.

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


def to_load(
    held: Sequence[Held],
    names: Mapping[int, str],
    moved: Mapping[str, int] | None = None,
    gone: Sequence[Held] = (),
) -> dict[str, list[str]]:
    """What each replica should load to be a home of what the fleet holds now; most recently used first.

    Parameters
    ----------
    held
        What replicas hold, those that leave included.
    names
        Replicas by place, as they will be.
    moved
        Homes other than the ring's (``placement.balance``).
    gone
        What lost replicas held: it gets only the room that the others' models leave.

    Returns
    -------
    dict
        By replica: the models that belong there and fit its slots, and that it does not hold yet.
    """
    ring = ring_of(names)
    has = {one.replica: set(one.models) for one in held}
    slots = {one.replica: one.slots for one in (*held, *gone)}
    default = max(slots.values(), default=0)
    # Models that it is home to and holds already count too: a hand-over must not drive out more popular ones.
    belongs: dict[str, list[str]] = {name: [] for name in names.values()}
    # Every replica's most recent model before any replica's second: each list is ordered by recency, but ages
    # are not compared between lists.
    for some in (held, gone):
        for model_ref in _in_turns(some):
            places = homes_of(ring, moved or {}, model_ref, 1)
            if not places:
                continue
            name = names[places[0]]
            if len(belongs[name]) < slots.get(name, default) and model_ref not in belongs[name]:
                belongs[name].append(model_ref)
    found = {name: [ref for ref in refs if ref not in has.get(name, ())] for name, refs in belongs.items()}
    return {name: refs for name, refs in found.items() if refs}


def _in_turns(held: Sequence[Held]) -> Iterator[str]:
    """Everybody's first, then everybody's second, and so on."""
    for position in range(max((len(one.models) for one in held), default=0)):
        for one in held:
            if position < len(one.models):
                yield one.models[position]
