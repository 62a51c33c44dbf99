"""How many consumers the waiting tasks need. Pure, as ``scaling.py``, whose delays it uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from flatshare.placement.scaling import Bounds, Wish

__all__ = ["Backlog", "consumer_wish"]

ROUNDS: Final = 8
"""Tasks that may wait for each that one consumer runs at a time, while none of them is old."""

OLD_S: Final = 5.0
"""Seconds after which a waiting task is old: then all should be run at once, if the bounds allow it."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """How much a queue holds.

    Attributes
    ----------
    due
        Tasks that could be run now.
    under_way
        Tasks that some consumer has in hand.
    oldest_s
        Seconds for which the oldest due one could have been run.
    held
        Tasks that a consumer holds back until their time.
    tells_age
        Whether ``oldest_s`` is known; it is 0 where it is not.
    """

    due: int = 0
    under_way: int = 0
    oldest_s: float = 0.0
    held: int = 0
    tells_age: bool = True

    @property
    def quiet(self) -> bool:
        """Whether nobody has anything to do, now or soon."""
        return not self.due and not self.under_way and not self.held


def consumer_wish(
    now: float, backlog: Backlog, at_a_time: int, bounds: Bounds, quiet_s: float = math.inf
) -> Wish:
    """How many consumers this moment's tasks want, within the bounds.

    One for each ``at_a_time * ROUNDS`` tasks; once a due task is old, one for each ``at_a_time``. None, when
    the queue has been quiet for ``bounds.idle_s``.

    Parameters
    ----------
    at_a_time
        Tasks that one consumer runs at a time.
    quiet_s
        Seconds for which the queue has been quiet.
    """
    tasks = backlog.due + backlog.under_way
    each = at_a_time if backlog.oldest_s > OLD_S else at_a_time * ROUNDS
    least = 1 if not backlog.quiet or quiet_s < bounds.idle_s else 0
    return Wish(now, bounds.clamped(max(math.ceil(tasks / each), least)))
