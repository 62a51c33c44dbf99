"""Which tenant runs next: deficit round robin between tenants, counted in rows.

Shreedhar and Varghese, "Efficient fair queueing using deficit round robin" (SIGCOMM 1995): waiting tenants
form a ring. Each turn adds a quantum to a tenant's account, and the tenant runs what it can pay for. A tenant
that floods waits behind its own requests; others do not wait behind it. Rows that ride along in another
tenant's pass are paid for too: the account goes below zero and is made up later. It never falls further below
than one full pass and a turn: these rows filled room that nobody else wanted, and a tenant that did so for a
minute must not wait as long afterwards.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Final, Generic, Protocol, TypeVar

__all__ = ["QUANTUM_ROWS", "FairQueue", "PriorityQueue", "Queued"]

QUANTUM_ROWS: Final = 16
"""Rows that a tenant runs in one turn while others wait. A tenant waits for at most this many rows of each
tenant before it. On one core 16 rows of ``mnist-cnn`` take 4 ms."""


PASSES_BEFORE_BACKGROUND: Final = 7
"""Passes for waiting callers between two passes for tasks. So tasks make progress under any load, and cost
others an eighth of it at most."""


class Queued(Protocol):
    """Something that waits."""

    @property
    def tenant(self) -> str:
        """Whose account pays."""
        ...

    @property
    def size(self) -> int:
        """Rows."""
        ...

    @property
    def kind(self) -> Hashable:
        """Jobs of one kind can share a pass."""
        ...

    @property
    def same(self) -> Hashable:
        """Jobs with the same value run on the same model: they go into a pass first."""
        ...

    @property
    def background(self) -> bool:
        """Whether it belongs to a task, so that nobody waits for it at this moment."""
        ...


J = TypeVar("J", bound=Queued)


class FairQueue(Generic[J]):
    """A queue of jobs; not safe for several threads without a lock.

    Parameters
    ----------
    max_rows
        Rows of one pass; a single larger job runs alone.
    quantum_rows
        Rows that a turn adds to a tenant's account.
    """

    def __init__(self, max_rows: int, quantum_rows: int = QUANTUM_ROWS) -> None:
        self.max_rows = max_rows
        self._quantum = quantum_rows
        self._waiting: OrderedDict[str, deque[J]] = OrderedDict()
        self._account: dict[str, int] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, job: J) -> None:
        """Wait at the end of the tenant's queue."""
        jobs = self._waiting.get(job.tenant)
        if jobs is None:
            jobs = self._waiting[job.tenant] = deque()
            self._account.setdefault(job.tenant, 0)
        jobs.append(job)
        self._size += 1

    def remove(self, job: J) -> bool:
        """Remove a job that no pass has taken yet; returns whether it was there."""
        jobs = self._waiting.get(job.tenant)
        if jobs is None or job not in jobs:
            return False
        jobs.remove(job)
        self._size -= 1
        self._forget_if_empty(job.tenant)
        return True

    def take(self) -> list[J]:
        """The next pass: one tenant's turn, and what can share the pass with it; empty when nobody waits."""
        if not self._waiting:
            return []
        tenant = self._next_tenant()
        alone = len(self._waiting) == 1
        first = self._waiting[tenant][0]
        room = self.max_rows if alone else min(self.max_rows, max(self._account[tenant], first.size))
        batch = [first]
        self._pay(first)
        size = first.size
        # First the tenant's own jobs, as far as its account goes: those of the same model, then those that
        # share layers with it. Then other tenants' jobs that share layers fill the pass, in ring order.
        own = [job for job in self._waiting.get(tenant, ()) if job.kind == first.kind]
        own.sort(key=lambda job: job.same != first.same)
        others = [
            job
            for other, jobs in self._waiting.items()
            if other != tenant
            for job in jobs
            if job.kind == first.kind
        ]
        for jobs, limit in ((own, room), (others, self.max_rows)):
            for job in jobs:
                if size + job.size <= limit:
                    batch.append(job)
                    self._pay(job)
                    size += job.size
        if tenant in self._waiting:
            self._waiting.move_to_end(tenant)
            if alone:
                self._account[tenant] = 0  # nobody waited for it: nothing to make up
        return batch

    def _next_tenant(self) -> str:
        """Turn the ring until somebody can pay for their first job."""
        while True:
            tenant, jobs = next(iter(self._waiting.items()))
            self._account[tenant] += self._quantum
            if self._account[tenant] >= jobs[0].size:
                return tenant
            self._waiting.move_to_end(tenant)

    def _pay(self, job: J) -> None:
        self._waiting[job.tenant].remove(job)
        left = self._account[job.tenant] - job.size
        self._account[job.tenant] = max(left, -self.max_rows - self._quantum)
        self._size -= 1
        self._forget_if_empty(job.tenant)

    def _forget_if_empty(self, tenant: str) -> None:
        """A tenant with nothing to run saves nothing up, but keeps its debt until nobody waits any more."""
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._account[tenant] = min(self._account[tenant], 0)
            if not self._account[tenant]:
                del self._account[tenant]
        if not self._waiting:
            self._account.clear()


class PriorityQueue(Generic[J]):
    """Two fair queues: jobs that somebody waits for go before those of tasks, which get one pass in several.

    Not safe for several threads without a lock.

    Parameters
    ----------
    max_rows
        Rows of one pass.
    """

    def __init__(self, max_rows: int) -> None:
        self._now: FairQueue[J] = FairQueue(max_rows)
        self._background: FairQueue[J] = FairQueue(max_rows)
        self._since_background = 0

    @property
    def max_rows(self) -> int:
        """Rows of one pass."""
        return self._now.max_rows

    @max_rows.setter
    def max_rows(self, rows: int) -> None:
        self._now.max_rows = self._background.max_rows = rows

    def __len__(self) -> int:
        return len(self._now) + len(self._background)

    def put(self, job: J) -> None:
        """Wait at the end of the tenant's queue."""
        (self._background if job.background else self._now).put(job)

    def remove(self, job: J) -> bool:
        """Remove a job that no pass has taken yet; returns whether it was there."""
        return (self._background if job.background else self._now).remove(job)

    def take(self) -> list[J]:
        """The next pass; empty when nobody waits."""
        if not len(self._background):
            return self._now.take()
        if len(self._now) and self._since_background < PASSES_BEFORE_BACKGROUND:
            self._since_background += 1
            return self._now.take()
        self._since_background = 0
        return self._background.take()
