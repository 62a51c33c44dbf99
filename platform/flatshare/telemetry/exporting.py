"""Where spans go: to a collector, by OTLP over HTTP. Needs OpenTelemetry's SDK: ``flatshare[traces]``.

A process exports in a thread of its own, and drops spans rather than wait: a collector that is slow or gone
costs no request anything. The exporter's own variables hold (``OTEL_EXPORTER_OTLP_HEADERS`` and so on).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from flatshare.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

__all__ = ["EndedSpan", "SpanWriter", "check_endpoint", "export_spans", "need_sdk"]

logger = logging.getLogger("flatshare.telemetry")

_ENDPOINT: Final = re.compile(r"https?://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?(/[\w./-]*)?")

EXPORT_EVERY_MS: Final = 1000
"""Milliseconds that spans wait for others; a killed process loses the spans of that time."""


def check_endpoint(endpoint: str) -> None:
    """Return if this is a collector's address.

    Raises
    ------
    ValueError
        It is not ``http(s)://host:port``, perhaps with a path.
    """
    if _ENDPOINT.fullmatch(endpoint) is None:
        raise ValueError(f"traces: {endpoint!a} is neither off nor http://host:4318, a collector's address")


def need_sdk() -> None:
    """Return if spans can be exported from this installation.

    Raises
    ------
    SettingsError
        The extra is missing.
    """
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError:
        raise SettingsError(
            "traces: OpenTelemetry's SDK is missing: pip install 'flatshare[traces]'"
        ) from None


def export_spans(endpoint: str, process: str, instance: str) -> None:
    """Export this process's spans from now on; ``off``: none are recorded.

    Only requests that the edge sampled have spans: nothing begins a trace here. Where Ray Serve traces this
    process too, its spans and ours go to both destinations.

    Parameters
    ----------
    endpoint
        ``off`` or a collector's address.
    process, instance
        ``service.name``, and which one of these.
    """
    if endpoint == "off":
        return
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

    there = trace.get_tracer_provider()
    if isinstance(there, TracerProvider):  # Ray's
        there.add_span_processor(_processor(endpoint))
        return
    provider = TracerProvider(ParentBased(ALWAYS_OFF), _resource(process, instance))
    provider.add_span_processor(_processor(endpoint))
    trace.set_tracer_provider(provider)


@dataclass(frozen=True, slots=True)
class EndedSpan:
    """A span of something that makes none itself.

    Attributes
    ----------
    trace_id, span_id, parent_id
        Hexadecimal, 32 and 16 digits; no parent: empty.
    began_ns, ended_ns
        Since 1970.
    failed
        Whether it ended in an error.
    """

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    failed: bool
    attributes: Mapping[str, str | int]


class SpanWriter:
    """Exports spans whose ids were given elsewhere, for example HAProxy's."""

    def __init__(self, endpoint: str, process: str, instance: str) -> None:
        self._processor = _processor(endpoint)
        self._resource = _resource(process, instance)

    def write(self, ended: EndedSpan) -> None:
        """Export a span. Raises ``ValueError`` if its ids are none."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        def context(span_id: str, *, remote: bool) -> SpanContext:
            flags = TraceFlags(TraceFlags.SAMPLED)
            return SpanContext(int(ended.trace_id, 16), int(span_id, 16), remote, flags)

        self._processor.on_end(
            ReadableSpan(
                name=ended.name,
                context=context(ended.span_id, remote=False),
                parent=context(ended.parent_id, remote=True) if ended.parent_id else None,
                resource=self._resource,
                attributes=ended.attributes,
                kind=SpanKind.SERVER,
                status=Status(StatusCode.ERROR if ended.failed else StatusCode.UNSET),
                start_time=ended.began_ns,
                end_time=ended.ended_ns,
            )
        )

    def close(self) -> None:
        """Export what is left, within seconds."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]  # the SDK gives it no types


def _processor(endpoint: str) -> BatchSpanProcessor:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
    return BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS)


def _resource(process: str, instance: str) -> Resource:
    from opentelemetry.sdk.resources import Resource

    about = {
        "service.name": process,
        "service.instance.id": instance,
        "service.version": version("flatshare"),
    }
    return Resource.create(about)
