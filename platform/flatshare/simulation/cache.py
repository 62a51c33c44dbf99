"""The residents of one replica in virtual time: the project's eviction policies over slots.

No lease is held and nothing is loaded: a model is there at once. ``tests/unit/flatshare/simulation``
compares it with ``residency.model_cache.ModelCache``, request by request.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable

from flatshare.residency.policy import POLICIES
from flatshare.weights.tiers import ModelKey

__all__ = ["HostCache", "SlotCache"]


class SlotCache:
    """A cache of ``slots`` models.

    Parameters
    ----------
    policy
        A name of :data:`flatshare.residency.policy.POLICIES`.
    """

    def __init__(self, slots: int, policy: str) -> None:
        self.slots = slots
        self._policy = POLICIES[policy]()
        self._held: dict[int, ModelKey] = {}
        self._names: dict[ModelKey, int] = {}
        self._used: OrderedDict[int, int] = OrderedDict()  # hits, least recently used first
        self._loaded_at: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._held)

    def ask(self, model: int, now: float = 0.0) -> bool:
        """Take one request; returns whether its model was there. Afterwards it is."""
        key = self._held.get(model)
        if key is not None:
            self._policy.used(key)
            self._used[model] += 1
            self._used.move_to_end(model)
            return True
        self.load(model, now)
        return False

    def load(self, model: int, now: float) -> None:
        """Load a model that is not there; another one is evicted for it when all slots are taken."""
        if len(self._held) >= self.slots:
            victim = next(iter(self._policy.victims()))
            self._policy.removed(victim, evicted=True)
            gone = self._names.pop(victim)
            del self._held[gone], self._used[gone], self._loaded_at[gone]
        key = ModelKey(str(model), 1)
        self._held[model], self._names[key] = key, model
        self._used[model] = 0
        self._loaded_at[model] = now
        self._policy.admitted(key)

    def popular(self, count: int, now: float) -> list[tuple[float, int]]:
        """The models with most requests a second since they were loaded, each as its rate and the model."""
        rates = [
            (hits / max(now - self._loaded_at[model], 1.0), model)
            for model, hits in self._used.items()
            if hits
        ]
        return heapq.nlargest(count, rates)

    def preload(self, models: Iterable[int], now: float) -> int:
        """Load missing models while there is room without evicting; returns how many were loaded."""
        count = 0
        for model in models:
            if model not in self._held and len(self._held) < self.slots:
                self.load(model, now)
                count += 1
        return count

    @property
    def models(self) -> list[int]:
        """What is held, most recently used first."""
        return list(reversed(self._used))


class HostCache:
    """The host tier of one node: it holds ``models`` models, and evicts the least recently used."""

    def __init__(self, models: int) -> None:
        self._most = models
        self._held: OrderedDict[int, None] = OrderedDict()

    def ask(self, model: int) -> bool:
        """Take one load; returns whether the node had its model. Afterwards it has."""
        if model in self._held:
            self._held.move_to_end(model)
            return True
        self._held[model] = None
        if len(self._held) > self._most:
            self._held.popitem(last=False)
        return False
