"""Where the edge writes a line for each request: what the setting ``access_log`` means."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["log_target"]


def log_target(access_log: str) -> tuple[str, Path | None]:
    """What HAProxy is told of an access log, and the file that its stdout goes to.

    Raises
    ------
    ValueError
        It is neither off, nor an absolute path, nor ``udp://host:port``.
    """
    if access_log == "off":
        return "", None
    if access_log.startswith("/") and access_log.isprintable():
        return "stdout", Path(access_log)
    found = re.fullmatch(r"udp://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", access_log)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError(f"access_log: {access_log!a} is neither off, nor /a/path, nor udp://host:port")
    return f"udp@{found[1]}:{found[2]}", None
