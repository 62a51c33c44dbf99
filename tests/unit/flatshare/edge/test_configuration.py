"""The rendered configuration by itself: what each setting becomes. That HAProxy does it: tests/contract/test_haproxy.py."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flatshare.edge.configuration import (
    ERROR_MESSAGES,
    FALLBACK_ID,
    HEADER_BYTES,
    render,
)
from flatshare.edge.options import EdgeOptions
from flatshare.edge.servers import Server

OPTIONS = EdgeOptions(
    host="0.0.0.0", port=8000, socket=Path("/run/edge.sock"), fallback_port=8001, max_body_bytes=10**6,
    retry_body_bytes=200_000, request_timeout_s=30,
)  # fmt: skip


def found(text: str, pattern: str) -> str:
    """The one place where a pattern stands."""
    (one,) = re.findall(pattern, text, re.MULTILINE)
    return str(one)


def section(text: str, name: str) -> str:
    return re.split(r"^(?=\S)", text.split(f"\n{name}\n")[1], flags=re.MULTILINE)[0]


@pytest.mark.parametrize(
    ("host", "bind"),
    [
        ("localhost", "127.0.0.1:8000"), ("127.0.0.1", "127.0.0.1:8000"), ("0.0.0.0", "0.0.0.0:8000"),
        ("192.0.2.7", "192.0.2.7:8000"), ("edge.example", "edge.example:8000"), ("::1", "[::1]:8000"), ("::", "[::]:8000"),
    ],
)  # fmt: skip
def test_the_edge_listens_where_it_is_told_and_nowhere_else(host: str, bind: str) -> None:
    assert found(render(replace(OPTIONS, host=host), [], []), r"^    bind (.*)$") == bind


@pytest.mark.parametrize("host", ["0.0.0.0", "::1"])
def test_with_a_certificate_tls_ends_here(host: str) -> None:
    plain = found(render(replace(OPTIONS, host=host), [], []), r"^    bind (.*)$")
    bind = found(render(replace(OPTIONS, host=host, tls_cert="/etc/cert.pem"), [], []), r"^    bind (.*)$")
    assert bind.startswith(f"{plain} ssl crt /etc/cert.pem ")
    assert "ssl-min-ver TLSv1.2" in bind and "ssl" not in plain


@pytest.mark.parametrize("seconds", [1, 30, 120])
def test_the_edge_waits_longer_than_a_replica_may_take(seconds: float) -> None:
    """The replica's own 504 says more than the edge's."""
    text = render(replace(OPTIONS, request_timeout_s=seconds), [], [])
    waits = int(found(section(text, "defaults"), r"^    timeout server (\d+)s$"))
    assert seconds + 2 <= waits <= seconds + 10
    assert int(found(text, r"^    hard-stop-after (\d+)s$")) >= waits, "an old worker ends what it began"


@pytest.mark.parametrize("body", [0, 16_384, 2_000_000])
def test_a_body_that_is_to_be_sent_again_fits_the_buffer_beside_its_headers(body: int) -> None:
    text = render(replace(OPTIONS, retry_body_bytes=body), [], [])
    buffer, kept = (int(found(text, rf"^    tune.{name} (\d+)$")) for name in ("bufsize", "maxrewrite"))
    assert body + HEADER_BYTES <= buffer - kept <= body + 2 * HEADER_BYTES


def test_limits_and_places_are_those_of_the_options() -> None:
    text = render(
        replace(OPTIONS, max_connections=77, threads=3, max_connections_per_address=5),
        [],
        [],
    )
    assert found(text, r"^    maxconn (\d+)$") == "77"
    assert found(text, r"^    nbthread (\d+)$") == "3"
    assert found(text, r"sc0_conn_cur gt (\d+) ") == "5"
    assert re.search(r"^    stats socket /run/edge.sock mode 600 ", text, re.MULTILINE)
    assert text.count("if { req.hdr_val(content-length) gt 1000000 }") == 1
    assert text.count("if { req.body_size gt 1000000 }") == 1


def test_every_error_is_json_with_its_code_and_the_request_id() -> None:
    lines = dict(
        re.findall(r"^    http-error status (\d+) content-type application/json lf-string '(.*)' hdr", render(OPTIONS, [], []), re.MULTILINE)
    )  # fmt: skip
    assert lines.keys() == {str(status) for status in ERROR_MESSAGES}
    for status, (code, message) in ERROR_MESSAGES.items():
        body = json.loads(lines[str(status)])["error"]
        assert body == {"code": code, "message": message.format(limit=10**6), "request_id": "%[var(txn.id)]"}


def test_only_errors_that_may_be_over_soon_say_when_to_come_back() -> None:
    told = re.findall(
        r"^    http-error status (\d+) .* hdr retry-after 1$", render(OPTIONS, [], []), re.MULTILINE
    )
    assert told == ["429", "502", "503", "504"]


def test_what_the_edge_refuses_itself_it_answers_as_its_other_errors() -> None:
    text = render(OPTIONS, [], [])
    refused = re.findall(r"^    http-request return status (\d+) content-type application/json lf-string '(.*?)' hdr x-request-id %\[var\(txn.id\)\] .*if ", text, re.MULTILINE)  # fmt: skip
    assert {int(status) for status, _ in refused} == {400, 405, 413, 429}
    for status, body in refused:
        assert json.loads(body)["error"]["code"] == ERROR_MESSAGES[int(status)][0]
    assert "None" not in text


def test_servers_are_places_whatever_the_order_in_which_they_were_found() -> None:
    pool = [Server(7, "10.0.0.2", 40001), Server(0, "10.0.0.1", 40000)]
    control = [Server(0, "10.0.0.9", 50000)]
    text = render(OPTIONS, pool, control)
    servers = {name: re.findall(r"^    server (\S+) (\S+) id (\d+)( backup)?$", section(text, f"backend {name}"), re.MULTILINE) for name in ("pool", "control")}  # fmt: skip
    fallback = ("serve-proxy", "127.0.0.1:8001", str(FALLBACK_ID), " backup")
    assert servers["pool"] == [("p0", "10.0.0.1:40000", "1", ""), ("p7", "10.0.0.2:40001", "8", ""), fallback]
    assert servers["control"] == [("p0", "10.0.0.9:50000", "1", ""), fallback]
    assert render(OPTIONS, pool[::-1], control) == text
