"""Spans of the edge: HAProxy makes none, so they are made of the lines that it writes of sampled requests."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from pathlib import Path
from typing import Any, Final

from flatshare.telemetry.exporting import EndedSpan, SpanWriter

__all__ = ["EdgeSpans", "span_of"]

logger = logging.getLogger("flatshare.edge")

LINE_BYTES: Final = 64 * 1024
"""Longer than any line (``log_rules.LOG_BYTES``)."""


class EdgeSpans:
    """Takes HAProxy's lines at a socket of its own, in a thread.

    Parameters
    ----------
    path
        Of the socket, in a folder that only this user can enter.
    writer
        Where spans go.
    """

    def __init__(self, path: Path, writer: SpanWriter) -> None:
        self.path = path
        self._writer = writer
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._take, name="spans of the edge", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Export what has come, and end."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self.path))  # a blocked read does not see that its socket is closed
        self._thread.join(5)
        self._socket.close()
        self._writer.close()

    def _take(self) -> None:
        while line := self._socket.recv(LINE_BYTES):
            try:
                self._writer.write(span_of(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("a line of the edge is no span: %s", error)


def span_of(line: dict[str, Any]) -> EndedSpan:
    """The span of a request, from HAProxy's line; raises ``KeyError`` or ``ValueError`` for another line."""
    began_us = int(line["began"])
    # Its own timer knows milliseconds; the head of the answer has a time of its own.
    answered_us = int(line["ended"]) if line["ended"] not in ("", "-") else began_us
    ended_us = max(began_us + int(line["ms"]) * 1000, answered_us)
    about = {
        "http.request.method": line["method"], "url.path": line["path"],
        "http.response.status_code": int(line["status"]), "flatshare.request_id": line["id"],
        "flatshare.model": line["model"], "flatshare.server": line["server"], "flatshare.end": line["end"],
    }  # fmt: skip
    if line["retries"] != "0":
        about["flatshare.retries"] = line["retries"]
    return EndedSpan(
        name="edge", trace_id=line["trace"], span_id=line["span"],
        parent_id="" if line["caller"] in ("", "-") else line["caller"],
        began_ns=began_us * 1000, ended_ns=ended_us * 1000,
        failed=int(line["status"]) >= 500, attributes=about,
    )  # fmt: skip
