"""All the steps of a request: allow, count, resolve, decode, lease, admit, predict, release.

There are two paths. :meth:`InferenceService.begin` serves a request that only has to wait for its pass,
without a task; :meth:`InferenceService.predict` serves all others. Both do the same checks in the same order.

This module knows no protocol: HTTP and handles are thin shells around :meth:`InferenceService.predict`. It is
long so that the two paths and their checks can be read side by side.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from flatshare.engine.jobs import Answer, Job
from flatshare.engine.quotas import FREE_BYTES, QuotaKeeper, UnderWay
from flatshare.errors import (
    DeadlineExceeded,
    DeviceBroken,
    IsolationBroken,
    ModelFailed,
    Overloaded,
    OverQuota,
    ProbeFailed,
    Suspended,
    Wedged,
)
from flatshare.models.architecture import Architecture, architecture
from flatshare.replica.deadlines import Deadlines
from flatshare.replica.ticket import Decode, MayPredict, Prediction, Rows, Ticket
from flatshare.replica.usage import UsageCounter
from flatshare.residency.fair_semaphore import FairSemaphore
from flatshare.residency.lease import Lease
from flatshare.residency.model_cache import ModelCache
from flatshare.resolution.resolver import Resolver
from flatshare.telemetry.tracing import NO_TRACE, Trace, current_trace, part
from flatshare_registry.errors import InvalidInput, NotFound, Unavailable
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.records import TenantHead, TenantState, VersionRecord

__all__ = ["InferenceService"]

logger = logging.getLogger("flatshare.replica")

LEASE_SHARE: Final = 0.98
"""Share of a request's remaining time for which it waits for a lease."""


class Runs(Protocol):
    """What the service asks of an inference engine."""

    max_rows: int
    """Rows of one pass."""

    async def run(
        self, lease: Lease, rows: NDArray[np.float32], background: bool = False
    ) -> NDArray[np.float32]:
        """Logits ``(N, classes)`` of rows ``(N, *input.shape)`` under a lease."""
        ...

    def submit(
        self,
        lease: Lease,
        rows: NDArray[np.float32],
        done: Callable[[Answer], None],
        background: bool = False,
    ) -> Job:
        """The same for rows of one pass, without waiting: ``done`` is called with logits or an error."""
        ...

    def withdraw(self, job: Job) -> bool:
        """Remove a job that no pass has taken; returns whether it was removed."""
        ...


Done = Callable[["Prediction | Exception"], None]
"""Called once, on the event loop, with a request's answer."""


class _Begun:
    """A request that waits for its pass and for nothing else; nobody awaits it."""

    __slots__ = ("_began", "_done", "_lease", "_service", "_ticket", "_version", "job")

    def __init__(
        self,
        service: InferenceService,
        ticket: Ticket,
        version: VersionRecord,
        lease: Lease,
        done: Done,
        began: float,
    ) -> None:
        self._began = began
        self._service = service
        self._ticket = ticket
        self._version = version
        self._lease = lease
        self._done: Done | None = done
        self.job: Job | None = None

    def answered(self, answer: Answer) -> None:
        """The pass has ended."""
        service, lease = self._service, self._lease
        self._ticket.trace.passed(self.job)
        service.deadlines.remove(self)
        service.admission.leave()
        tier = lease.tier
        try:
            if isinstance(answer, Exception):
                service.take_failure(lease, answer)
        finally:
            lease.release()
        done, self._done = self._done, None
        if done is None:  # it was told already that it took too long
            return
        if isinstance(answer, Exception):
            if not _is_refusal(answer):
                service.usage.failed(self._version)
            done(answer)
            return
        try:
            service.check_fence(self._ticket.ref)  # it may have come while this was under way
        except NotFound as error:
            done(error)
            return
        done(service.answered(self._ticket, Prediction(answer, self._version, tier), self._began))

    def expired(self) -> None:
        """The request took too long: say so. The lease and the place are kept while its pass runs."""
        done, self._done = self._done, None
        assert done is not None, "what was answered is out of the deadlines"
        assert self.job is not None
        if self._service.inference.withdraw(self.job):
            self._service.admission.leave()
            self._lease.release()
        self._service.usage.failed(self._version)
        done(self._service.too_late())


class InferenceService:
    """Answers requests of one replica.

    Parameters
    ----------
    admission
        Places for requests whose model is resident: the work of a replica.
    cold
        Places for requests that wait for the registry or for a load. They are separate, so that a store that
        is slow or down does not stop requests for resident models (promise 11).
    resolver
        What answers a ref here, and what a tenant is.
    quotas
        What each tenant may use.
    usage
        Counts how requests end.
    timeout_s
        Seconds that a request may take, waiting included.
    """

    def __init__(
        self,
        *,
        resolver: Resolver,
        cache: ModelCache,
        inference: Runs,
        admission: FairSemaphore,
        cold: FairSemaphore,
        quotas: QuotaKeeper,
        usage: UsageCounter,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._fences: dict[TenantId, float] = {}
        self.resolver = resolver
        self.cache = cache
        self.admission = admission
        self.cold = cold
        self.quotas = quotas
        self.usage = usage
        self.inference = inference
        self.deadlines: Deadlines[_Begun] = Deadlines(timeout_s, _Begun.expired)
        self._timeout_s = timeout_s

    async def enter(self, caller: MayPredict, ref: ModelRef, *, within: Ticket | None = None) -> Ticket:
        """Admit a request before any of it is read; returns a context that lasts as long as the request.

        Waits for nothing when the tenant is known.

        Parameters
        ----------
        within
            The ticket of the stream, if the request is a line of one: it counts towards the rate, but not
            again as a request under way.

        Raises
        ------
        NotFound
            There is no such tenant, or it is not the caller's.
        Forbidden, Suspended
            The caller may not do this, or nobody may now.
        OverQuota
            The tenant is over its rate, or has too many requests under way.
        Unavailable
            The tenant is not known here, and the store does not answer.
        """
        trace = current_trace()
        ticket = self.enter_now(caller, ref, within=within, trace=trace)
        if ticket is not None:
            return ticket
        try:
            async with asyncio.timeout(self._timeout_s), self.cold.hold(self._timeout_s, ref.tenant):
                head = await self.resolver.head(ref.tenant)
        except TimeoutError:
            raise Unavailable(f"the registry did not answer within {self._timeout_s:g} s") from None
        return self._ticket(caller, ref, head, within, trace)

    def enter_now(
        self, caller: MayPredict, ref: ModelRef, *, within: Ticket | None = None, trace: Trace = NO_TRACE
    ) -> Ticket | None:
        """As :meth:`enter`, for a known tenant; for an unknown one, counts nothing and returns None."""
        caller.may_predict(ref)
        self.check_fence(ref)
        head = self.resolver.head_now(ref.tenant)
        return None if head is None else self._ticket(caller, ref, head, within, trace)

    def _ticket(
        self, caller: MayPredict, ref: ModelRef, head: TenantHead, within: Ticket | None, trace: Trace
    ) -> Ticket:
        if head.state is TenantState.SUSPENDED:
            raise Suspended(f"tenant {ref.tenant} is suspended; ask your operator")
        under_way = self.quotas.request(head, counted=within is None)
        return Ticket(ref, head, self.quotas.limits(head), under_way, caller.background, trace)

    def another_place(self, ticket: Ticket) -> UnderWay | None:
        """A place for one more concurrent line of a stream; None when its tenant is at its limit."""
        return self.quotas.place(ticket.head)

    def begin(self, ticket: Ticket, decode: Callable[[Architecture], Rows], done: Done) -> bool:
        """Answer a request that only has to wait for its pass: without a task, and with one call at the end.

        Parameters
        ----------
        done
            Called once, later, with the prediction or with what :meth:`predict` would have raised.

        Returns
        -------
        bool
            False if it has to wait for something else: nothing has begun, ``done`` is not called, and the
            caller uses :meth:`predict`.

        Raises
        ------
        Exception
            What :meth:`predict` raises before a pass; ``done`` is not called.
        """
        ref = ticket.ref
        began = self._clock()
        version = self.resolver.serving_now(ref)
        if version is None or not self.admission.has_room:
            return False
        resolved_ns = ticket.trace.now()
        rows = decode(_installed(version))
        ticket.check_rows(len(rows))
        if len(rows) > self.inference.max_rows:
            return False
        if rows.nbytes > FREE_BYTES:
            ticket.under_way.hold_more(rows.nbytes)
        self.check_fence(ref)
        lease = self.cache.try_lease(version)
        if lease is None:
            return False
        ticket.trace.lap("resolve", resolved_ns)
        ticket.trace.lap("decode")
        begun = _Begun(self, ticket, version, lease, done, began)
        try:
            self._check_weights(lease, version)
            begun.job = self.inference.submit(lease, rows, begun.answered, ticket.background)
        except Exception as error:
            self.take_failure(lease, error)
            lease.release()
            if not _is_refusal(error):
                self.usage.failed(version)
            raise
        self.admission.enter_now()
        self.deadlines.add(begun)
        return True

    async def predict(self, ticket: Ticket, decode: Decode) -> Prediction:
        """Answer one request.

        Raises
        ------
        BadInput
            The request is wrong; nothing was loaded.
        OverQuota
            The tenant loads too many models, or keeps too many on the device.
        NotFound
            No such tenant, alias or version.
        Overloaded, DeadlineExceeded
            No room, or not in time; retry.
        Corrupt, ModelFailed, Unavailable
            The version can't be served now.
        IsolationBroken
            The slot does not hold what the ref resolved to.
        """
        ref = ticket.ref
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        began = self._clock()
        leasing: VersionRecord | None = None
        try:
            async with asyncio.timeout_at(deadline):
                version = await self._resolve(ref)
                ticket.trace.lap("resolve")
                decoded = decode(_installed(version))
                rows = decoded if isinstance(decoded, np.ndarray) else await decoded
                ticket.check_rows(len(rows))
                if rows.nbytes > FREE_BYTES:
                    ticket.under_way.hold_more(rows.nbytes)
                self.check_fence(ref)  # what the registry said may be older than the fence
                ticket.trace.lap("decode")
                lease, leasing = self.cache.try_lease(version), version
                if lease is None:
                    if not self.cache.is_loading(version):  # to join a load costs nothing
                        self.quotas.cold_load(ticket.head)
                    with part("wait"):
                        async with self.cold.hold(self._timeout_s, ref.tenant):
                            # A little less than what is left, so that the cache says why there is no lease.
                            lease = await self.cache.lease(version, (deadline - loop.time()) * LEASE_SHARE)
                    ticket.trace.skip()
                with lease:
                    try:
                        self._check_weights(lease, version)
                        async with self.admission.hold(self._timeout_s, ref.tenant):
                            logits = await self.inference.run(lease, rows, ticket.background)
                    except Exception as error:
                        self.take_failure(lease, error)
                        raise
                self.check_fence(ref)  # it may have come while this was under way
                return self.answered(ticket, Prediction(logits, version, lease.tier), began)
        except TimeoutError:
            if leasing is not None:
                self.usage.failed(leasing)
            raise self.too_late() from None
        except Exception as error:
            if leasing is not None and not _is_refusal(error):
                self.usage.failed(leasing)
            raise

    def answered(self, ticket: Ticket, prediction: Prediction, began: float) -> Prediction:
        """Count an answer.

        Parameters
        ----------
        began
            When the request's body had arrived, by the clock.
        """
        self.usage.answered(
            prediction.version,
            prediction.tier,
            self._clock() - began,
            prediction.label_list(),
            ticket.under_way.body_bytes,
            prediction.logits.shape[1],
        )
        return prediction

    def too_late(self) -> DeadlineExceeded:
        """The error for a request that was not answered in time."""
        return DeadlineExceeded(f"not answered within {self._timeout_s:g} s")

    def take_failure(self, lease: Lease, error: Exception) -> None:
        """Handle a failed pass: its slot may no longer hold what it did. Called before the release."""
        if isinstance(error, ProbeFailed):
            self.cache.condemn(lease, error)
        elif isinstance(error, Wedged) and not error.before_pass:
            # The thread still uses its memory: nobody may have the slot, and its bytes count.
            self.cache.quarantine(lease)
        elif isinstance(error, IsolationBroken):
            logger.error("isolation: %s", lease.tag, exc_info=error)
            self.cache.quarantine(lease)

    def _check_weights(self, lease: Lease, version: VersionRecord) -> None:
        if lease.record.digest != version.digest:
            raise IsolationBroken(f"the slot of {version.name} holds other weights")

    def fence(self, tenant: TenantId, seconds: float) -> None:
        """Refuse a tenant that is being erased, for this many seconds, whatever the registry's view says."""
        self._fences[tenant] = self._clock() + seconds

    def check_fence(self, ref: ModelRef) -> None:
        """Return if a tenant may be served: its models may be leased, and loaded.

        Raises
        ------
        NotFound
            It is being erased.
        """
        if self._fences:
            until = self._fences.get(ref.tenant)
            if until is not None:
                if self._clock() < until:
                    raise NotFound(f"there is no tenant {ref.tenant}")
                del self._fences[ref.tenant]

    async def describe(self, ticket: Ticket) -> VersionRecord:
        """The version that a ref means now; loads nothing. Raises as :meth:`predict` does."""
        return await self._resolve(ticket.ref)

    async def _resolve(self, ref: ModelRef) -> VersionRecord:
        version = self.resolver.serving_now(ref)
        if version is not None:
            return version
        async with self.cold.hold(self._timeout_s, ref.tenant):
            return await self.resolver.serving(ref, self._timeout_s)


def _is_refusal(error: Exception) -> bool:
    """Whether a request was refused: its caller is over a limit or gone, or there is no room."""
    if isinstance(error, (Wedged, DeviceBroken)):
        return False
    return isinstance(error, (OverQuota, NotFound, Overloaded))


def _installed(version: VersionRecord) -> Architecture:
    """A version's architecture.

    Raises
    ------
    ModelFailed
        It is not installed here: the operator must fix that, not the caller.
    """
    try:
        return architecture(version.architecture)
    except InvalidInput as error:
        raise ModelFailed(
            f"{version.name} can't be served: its architecture is not installed here"
        ) from error
