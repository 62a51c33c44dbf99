"""Hashes a node's files again, one after the other, for as long as a replica lives.

A file is checked when it is published, and a model answers its probe when it is built from newly mapped
bytes. A model that is rebuilt from tensors that are still mapped answers it once a minute at most: in a Zipf
mix half of the requests load, and a probe is a second row in each of these passes. Damage to a file's bytes
meanwhile (memory that flips a bit, a disk) is found here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from flatshare.weights.host_tier import HostTier

__all__ = ["HostScrubber"]

logger = logging.getLogger("flatshare.weights")

CORE_SHARE: Final = 0.02
"""Share of a core that this may take. A round over 8 GiB is 9 s of hashing (5 ms for 4.8 MB): 8 minutes."""

LOOK_S: Final = 1.0
"""Seconds between two looks at what other replicas of the node have found."""

ROUND_S: Final = 60.0
"""Seconds between two rounds, at least."""


class HostScrubber:
    """One replica's part in scrubbing. One replica of a node hashes; all are told what it finds.

    Parameters
    ----------
    on_damage
        Called in this object's thread with the digest of a file whose bytes are not what they were. The file
        is gone by then, and is fetched again when it is needed. Anything that still maps it must release it.
    """

    def __init__(
        self,
        tier: HostTier,
        on_damage: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tier = tier
        self._on_damage = on_damage
        self._clock = clock
        self._seen = tier.damage_marks()  # older than this process: it maps nothing of them
        self._names: list[str] = []
        self._due = 0.0
        self._turn: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End after the file that is hashed now. Does not wait for it."""
        self._stop.set()

    def step(self) -> None:
        """Tell of damage that others found, and hash the next file if it is this replica's turn and time."""
        marks = self._tier.damage_marks()
        for digest in sorted(name for name, at in marks.items() if self._seen.get(name) != at):
            self._on_damage(digest)
        self._seen = marks
        now = self._clock()
        if now < self._due:
            return
        self._due = now + LOOK_S  # also when it is another's turn, or what follows fails
        if not self._has_turn():
            return
        if not self._names:
            self._names = self._tier.digests()[::-1]
            if not self._names:
                self._due = now + ROUND_S
                return
        digest = self._names.pop()
        if self._tier.is_damaged(digest):
            logger.error("host tier: %s is not what it was: removed, to be fetched again", digest[:12])
            self._tier.condemn(digest)
        took = self._clock() - now
        self._due = now + (took / CORE_SHARE if self._names else max(took / CORE_SHARE, ROUND_S))

    def _has_turn(self) -> bool:
        """Whether this replica hashes for its node: the first that comes does, for as long as it lives."""
        if self._turn is None:
            self._turn = self._tier.take_scrub_turn()
        return self._turn is not None

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.step()
            except OSError as error:  # somebody removed our folders, or there are too many open files
                logger.warning("host tier: not scrubbed now: %s", error.strerror)
            self._stop.wait(min(max(self._due - self._clock(), 0.01), LOOK_S))
        self._tier.give_scrub_turn(self._turn)
