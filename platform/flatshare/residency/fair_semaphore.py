"""A semaphore that is fair between tenants: some requests go in, some more wait, all others are refused."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from types import TracebackType
from typing import Final

from flatshare.errors import DeadlineExceeded, Overloaded, WouldBeLate

__all__ = ["FairSemaphore"]


LEAST_GAPS: Final = 8
MOST_GAPS: Final = 32
"""Intervals between freed places that are needed, and kept, to know the present rate."""


class FairSemaphore:
    """Gives ``max_ongoing`` permits; ``max_queued`` more wait for one; others are refused at once.

    Fair between tenants: permits that come free go round the waiting tenants. When all waiting places are
    taken, the tenant that has most of them loses one to a tenant that has fewer ("longest queue drop", Suter
    et al., INFOCOM 1998). A tenant that floods only fills places that nobody else wants.

    No request waits in vain: while requests wait, the rate at which places come free is known. One whose turn
    would come after its time is refused at once, and told when to come again.

    Must be used on one event loop. :meth:`enter` then :meth:`leave`, or ``async with semaphore.hold(s)``.

    Parameters
    ----------
    max_queued
        None for no limit, if something else bounds the waits.
    """

    def __init__(
        self,
        max_ongoing: int,
        max_queued: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._freed_at: deque[float] = deque(maxlen=MOST_GAPS + 1)
        self.max_ongoing = max_ongoing
        self.max_queued = max_queued
        self.ongoing = 0
        self.refused = 0
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self.queued = 0

    def hold(self, timeout_s: float | None, tenant: str = "") -> _Hold:
        """An async context that is inside while the request is let in."""
        return _Hold(self, timeout_s, tenant)

    @property
    def has_room(self) -> bool:
        """Whether a request would be let in without waiting."""
        return self.ongoing < self.max_ongoing

    def enter_now(self) -> bool:
        """Enter if that needs no waiting; returns whether this request is in, and must :meth:`leave`."""
        if self.ongoing >= self.max_ongoing:
            return False
        self.ongoing += 1
        return True

    def wait_s(self, tenant: str = "") -> float:
        """Seconds until a tenant's next request would be let in at the present rate; 0 while it is unknown.

        Places that came free lately, while others waited, tell the rate; tenants take turns.
        """
        if self.has_room or len(self._freed_at) <= LEAST_GAPS:
            return 0.0
        own = len(self._waiting.get(tenant, ()))
        turns = 1 + own + sum(
            min(len(waiters), own + 1) for name, waiters in self._waiting.items() if name != tenant
        )  # fmt: skip
        return turns * (self._freed_at[-1] - self._freed_at[0]) / (len(self._freed_at) - 1)

    def check_in_time(self, timeout_s: float, tenant: str = "") -> None:
        """Return if a tenant's next request would be let in within its time.

        Raises
        ------
        WouldBeLate
            It would not.
        """
        wait_s, has_s = self.wait_s(tenant), max(timeout_s, 0.0)
        if wait_s > has_s:
            self.refused += 1
            error = WouldBeLate(
                f"its turn would come in about {wait_s:.0f} s, and it has {has_s:.0f} s; retry later"
            )
            error.retry_after_s = max(math.ceil(wait_s - has_s), 1)
            raise error

    async def enter(self, timeout_s: float | None, tenant: str = "") -> None:
        """Wait to be let in.

        Parameters
        ----------
        timeout_s
            Seconds to wait at most; None: as long as it takes.

        Raises
        ------
        Overloaded
            ``max_queued`` requests already wait, and this tenant has its share of them. Raised at once,
            or while it waits, when a tenant with fewer comes.
        WouldBeLate
            At the present rate it would not be let in within ``timeout_s``. Raised at once.
        DeadlineExceeded
            Not let in within ``timeout_s``.
        """
        if self.enter_now():
            return
        if timeout_s is not None:
            self.check_in_time(timeout_s, tenant)
        if (
            self.max_queued is not None
            and self.queued >= self.max_queued
            and not self._give_up_one_for(tenant)
        ):
            self.refused += 1
            raise self._refusal()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(waiter)
        self.queued += 1
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                if waiter.exception() is None:
                    self.leave()  # let in at the moment of leaving: pass the place on
            else:
                waiter.cancel()
                self._forget(tenant, waiter)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(f"waited {timeout_s:g} s for a free place") from None
            raise

    def leave(self) -> None:
        """Give the place to the next tenant's request that has waited longest."""
        if self._waiting:
            self._freed_at.append(self._clock())
        else:
            self._freed_at.clear()  # a time when nobody waits says nothing about how long a wait is
        while self._waiting:
            tenant, waiters = next(iter(self._waiting.items()))
            self._waiting.move_to_end(tenant)
            waiter = waiters[0]
            self._forget(tenant, waiter)
            if not waiter.done():
                waiter.set_result(None)
                return
        self.ongoing -= 1

    def _give_up_one_for(self, tenant: str) -> bool:
        """Refuse the newest request of the tenant that has most waiting, if this one has clearly fewer."""
        if not self._waiting:
            return False
        most = max(self._waiting, key=lambda one: len(self._waiting[one]))
        if len(self._waiting[most]) <= len(self._waiting.get(tenant, ())) + 1:
            return False
        waiter = self._waiting[most][-1]
        self._forget(most, waiter)
        if not waiter.done():
            self.refused += 1
            waiter.set_exception(self._refusal())
        return True

    def _forget(self, tenant: str, waiter: asyncio.Future[None]) -> None:
        waiters = self._waiting.get(tenant)
        if waiters is None or waiter not in waiters:
            return
        waiters.remove(waiter)
        self.queued -= 1
        if not waiters:
            del self._waiting[tenant]

    def _refusal(self) -> Overloaded:
        return Overloaded(
            f"this replica works on {self.max_ongoing} requests and {self.max_queued} more wait; retry"
        )


class _Hold:
    """``async with``: enter and leave."""

    __slots__ = ("_semaphore", "_tenant", "_timeout_s")

    def __init__(self, semaphore: FairSemaphore, timeout_s: float | None, tenant: str) -> None:
        self._semaphore = semaphore
        self._timeout_s = timeout_s
        self._tenant = tenant

    async def __aenter__(self) -> None:
        await self._semaphore.enter(self._timeout_s, self._tenant)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._semaphore.leave()
