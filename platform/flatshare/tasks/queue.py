"""The embedded queue: tasks that wait, in one SQLite file of this machine, with leases.

A task that is claimed is leased; who claims it renews the lease while it runs. A process that is killed
renews nothing, and its tasks are claimed again when their leases end. Of the tenants that have something to
run, the one with the fewest tasks under way is next. The file can be lost: the store knows which tasks are
open.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flatshare.placement.consumers import Backlog
from flatshare.tasks.records import TaskId
from flatshare_registry.errors import Unavailable

__all__ = ["LEASE_S", "Claim", "QueueLength", "SqliteQueue"]

LEASE_S: Final = 10.0
"""Seconds for which a claim holds; renewed three times in it."""

BUSY_S: Final = 5.0
"""Seconds that a writer waits for another one."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS waiting (
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL,
  since REAL NOT NULL, not_before REAL NOT NULL, leased_until REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_tenant ON waiting (tenant, leased_until, not_before);
"""

_CLAIM: Final = """
UPDATE waiting SET leased_until = :until WHERE id = (
  SELECT id FROM waiting AS one
  WHERE not_before <= :now AND leased_until <= :now
  ORDER BY (
    SELECT count(*) FROM waiting AS other WHERE other.tenant = one.tenant AND other.leased_until > :now
  ), since
  LIMIT 1
) RETURNING id
"""

_BACKLOG: Final = """
SELECT
  sum(not_before <= :now AND leased_until <= :now),
  min(CASE WHEN not_before <= :now AND leased_until <= :now THEN max(since, not_before) END),
  sum(leased_until > :now)
FROM waiting
"""


@dataclass(frozen=True, slots=True)
class QueueLength:
    """How much waits.

    Attributes
    ----------
    tasks, of_tenant
        Waiting or under way, in all and of one tenant.
    oldest_s
        Seconds that the oldest one has been there.
    """

    tasks: int
    of_tenant: int
    oldest_s: float


@dataclass(slots=True)
class Claim:
    """A task that is leased.

    Attributes
    ----------
    until
        The end of the lease, which identifies the lease: a later claim of the task has another end.
    """

    task: TaskId
    until: float


class SqliteQueue:
    """One queue. Methods block for milliseconds, and may be called from any thread and process.

    Parameters
    ----------
    path
        The file; made when it is missing, for this user alone.
    clock
        POSIX seconds: processes compare them.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._local = threading.local()

    def put(self, task: TaskId, delay_s: float = 0.0) -> None:
        """Have a task run, not before ``delay_s`` seconds; a task that is there already waits as it did."""
        now = self._clock()
        with self._connected() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO waiting VALUES (?, ?, ?, ?, 0)",
                (str(task), task.tenant, now, now + delay_s),
            )

    def claim(self) -> Claim | None:
        """The task that is next, leased for :data:`LEASE_S`; None when none is due."""
        now = self._clock()
        with self._connected() as connection:
            row = connection.execute(_CLAIM, {"now": now, "until": now + LEASE_S}).fetchone()
        return None if row is None else Claim(TaskId.parse(row[0]), now + LEASE_S)

    def renew(self, claim: Claim) -> None:
        """Go on holding a task, unless somebody else does by now."""
        until = self._clock() + LEASE_S
        if self._change(
            "UPDATE waiting SET leased_until = ? WHERE id = ? AND leased_until = ?", claim, until
        ):
            claim.until = until

    def back(self, claim: Claim, delay_s: float) -> None:
        """Give a task back, to be claimed again after so many seconds."""
        query = "UPDATE waiting SET leased_until = 0, not_before = ? WHERE id = ? AND leased_until = ?"
        self._change(query, claim, self._clock() + delay_s)

    def done(self, claim: Claim) -> None:
        """Forget a task, unless somebody else holds it by now."""
        self._change("DELETE FROM waiting WHERE id = ? AND leased_until = ?", claim)

    def _change(self, query: str, claim: Claim, *values: float) -> bool:
        with self._connected() as connection:
            return connection.execute(query, (*values, str(claim.task), claim.until)).rowcount > 0

    def length(self, tenant: str = "") -> QueueLength:
        """How much waits."""
        with self._connected() as connection:
            count, since = connection.execute("SELECT count(*), min(since) FROM waiting").fetchone()
            (own,) = connection.execute("SELECT count(*) FROM waiting WHERE tenant = ?", (tenant,)).fetchone()
        return QueueLength(count, own, self._clock() - since if since is not None else 0.0)

    def backlog(self) -> Backlog:
        """What could be run now, and what is being run."""
        now = self._clock()
        with self._connected() as connection:
            due, since, under_way = connection.execute(_BACKLOG, {"now": now}).fetchone()
        return Backlog(due or 0, under_way or 0, now - since if since is not None else 0.0)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, to the file that is there now; the block is one transaction."""
        try:
            connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
            if connection is None or self._local.file != self._file():
                connection = self._opened()
            with connection:
                yield connection
        except (sqlite3.Error, OSError) as error:
            self._local.connection = None
            raise Unavailable(f"the queue of tasks does not work: {error}") from error

    def _opened(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch(mode=0o600)
        self._local.file = self._file()
        connection = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level="IMMEDIATE")
        connection.execute("PRAGMA journal_mode=WAL")
        # A power cut may lose the last commits; the store still knows those tasks.
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(_SCHEMA)
        self._local.connection = connection
        return connection

    def _file(self) -> tuple[int, int] | None:
        """Which file is there now: a removed file lives on in processes that have it open."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino
