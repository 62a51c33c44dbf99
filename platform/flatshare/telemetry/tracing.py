"""Spans of sampled requests: one connected trace from the edge to the store's calls.

The ``traceparent`` header of a request (W3C Trace Context) says whether it is sampled, and the edge writes
that header. Nothing begins a trace here: a request that is not sampled costs a look at its headers, and other
work a look at a context variable.

Spans use OpenTelemetry's API alone. Unless its SDK is installed and was set up
(``telemetry/exporting.py``), nothing is recorded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final, Protocol

from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

__all__ = [
    "NO_TRACE", "TRACEPARENT", "RequestTrace", "Trace", "current_trace", "joined", "line_trace", "part",
    "record", "request_trace", "sent_on", "watch_s3",
]  # fmt: skip

TRACEPARENT: Final = "traceparent"

Attributes = Mapping[str, str | int | float | bool]

_TRACER: Final = trace.get_tracer("flatshare")
_FORMAT: Final = TraceContextTextMapPropagator()
_ODD: Final = frozenset("13579bdf")
"""Last digits of flags that have the sampled bit."""


class HasBegun(Protocol):
    """Rows of a request in a pass.

    Attributes
    ----------
    began
        When the pass began, by the monotonic clock; 0 before.
    """

    began: float


class Trace:
    """What a request that is not sampled has: it does nothing."""

    __slots__ = ()

    def now(self) -> int:
        """Nanoseconds since 1970, for :meth:`lap`."""
        return 0

    def lap(self, name: str, until_ns: int | None = None) -> None:
        """Record a part of the request: from the end of the last one until now, or a time before."""

    def skip(self) -> None:
        """Have the next part begin now."""

    def passed(self, job: HasBegun | None) -> None:
        """Record its wait for a pass, and the pass, which has ended."""


NO_TRACE: Final = Trace()

_CURRENT: ContextVar[Trace] = ContextVar("flatshare_trace", default=NO_TRACE)


class RequestTrace(Trace):
    """The span of a sampled request, and its parts. Used on one event loop."""

    __slots__ = ("_context", "_since_ns", "_span")

    def __init__(self, span: Span) -> None:
        self._span = span
        self._context = trace.set_span_in_context(span)
        self._since_ns = time.time_ns()

    def now(self) -> int:
        """See :meth:`Trace.now`."""
        return time.time_ns()

    def lap(self, name: str, until_ns: int | None = None) -> None:
        """See :meth:`Trace.lap`."""
        ended_ns = time.time_ns() if until_ns is None else until_ns
        if ended_ns > self._since_ns:  # of passes side by side one may have begun before another ended
            _TRACER.start_span(name, self._context, start_time=self._since_ns).end(ended_ns)
            self._since_ns = ended_ns

    def skip(self) -> None:
        """See :meth:`Trace.skip`."""
        self._since_ns = time.time_ns()

    def passed(self, job: HasBegun | None) -> None:
        """See :meth:`Trace.passed`."""
        if job is not None and job.began:
            self.lap("wait", time.time_ns() - int((time.monotonic() - job.began) * 1e9))
            self.lap("pass")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within, this is the current request, and what is recorded is part of it."""
        token, own = otel.attach(self._context), _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(own)
            otel.detach(token)

    def end(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """The request was answered: the span has its status, and what the answer's own headers say."""
        span = self._span
        for name, value in headers:
            if name.startswith(b"x-flatshare-"):
                span.set_attribute("flatshare." + name[12:].decode("latin-1"), value.decode("latin-1"))
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()


def request_trace(headers: Mapping[str, str], name: str, attributes: Attributes) -> RequestTrace | None:
    """The trace of a request that is sampled, by its headers (names in lower case); None for all others."""
    sent = headers.get(TRACEPARENT)
    if sent is None or sent[-1:] not in _ODD:
        return None
    span = _TRACER.start_span(name, _FORMAT.extract(headers), SpanKind.SERVER, attributes)
    return RequestTrace(span) if span.is_recording() else None


def current_trace() -> Trace:
    """The trace of the request that the current work is for."""
    return _CURRENT.get()


@contextlib.contextmanager
def _span(name: str, attributes: Attributes | None, kind: SpanKind = SpanKind.INTERNAL) -> Iterator[Span]:
    """A span below the current one; inside the block it is the current one.

    For an error that leaves the block the span has only its class: its message may contain anything.
    """
    with _TRACER.start_as_current_span(
        name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield span
        except Exception as error:
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise


@contextlib.contextmanager
def part(name: str, attributes: Attributes | None = None) -> Iterator[Span]:
    """A part of whatever is being recorded in this task or thread; if nothing is, it records nothing."""
    if not trace.get_current_span().is_recording():
        yield trace.INVALID_SPAN
        return
    with _span(name, attributes) as span:
        yield span


@contextlib.contextmanager
def line_trace(name: str, attributes: Attributes | None = None) -> Iterator[None]:
    """A part that is a request of its own: one of several, side by side, within a sampled request."""
    with part(name, attributes) as span:
        if not span.is_recording():
            yield
            return
        with RequestTrace(span).entered():
            yield


def record(name: str, began_s: float, ended_s: float, attributes: Attributes | None = None) -> None:
    """A part that has ended: between two times of the monotonic clock."""
    if trace.get_current_span().is_recording():
        now_ns, now_s = time.time_ns(), time.monotonic()
        began_ns, ended_ns = (now_ns - int((now_s - at) * 1e9) for at in (began_s, ended_s))
        _TRACER.start_span(name, attributes=attributes, start_time=began_ns).end(ended_ns)


@contextlib.contextmanager
def joined(
    traceparent: str, name: str, kind: SpanKind = SpanKind.SERVER, attributes: Attributes | None = None
) -> Iterator[None]:
    """Work for a request of another process: a part of its trace, if that is recorded.

    Parameters
    ----------
    traceparent
        What :func:`sent_on` gave there; empty for none.
    """
    if traceparent[-1:] not in _ODD:
        yield
        return
    context = _FORMAT.extract({TRACEPARENT: traceparent})
    token = otel.attach(context)
    try:
        with (
            _span(name, attributes, kind) as span,
            RequestTrace(span).entered() if span.is_recording() else contextlib.nullcontext(),
        ):
            yield
    finally:
        otel.detach(token)


def sent_on() -> str:
    """The ``traceparent`` for a call to another process; empty while nothing is recorded."""
    if not trace.get_current_span().is_recording():
        return ""
    carrier: dict[str, str] = {}
    _FORMAT.inject(carrier)
    return carrier.get(TRACEPARENT, "")


def watch_s3(events: Any) -> None:
    """Make each call of a boto3 client (``client.meta.events``) a part of what is recorded around it.

    The header is added after the request was signed, so that a proxy may change it as it likes. (The
    instrumentation of OpenTelemetry's contrib packages signs it, and patches all clients of a process.)
    """

    def before(model: Any, context: dict[str, Any], **_: Any) -> None:
        if trace.get_current_span().is_recording():
            span = _TRACER.start_span(f"store {model.name}", kind=SpanKind.CLIENT)
            context["flatshare"] = span, otel.attach(trace.set_span_in_context(span))

    def after(context: dict[str, Any], **ended: Any) -> None:
        if "flatshare" not in context:
            return
        span, token = context.pop("flatshare")
        otel.detach(token)
        reply = ended.get("http_response")
        if reply is not None:
            span.set_attribute("http.response.status_code", reply.status_code)
        else:
            span.set_status(Status(StatusCode.ERROR, type(ended.get("exception")).__name__))
        span.end()

    def sending(request: Any, **_: Any) -> None:
        if sent := sent_on():
            request.headers[TRACEPARENT] = sent

    events.register("before-call.s3", before)
    events.register("before-send.s3", sending)
    events.register("after-call.s3", after)
    events.register("after-call-error.s3", after)
