"""How the platform's processes log: text for people, or a line of JSON for each record, on stderr.

Each shell calls :func:`log_as` once. Where stderr goes depends on the process: Ray keeps that of Serve's
processes (``logs/`` of its session); systemd or a terminal has that of ``up`` and ``edge``. Requests have
lines of their own, written by the edge (``access_log.py``).
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final, Literal, TextIO

__all__ = ["LogFormat", "LogLevel", "log_as"]

LogFormat = Literal["text", "json"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _JsonLines(logging.Formatter):
    """One line of JSON a record; line breaks within are escaped."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
        }
        request_id = getattr(record, "request_id", None)
        if request_id is not None:
            document["request_id"] = request_id
        if record.exc_info:
            document["error"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False, default=str)


def log_as(form: LogFormat, level: LogLevel, process: str, stream: TextIO | None = None) -> None:
    """Write this process's records of ``flatshare`` in this form; of several calls, the last one counts.

    Parameters
    ----------
    process
        What it is, for JSON: ``replica um4503sa``.
    stream
        Where to; None for stderr.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    if form == "json":
        handler.setFormatter(_JsonLines(process))
    else:
        text = logging.Formatter(_TEXT, "%Y-%m-%dT%H:%M:%SZ")
        text.converter = time.gmtime
        handler.setFormatter(text)
    logger = logging.getLogger("flatshare")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
