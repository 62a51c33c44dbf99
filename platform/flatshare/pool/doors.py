"""Which replica listens where, and at which place of the ring: the senders of requests ask the replicas
for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Final

from flatshare.placement.load import Held
from flatshare.pool.details import DoorAddress, ReplicaState
from flatshare.pool.handle import pool_handle

__all__ = ["Doors", "ask_held", "ask_replicas"]

logger = logging.getLogger("flatshare.pool")

ASK_S: Final = 3.0
"""Seconds that replicas have to say where their doors are; who does not is asked at the next look."""

TAKES_REQUESTS: Final = frozenset({"RUNNING", "UPDATING", "PENDING_MIGRATION"})
"""States of a replica that answers. While it is UPDATING, Serve names it nowhere, and its door stays open."""

ASK_AGAIN_AFTER: Final = 20
"""Looks after which replicas are asked although nothing seems to have changed: Serve may give them other
places.
"""


class Doors:
    """Keeps account of the doors of living replicas.

    Parameters
    ----------
    ask
        Asks every replica; blocking. Returns what answered.
    """

    def __init__(self, ask: Callable[[], Iterable[DoorAddress]]) -> None:
        self._ask = ask
        self._known: dict[str, DoorAddress] = {}
        self._looks = 0

    def of(self, states: Sequence[ReplicaState], draining: Collection[str] = ()) -> tuple[DoorAddress, ...]:
        """The doors of replicas that take requests, by place.

        A replica whose door is not known, or which is being drained, is left out. No place is named twice:
        while two replicas claim a place, the one that was known there first keeps it.
        """
        living = {one.replica for one in states if one.state in TAKES_REQUESTS}
        self._known = {name: door for name, door in self._known.items() if name in living}
        self._looks += 1
        if living and (not self._settled(living) or self._looks > ASK_AGAIN_AFTER):
            self._looks = 0
            self._known |= {door.replica: door for door in self._ask() if door.replica in living}
        by_place: dict[int, DoorAddress] = {}
        for door in self._known.values():
            if door.replica not in draining:
                by_place.setdefault(door.place, door)
        return tuple(by_place[place] for place in sorted(by_place))

    def _settled(self, living: set[str]) -> bool:
        """Whether all are known, and their places are the numbers from 0 on, as Serve makes them."""
        places = sorted(door.place for door in self._known.values())
        return len(self._known) == len(living) and places == list(range(len(living)))


def ask_replicas() -> list[DoorAddress]:
    """Ask every replica that Serve passes a broadcast to. Blocks; empty when nobody can be asked."""
    try:
        answers: list[Any] = pool_handle().broadcast("door").results(timeout_s=ASK_S, return_exceptions=True)
    except Exception as error:  # ray raises a dozen kinds while replicas come and go
        logger.warning("replicas were not asked for their doors: %s", type(error).__name__)
        return []
    return [one for one in answers if isinstance(one, DoorAddress)]


async def ask_held() -> list[Held]:
    """What each running replica holds; for one that starts. Empty when nobody runs or can be asked."""
    try:
        async with asyncio.timeout(ASK_S):
            answers = await pool_handle().broadcast("held").results_async(return_exceptions=True)
    except Exception as error:  # ray raises a dozen kinds; at the first start there is nobody
        logger.info("nobody was asked what it holds: %s", type(error).__name__)
        return []
    return [one for one in answers if isinstance(one, Held)]
