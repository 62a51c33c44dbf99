"""Eviction policies: which model goes first. A policy orders keys; it knows no leases, pins or bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol

from flatshare.weights.tiers import ModelKey

__all__ = ["POLICIES", "EvictionPolicy", "LeastRecentlyUsed", "Sieve"]


class EvictionPolicy(Protocol):
    """Told of every admission, use and removal, on the event loop: a use must cost O(1)."""

    def admitted(self, key: ModelKey) -> None:
        """A model became resident."""
        ...

    def used(self, key: ModelKey) -> None:
        """A request leased a resident model."""
        ...

    def removed(self, key: ModelKey, *, evicted: bool) -> None:
        """A model is no longer resident: chosen from :meth:`victims`, or taken away by hand."""
        ...

    def victims(self) -> Iterator[ModelKey]:
        """Residents, the first to evict first. The caller skips those that are in use.

        Looking changes nothing; :meth:`removed` tells what was chosen.
        """
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

    def removed(self, key: ModelKey, *, evicted: bool) -> None:
        """See :class:`EvictionPolicy`."""
        self._order.pop(key, None)

    def victims(self) -> Iterator[ModelKey]:
        """See :class:`EvictionPolicy`."""
        return iter(self._order)


class Sieve:
    """Evict what was not used since the hand last passed; a scan of one-hit models evicts only itself.

    SIEVE (Zhang et al., NSDI 2024): models stay in the order of their admission; a use sets a mark;
    a hand walks from the oldest to the newest, takes a mark away where it finds one, and evicts
    where it finds none. A model used once while being scanned over never displaces one that is used
    again. In a replica the load itself counts as admission, not as use.
    """

    def __init__(self) -> None:
        self._used: OrderedDict[ModelKey, bool] = OrderedDict()
        self._hand: ModelKey | None = None

    def admitted(self, key: ModelKey) -> None:
        """See :class:`EvictionPolicy`."""
        self._used[key] = False

    def used(self, key: ModelKey) -> None:
        """See :class:`EvictionPolicy`."""
        self._used[key] = True

    def removed(self, key: ModelKey, *, evicted: bool) -> None:
        """See :class:`EvictionPolicy`: the hand walked to an evicted key and cleared the marks it met."""
        if key not in self._used:
            return
        order = list(self._walk())
        position = order.index(key)
        following = order[position + 1] if position + 1 < len(order) else None
        if evicted:
            for passed in order[:position]:
                self._used[passed] = False
            self._hand = following
        elif self._hand == key:
            self._hand = following
        del self._used[key]

    def victims(self) -> Iterator[ModelKey]:
        """See :class:`EvictionPolicy`."""
        order = list(self._walk())
        yield from [key for key in order if not self._used[key]]
        yield from [key for key in order if self._used[key]]

    def _walk(self) -> Iterator[ModelKey]:
        """All keys, from the hand on towards the newest, then from the oldest to the hand."""
        keys = list(self._used)
        start = keys.index(self._hand) if self._hand is not None and self._hand in self._used else 0
        yield from keys[start:]
        yield from keys[:start]


POLICIES: Final[Mapping[str, Callable[[], EvictionPolicy]]] = {"lru": LeastRecentlyUsed, "sieve": Sieve}
"""By the name that the setting uses."""
