"""How processes log: a record is a line, in the form and from the level that was asked for."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from flatshare.process_log import log_as


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    logger = logging.getLogger("flatshare")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_json_is_a_line_each_with_the_request_and_the_error() -> None:
    out = io.StringIO()
    log_as("text", "DEBUG", "replica r0", io.StringIO())  # the last call holds
    log_as("json", "INFO", "replica r1", out)
    logger = logging.getLogger("flatshare.pool")
    logger.debug("not this")
    logger.info("a %s\nwith two lines", "tenant's text \x1b[2J")
    try:
        raise ValueError("odd\nindeed")
    except ValueError:
        logger.exception("request %s failed", "id1", extra={"request_id": "id1"})
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (first["level"], first["logger"], first["process"]) == ("INFO", "flatshare.pool", "replica r1")
    assert first["message"] == "a tenant's text \x1b[2J\nwith two lines" and "request_id" not in first
    assert (second["request_id"], second["message"]) == ("id1", "request id1 failed")
    assert "ValueError: odd" in second["error"] and abs(second["time"] - first["time"]) < 60


def test_text_says_when_how_bad_and_who() -> None:
    out = io.StringIO()
    log_as("text", "WARNING", "up", out)
    logging.getLogger("flatshare.edge").info("not this")
    logging.getLogger("flatshare.edge").warning("that")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ WARNING flatshare\.edge: that\n", out.getvalue())
