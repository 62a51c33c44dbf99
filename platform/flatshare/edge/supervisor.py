"""Keeps HAProxy in step with the fleet: servers and copies change while it runs; restarts it if it dies.

Each look compares what HAProxy has with what it should have, and tells it the difference. A reload is the
last resort: it costs streams their stick tables and, in the end, their connections.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from flatshare.edge.configuration import render
from flatshare.edge.copies import Copies, rows
from flatshare.edge.options import EdgeOptions
from flatshare.edge.servers import CONTROL_CHECKS, POOL_CHECKS, RunningServer, Server, commands, same
from flatshare.errors import LocalError
from flatshare_registry.errors import Unavailable

__all__ = ["EdgeProcess", "EdgeSupervisor", "EdgeTargets"]

logger = logging.getLogger("flatshare.edge")

LOOK_EVERY_S: Final = 0.5
"""Seconds between looks at the fleet. HAProxy's own checks notice a death sooner; this is about replicas
that came, and about copies."""

EMPTY_LOOK_EVERY_S: Final = 0.1
"""The same while the pool has no replica and a request may be waiting for one; also how often HAProxy is
checked to be alive."""

PATIENCE: Final = 5
"""Looks in a row that find HAProxy without what it was told; beyond that it is reloaded."""


@dataclass(frozen=True, slots=True)
class EdgeTargets:
    """Where both applications listen, and which models have copies."""

    pool: tuple[Server, ...]
    control: tuple[Server, ...]
    copies: Copies = field(default_factory=dict)


class EdgeProcess(Protocol):
    """What the supervisor asks of :class:`~flatshare.edge.process.HaproxyProcess`."""

    @property
    def pid(self) -> int | None:
        """None when it does not run."""
        ...

    def write(self, configuration: str, copies: Mapping[str, str] | None = None) -> None:
        """Put the files of its next start in place."""
        ...

    def start(self, configuration: str, copies: Mapping[str, str] | None = None) -> None:
        """Start it."""
        ...

    def reload(self) -> None:
        """Have it read its files."""
        ...

    def stop(self) -> None:
        """End it."""
        ...

    def servers(self, backend: str) -> list[RunningServer]:
        """The servers that a backend has now."""
        ...

    def copies(self) -> dict[str, str]:
        """The map of copies that it has now."""
        ...

    def replace_copies(self, wanted: Mapping[str, str]) -> None:
        """Replace its map of copies."""
        ...

    def command(self, text: str) -> str:
        """Send it one command; returns its answer."""
        ...

    def waiting(self) -> int:
        """Requests that wait for a replica."""
        ...


class EdgeSupervisor:
    """Runs the edge of one machine.

    Parameters
    ----------
    read_targets
        Says where the applications listen now; raises ``Unavailable`` when nobody knows, and then
        the edge goes on with what it has.
    wake
        Called with the number of requests that wait while the pool has no replica.

    Attributes
    ----------
    reloads
        How often HAProxy was reloaded since the start.
    """

    def __init__(
        self,
        process: EdgeProcess,
        options: EdgeOptions,
        read_targets: Callable[[], EdgeTargets],
        wake: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._process = process
        self._options = options
        self._read_targets = read_targets
        self._wake = wake
        self._current = EdgeTargets((), ())
        self._astray = 0
        self.reloads = 0

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
        self._process.start(self._configuration(), rows(self._current.copies))

    def run(self, stop: threading.Event) -> None:
        """Watch until told to stop; call from the thread that called :meth:`start`.

        What HAProxy refuses is logged and tried again at the next look.
        """
        looked = time.monotonic()
        while not stop.wait(EMPTY_LOOK_EVERY_S):
            due = time.monotonic() - looked >= LOOK_EVERY_S
            if due or not self._current.pool or self._process.pid is None:
                self.look()
                looked = time.monotonic()

    def look(self) -> bool:
        """One look: tell HAProxy what changed, restart it if it died; whether anything was done."""
        if self._process.pid is None and self._restarted():
            return True  # first of all: the question to the fleet may take seconds
        try:
            self._current = self._read_targets()
        except Unavailable as error:
            logger.warning("keeping the edge as it is: %s", error)
        try:
            if self._process.pid is None:
                return self._restarted()
            self._process.write(self._configuration(), rows(self._current.copies))
            if not self._current.pool and (waiting := self._process.waiting()):
                self._wake(waiting)
            return self._adjust()
        except (LocalError, OSError) as error:
            logger.error("edge: %s", error)
            return False

    def _restarted(self) -> bool:
        """Start HAProxy anew with what is known; whether it runs."""
        logger.error("haproxy is gone; starting it again")
        try:
            self._process.start(self._configuration(), rows(self._current.copies))
        except (LocalError, OSError) as error:
            logger.error("edge: %s", error)
            return False
        return True

    def stop(self) -> None:
        """End HAProxy."""
        self._process.stop()

    def _adjust(self) -> bool:
        """Bring what runs to what should run, by the admin socket; whether there was anything to do."""
        done = astray = False
        for backend, wanted, checks in (
            ("pool", self._current.pool, POOL_CHECKS),
            ("control", self._current.control, CONTROL_CHECKS),
        ):
            running = self._process.servers(backend)
            for text in commands(backend, running, wanted, checks):
                answer = self._process.command(text)
                logger.info("edge: %s: %s", text, answer or "done")
            if not same(running, wanted):
                done = True
                astray = astray or not same(self._process.servers(backend), wanted)
        wanted_rows = rows(self._current.copies)
        if self._process.copies() != wanted_rows:
            self._process.replace_copies(wanted_rows)
            logger.info("edge: %d models have copies", len(self._current.copies))
            done = True
        self._astray = self._astray + 1 if astray else 0
        if self._astray > PATIENCE:
            logger.warning("haproxy does not have what it was told; reloading it")
            self._process.reload()
            self.reloads += 1
            self._astray = 0
        return done

    def _configuration(self) -> str:
        return render(self._options, self._current.pool, self._current.control)
