"""Eviction policies: who goes first. A policy orders keys; it knows nothing of leases or bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from flatshare.cache.tiers import ModelKey

__all__ = ["EvictionPolicy", "LeastRecentlyUsed"]


class EvictionPolicy(Protocol):
    """Told of every admission, use and removal; called on the event loop, so each call is O(1)."""

    def admitted(self, key: ModelKey) -> None:
        """A model became resident."""
        ...

    def used(self, key: ModelKey) -> None:
        """A request leased a resident model."""
        ...

    def removed(self, key: ModelKey) -> None:
        """A model is no longer resident."""
        ...

    def victims(self) -> Iterator[ModelKey]:
        """Residents, the first to evict first. The caller skips those that are in use."""
        ...


class LeastRecentlyUsed:
    """Evict what was used longest ago."""

    def __init__(self) -> None:
        self._order: OrderedDict[ModelKey, None] = OrderedDict()

    def admitted(self, key: ModelKey) -> None:
        """See :class:`EvictionPolicy`."""
        self._order[key] = None

    def used(self, key: ModelKey) -> None:
        """See :class:`EvictionPolicy`."""
        self._order.move_to_end(key)

    def removed(self, key: ModelKey) -> None:
        """See :class:`EvictionPolicy`."""
        self._order.pop(key, None)

    def victims(self) -> Iterator[ModelKey]:
        """See :class:`EvictionPolicy`."""
        return iter(self._order)
