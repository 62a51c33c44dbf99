"""Which replica listens where: asked once of each replica, by everybody who sends requests to doors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from flatshare.pool.details import DoorAddress, Target
from flatshare.pool.handle import pool_handle

__all__ = ["Doors", "ask_replicas"]

logger = logging.getLogger("flatshare.pool")

ASK_S: Final = 3.0
"""Seconds that replicas have to say where their doors are; who does not is asked at the next look."""


class Doors:
    """Turns Serve's targets into the addresses of their doors.

    Parameters
    ----------
    ask
        Asks every replica; blocking. Returns what answered.
    """

    def __init__(self, ask: Callable[[], Iterable[DoorAddress]]) -> None:
        self._ask = ask
        self._known: dict[str, DoorAddress] = {}

    def of(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        """The same replicas at their doors; one whose door is not known stays where Serve listens for it."""
        names = {target.name: target.name.rpartition("#")[2] for target in targets}
        if any(replica not in self._known for replica in names.values()):
            found = {one.replica: one for one in self._ask()}
            # Names are unique and new at each start, so what was once said stays true.
            self._known = {
                replica: known
                for replica in names.values()
                if (known := found.get(replica) or self._known.get(replica)) is not None
            }
        return tuple(
            Target(target.name, door.host, door.port)
            if (door := self._known.get(names[target.name])) is not None
            else target
            for target in targets
        )


def ask_replicas() -> list[DoorAddress]:
    """Ask every replica that Serve passes a broadcast to. Blocks; empty when nobody can be asked."""
    try:
        answers: list[Any] = pool_handle().broadcast("door").results(timeout_s=ASK_S, return_exceptions=True)
    except Exception as error:  # ray raises a dozen kinds while replicas come and go
        logger.warning("replicas were not asked for their doors: %s", type(error).__name__)
        return []
    return [one for one in answers if isinstance(one, DoorAddress)]
