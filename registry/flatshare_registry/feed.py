"""The change feed: which tenants' heads are about to change, so that nobody must read all of them again.

Before a writer swaps a head it puts one empty object whose key has the time, the tenant and the revision to
come. Writers never wait for each other there. Announce, then swap: a crash between the two announces what
never comes, and hides nothing. A reader lists what is new, and reads the heads of announced tenants until
their revision is there.

Measured against shard objects that writers change by compare-and-swap: ``scripts/bench-feed``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from flatshare_registry import layout
from flatshare_registry.errors import InvalidRef
from flatshare_registry.ids import TenantId
from flatshare_registry.records import ULID_TIME_CHARS, new_ulid
from flatshare_registry.stores.base import BlobStore, Overwrite

__all__ = ["ANNOUNCED_S", "LATE_S", "OVERLAP_S", "Announcement", "ChangeFeed"]

LATE_S: Final = 10.0
"""Seconds after which a swap counts as late, and is announced once more when it has landed."""

OVERLAP_S: Final = 30.0
"""Seconds that a reader looks back beyond its last look. They cover how far a writer's clock may be behind
the reader's, and the time between an announcement and its swap (``LATE_S``)."""

ANNOUNCED_S: Final = 120.0
"""Seconds that a reader waits for an announced revision, before it believes that its writer died."""

KEPT_S: Final = 3600.0
"""Seconds that announcements are kept at least; ``gc`` removes older ones. No reader looks back that far."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """A head that was about to change.

    Attributes
    ----------
    id
        Of this announcement, unique in its store.
    revision
        The revision that the head would have afterwards.
    """

    id: str
    tenant: TenantId
    revision: int


class ChangeFeed:
    """The announcements in one store. All methods are blocking; safe for threads.

    Parameters
    ----------
    clock
        POSIX seconds, of who announces.
    """

    def __init__(self, store: BlobStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock

    def announce(self, tenant: TenantId, revision: int) -> float:
        """Say that a head is about to get a revision; returns when, by the clock.

        Raises
        ------
        Unavailable
            The store does not answer: the change must not be made.
        """
        now_s = self._clock()
        self._store.put(layout.change_key(new_ulid(now_s), tenant, revision), b"", Overwrite())
        return now_s

    def since(self, time_s: float) -> list[Announcement]:
        """What was announced at or after a time (POSIX seconds, by the writers' clocks), in any order.

        One request for each 1,000.

        Raises
        ------
        Unavailable
            The store does not answer, or lets this caller list nothing.
        """
        after = f"{layout.CHANGES}{new_ulid(max(time_s, 0.0))[:ULID_TIME_CHARS]}"
        found: list[Announcement] = []
        for meta in self._store.list(layout.CHANGES, after=after):
            change = layout.change_of(meta.key)
            if change is not None:
                with contextlib.suppress(InvalidRef):  # not ours: it announces nobody
                    found.append(Announcement(change[0], TenantId(change[1]), change[2]))
        return found

    def old(self, now_s: float) -> list[str]:
        """Keys of announcements that no reader looks for any more.

        Parameters
        ----------
        now_s
            POSIX seconds by the store's clock.
        """
        return [meta.key for meta in self._store.list(layout.CHANGES) if now_s - meta.modified_s > KEPT_S]
