"""Takes the spans of a platform that runs here, and prints each trace as text.

A receiver of OTLP over HTTP, on loopback: start the platform with ``FLATSHARE_TRACES=http://127.0.0.1:4318``
and ``FLATSHARE_TRACE_RATIO=1``. For looking at a few requests; a collector (Jaeger, Tempo) keeps and finds them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

MOST_BYTES = 64 * 1024**2
SHOWN = ("flatshare.version", "flatshare.tier", "http.response.status_code", "flatshare.retries")
"""Attributes that stand in the text."""


@dataclass(frozen=True)
class Span:
    """One span, as it came; times in nanoseconds since 1970."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    service: str
    began_ns: int
    ended_ns: int
    failed: bool
    attributes: dict[str, str]


class Traces:
    """Spans by trace; a trace is shown once nothing of it has come for a while, and again if more comes."""

    def __init__(self, quiet_s: float) -> None:
        self._quiet_s = quiet_s
        self._changed = threading.Condition()
        self._spans: dict[str, dict[str, Span]] = {}
        self._due: dict[str, float] = {}

    def take(self, body: bytes) -> None:
        """Spans of one message."""
        with self._changed:
            for span in decoded(body):
                self._spans.setdefault(span.trace_id, {})[span.span_id] = span
                self._due[span.trace_id] = time.monotonic() + self._quiet_s
            self._changed.notify()

    def next(self) -> list[Span]:
        """Wait for the next trace that is quiet; its spans by time."""
        with self._changed:
            while True:
                first = min(self._due, key=self._due.__getitem__, default=None)
                left_s = self._due[first] - time.monotonic() if first is not None else None
                if first is not None and left_s is not None and left_s <= 0:
                    del self._due[first]
                    return sorted(self._spans[first].values(), key=lambda one: one.began_ns)
                self._changed.wait(left_s)


def decoded(body: bytes) -> Iterator[Span]:
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        service = next(text(one.value) for one in resource.resource.attributes if one.key == "service.name")
        for scope in resource.scope_spans:
            for one in scope.spans:
                yield Span(
                    one.trace_id.hex(), one.span_id.hex(), one.parent_span_id.hex(), one.name, service,
                    one.start_time_unix_nano, one.end_time_unix_nano, one.status.code == 2,
                    {item.key: text(item.value) for item in one.attributes},
                )  # fmt: skip


def text(value: AnyValue) -> str:
    return str(getattr(value, value.WhichOneof("value") or "string_value"))


def tree(spans: list[Span]) -> str:
    """A trace as text: each span below the one that it is part of, with its time and its beginning."""
    known = {one.span_id for one in spans}
    began_ns = spans[0].began_ns
    lines = [f"trace {spans[0].trace_id}"]

    def add(parent: str, depth: int) -> None:
        for one in spans:
            if one.parent_id == parent or (not parent and one.parent_id not in known):
                said = [one.attributes[name] for name in SHOWN if name in one.attributes]
                said += ["FAILED"] if one.failed else []
                name = "  " * depth + one.name
                spent, after = (one.ended_ns - one.began_ns) / 1e6, (one.began_ns - began_ns) / 1e6
                process = one.service.removeprefix("flatshare.")
                lines.append(
                    f"{name:<32} {spent:8.2f} ms  at {after:8.2f}  {process:<9}{' '.join(said)}".rstrip()
                )
                add(one.span_id, depth + 1)

    add("", 0)
    return "\n".join(lines)


def receiver(port: int, traces: Traces) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            if self.path != "/v1/traces" or length > MOST_BYTES:
                self.send_error(404)
                return
            body = self.rfile.read(length)
            traces.take(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=4318, help="where to listen, on loopback")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each trace")
    parser.add_argument(
        "--quiet-s", type=float, default=3.0, help="how long a trace must be quiet to be shown"
    )
    options = parser.parse_args()
    traces = Traces(options.quiet_s)
    server = receiver(options.port, traces)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"listening on http://127.0.0.1:{server.server_port}", file=sys.stderr, flush=True)
    try:
        while True:
            spans = traces.next()
            shown = json.dumps([asdict(one) for one in spans]) if options.json else tree(spans) + "\n"
            print(shown, flush=True)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
