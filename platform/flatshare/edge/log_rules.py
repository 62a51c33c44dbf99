"""What the edge writes of each request: rules for the access log, and for the lines of traced requests."""

from __future__ import annotations

from typing import Final

from flatshare.edge.options import EdgeOptions, quoted

__all__ = ["LOG_BYTES", "LOG_CHARS", "log_rules", "sampling_rules"]

LOG_BYTES: Final = 16 * 1024
"""Longest line of the access log. Text from outside is cut first, so that no line is cut within its JSON."""

LOG_CHARS: Final = 1024
"""Most bytes of a path in the access log; in JSON one byte may become six."""


def log_rules(options: EdgeOptions) -> str:
    """One line of JSON for each request; no body, no query, and of a key only its id.

    A missing value is ``-``, as HAProxy writes it. The maker of spans gets only lines of sampled requests,
    which are told apart by their level.
    """
    if not options.access_log and options.spans is None:
        return ""
    # What somebody else wrote, in the order of the line; cut so that no line is longer than LOG_BYTES.
    said = {
        "method": "method,bytes(0,32)", "path": f"path,bytes(0,{LOG_CHARS})",
        "trace": "req.hdr(traceparent),field(2,-)", "key": "var(txn.shown),field(2,_)",
    }  # fmt: skip
    only_if = {
        "trace": r"{ req.hdr(traceparent) -m reg ^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$ }",
        "key": r"{ var(txn.shown) -m reg ^fs_[A-Za-z0-9-]{1,63}[.][a-z0-9]{10}_[A-Za-z0-9_-]{43}$ }",
    }
    replied = ("tenant", "version", "tier", "replica", "code")
    texts = {
        "id": "var(txn.id)", **{name: f"var(txn.log_{name})" for name in said},
        "model": "var(txn.home),bytes(0,256)", **{name: f"var(txn.log_{name})" for name in replied},
    }  # fmt: skip
    words = ",".join(f'"{name}":"%[{sample},json(utf8s)]"' for name, sample in texts.items())
    numbers = '"status":%ST,"ms":%Ta,"wait_ms":%Tw,"bytes_in":%U,"bytes_out":%B'
    lines = [f"log {options.access_log} len {LOG_BYTES} format raw local0"] if options.access_log else []
    if options.spans is not None:
        lines.append(f"log {quoted(options.spans)} len {LOG_BYTES} format raw local0 notice")
        words += "".join(f',"{name}":"%[var(txn.{name})]"' for name in ("span", "caller", "began", "ended"))
    lines += [
        f"""log-format '{{"time":%Ts.%ms,{words},{numbers},"retries":"%rc","server":"%s","end":"%ts"}}'""",
        "option dontlognull",
    ]
    for name, sample in said.items():
        if name != "key":  # which is known later
            condition = f" if {only_if[name]}" if name in only_if else ""
            lines.append(f"http-request set-var(txn.log_{name}) {sample}{condition}")
    # The rules for answers run after all rules for requests, and also for the edge's own answers: a refused
    # request gets its code and its key's id from them.
    lines += [
        f"http-after-response set-var(txn.log_{name}) res.hdr(x-flatshare-{name}),bytes(0,128)"
        for name in replied
    ]
    lines.append(f"http-after-response set-var(txn.log_key) {said['key']} if {only_if['key']}")
    return "".join(f"    {line}\n" for line in lines)


def sampling_rules(options: EdgeOptions) -> str:
    """Rules that choose the requests to trace: at random, and not by a caller's flag.

    A caller's trace is joined, so its id stays; its sampling flag is overwritten.
    """
    if options.spans is None:
        return ""
    joins = "{ var(txn.log_trace) -m found }"
    sampled = "{ var(txn.span) -m found }"
    lines = [
        f"http-request set-var(txn.caller) req.hdr(traceparent),field(3,-) if {joins}",
        f"http-request del-header tracestate if !{joins}",
        f"http-request set-var(txn.span) uuid(),regsub(-,,g),bytes(16,16) if "
        f"{{ rand(1000000) lt {round(options.trace_ratio * 1e6)} }} !{{ var(txn.control) -m found }}",
        f"http-request set-var(txn.log_trace) uuid(),regsub(-,,g) if {sampled} !{joins}",
        f"http-request set-header traceparent 00-%[var(txn.log_trace)]-%[var(txn.span)]-01 if {sampled}",
        f"http-request set-header traceparent 00-%[var(txn.log_trace)]-%[var(txn.caller)]-00 if !{sampled} {joins}",
        f"http-request del-header traceparent if !{sampled} !{joins}",
        f"http-request set-log-level notice if {sampled}",
        f"http-request set-var(txn.began) date(0,us) if {sampled}",
        f"http-after-response set-var(txn.ended) date(0,us) if {sampled}",
    ]
    if not options.access_log:
        lines.append(f"http-request set-log-level silent if !{sampled}")
    return "".join(f"    {line}\n" for line in lines)
