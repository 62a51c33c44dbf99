"""Keeps HAProxy in step with Serve: watches targets, reloads on change, restarts it if it dies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from flatshare.edge.configuration import EdgeOptions, render
from flatshare.edge.process import HaproxyProcess
from flatshare.errors import LocalError
from flatshare.pool.details import Target
from flatshare_registry.errors import Unavailable

__all__ = ["EdgeSupervisor", "EdgeTargets"]

logger = logging.getLogger("flatshare.edge")

LOOK_EVERY_S: Final = 1.0
"""Seconds between looks at Serve's targets. HAProxy's own checks notice a death sooner; this is
about replicas that came."""


@dataclass(frozen=True, slots=True)
class EdgeTargets:
    """Where both applications listen."""

    pool: tuple[Target, ...]
    control: tuple[Target, ...]


class EdgeSupervisor:
    """Runs the edge of one machine.

    Parameters
    ----------
    read_targets
        Says where the applications listen now; raises ``Unavailable`` when nobody knows, and then
        the edge goes on with what it has.
    """

    def __init__(
        self, process: HaproxyProcess, options: EdgeOptions, read_targets: Callable[[], EdgeTargets]
    ) -> None:
        self._process = process
        self._options = options
        self._read_targets = read_targets
        self._current = EdgeTargets((), ())

    def start(self) -> None:
        """Start HAProxy with today's targets.

        Raises
        ------
        LocalError
            It does not start.
        Unavailable
            Serve does not answer.
        """
        self._current = self._read_targets()
        self._process.start(self._render())

    def run(self, stop: threading.Event) -> None:
        """Watch until told to stop; call from the thread that called :meth:`start`.

        A new set of targets that HAProxy refuses is logged and tried again at the next look.
        """
        while not stop.wait(LOOK_EVERY_S):
            self.look()

    def look(self) -> bool:
        """One look: reload if targets changed, restart if it died; whether anything was done."""
        try:
            found = self._read_targets()
        except Unavailable as error:
            logger.warning("keeping the edge as it is: %s", error)
            found = self._current
        try:
            if self._process.pid is None:
                logger.error("haproxy is gone; starting it again")
                self._current = found
                self._process.start(self._render())
                return True
            if found == self._current:
                return False
            before, self._current = self._current, found
            try:
                self._process.reload(self._render())
            except LocalError:
                self._current = before
                raise
            logger.info("edge now has %d replicas", len(found.pool))
        except (LocalError, OSError) as error:
            logger.error("edge: %s", error)
            return False
        return True

    def stop(self) -> None:
        """End HAProxy."""
        self._process.stop()

    def _render(self) -> str:
        return render(self._options, self._current.pool, self._current.control)
