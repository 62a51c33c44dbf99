"""Which replicas to try for a model, best first: pure functions, so that they are tested without Ray."""

from __future__ import annotations

import math

__all__ = ["canonical", "rank"]


def canonical(model_ref: str) -> str:
    """One text for one model: ``acme:production`` is ``acme``, as the edge and the advertiser say."""
    return model_ref.removesuffix(":production")


def rank(
    order: list[str], warm: set[str], queued: dict[str, int], capacity: dict[str, int], load_factor: float
) -> list[list[str]]:
    """Ranks of replicas for one request, best first; pure, so that it can be tested without Ray.

    Parameters
    ----------
    order
        All replicas in the ring's order: the first is the home.
    warm
        Those that hold the model.
    queued
        Requests that each has now, as far as this router knows.
    capacity
        Requests that each takes at most.
    load_factor
        How far above the average load one may go before its requests spill.

    Returns
    -------
    list of list of str
        No empty rank; the last one has everybody.
    """
    bound = math.ceil(load_factor * (sum(queued.values()) + 1) / max(len(order), 1))
    open_ones = [name for name in order if queued.get(name, 0) < min(bound, capacity[name])]
    ranks: list[list[str]] = []
    home = order[:1]
    if home and home[0] in open_ones and (home[0] in warm or not warm):
        ranks.append(home)
    ranks += [[name] for name in open_ones if name in warm and [name] not in ranks][:1]
    ranks += [[name] for name in open_ones if [name] not in ranks][:2]
    ranks.append(list(order))
    return ranks
