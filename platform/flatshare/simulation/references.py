"""What a fleet is compared with: one cache that has all its slots, by LRU and by Belady's choice."""

from __future__ import annotations

import heapq
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

__all__ = ["belady_hits", "lru_hits"]

Models = npt.NDArray[np.int64]
Hits = npt.NDArray[np.bool_]


def lru_hits(models: Models, slots: int) -> Hits:
    """Whether each request finds its model in one cache that evicts what was used longest ago."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = np.zeros(len(models), np.bool_)
    for number, model in enumerate(models.tolist()):
        if model in held:
            held.move_to_end(model)
            hits[number] = True
            continue
        if len(held) >= slots:
            held.popitem(last=False)
        held[model] = None
    return hits


def belady_hits(models: Models, slots: int) -> Hits:
    """The same for a cache that knows the future, and evicts the model whose next use is farthest.

    No cache of so many slots that loads what is asked for has more hits (L. A. Belady, "A study of
    replacement algorithms for a virtual-storage computer", IBM Systems Journal 5, 1966).
    """
    never = len(models)
    following = np.full(len(models), never, np.int64)
    order = np.argsort(models, kind="stable")
    same = models[order[1:]] == models[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    hits = np.zeros(len(models), np.bool_)
    held: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []  # minus the next use, and the model; old entries stay in it
    for number, (model, next_use) in enumerate(zip(models.tolist(), following.tolist(), strict=True)):
        if model in held:
            hits[number] = True
        elif len(held) >= slots:
            while True:
                at, victim = heapq.heappop(farthest)
                if held.get(victim) == -at:
                    del held[victim]
                    break
        held[model] = next_use
        heapq.heappush(farthest, (-next_use, model))
    return hits
