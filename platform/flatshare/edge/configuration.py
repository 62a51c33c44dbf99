"""HAProxy's configuration, rendered from targets: pure text in, text out.

What matters, and why:

- A server is a place of the ring (``placement.ring``), and its id is the place's: HAProxy 2.8 puts a server on the
  ring by its id, so a replica's death moves its own models only, and its replacement gets them back.
- A model has one home. A model that one replica can't serve has copies: the map of copies names the servers
  that share its requests, and ``placement.copies`` decides its rows. A model that has no row, or whose server
  is down, goes by the ring.
- A prediction is idempotent, so a replica that dies under a request costs a retry, not a failure;
  HAProxy can only send a body again that fits its buffer whole (``tune.bufsize``).
- The first refused connection takes a server out until a check succeeds (``error-limit 1``): a
  retry hashes to the same server as long as that one counts as up, so with a higher limit some
  requests used up their retries on a dead replica (seen: 5 of 9,600 over 8 kills; now none).
- ``idle-close-on-response``: after a reload the old worker closes a client's connection with its
  next answer; without it, it closes idle ones at once, under clients that are just about to use them.
- Headers that only Serve may set are removed; the request id is the caller's only if it is safe.
- A request that HAProxy can't parse gets HAProxy's own fixed 400 page (2.8 has no setting for that: it uses
  ``errorfile`` and ``http-error`` for what it has parsed). Every other error is answered in our JSON: also
  what Serve would answer in plain text, and over ``MAX_HEADERS`` headers, so HAProxy parses more than that.
- A key that the replicas refuse again and again (400 to 499, ``REFUSALS`` times in ten seconds) is held back
  here, for a second each time, except for ``HELD_BACK_PER_S`` requests a second. A refusal costs a replica a
  quarter of a millisecond of its core, and others would feel a flood of refusals.
  A tenant over its quota (429) is treated differently: it always gets its quota, and only what it sends
  beyond three times its quota is held back.
  The replicas enforce the limits themselves. The control plane has few places: an address that tries key
  after key there is refused, but not a caller who lately showed a key that the control plane took.
- The admin socket is a file that only this user can open; there is no stats port.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from flatshare.edge.copies import COPIES_MAP, COPY_ROWS
from flatshare.edge.log_rules import log_rules, sampling_rules
from flatshare.edge.options import EdgeOptions, quoted
from flatshare.edge.servers import CONTROL_CHECKS, POOL_CHECKS, Server

__all__ = ["render"]

MAX_HEADERS: Final = 110
"""Most headers of a request, with the few that the edge adds: HAProxy's own limit is 101."""

HEADER_BYTES: Final = 16 * 1024
"""Room for a request's line and headers in the buffer, beside the body that can be sent again."""

REWRITE_BYTES: Final = 4 * 1024
"""Part of the buffer that HAProxy keeps free for headers that we add."""

REFUSALS: Final = 100
"""Refusals in ten seconds after which the edge answers most of a key's requests itself, a second late, with 429."""

HELD_BACK_PER_S: Final = 20
"""Requests a second of such a key that still pass. Requests that are held back do not count towards it;
otherwise a flood that never pauses would be held back entirely."""

QUOTA_WINDOW_MS: Final = 200
"""Milliseconds over which a key's answers and 429s are counted against each other. Short: while some of its
requests are held back the tenant's quota goes on filling, and all of it must be used within the second."""

OPERATOR_S: Final = 3600
"""Seconds for which a key that the control plane took is not refused along with the rest of its address."""

OPEN_PATHS: Final = ("/admin/docs", "/admin/redoc", "/admin/openapi.json", "/admin/ui")
"""Paths of the control plane that need no key: an answer there does not mean that a shown key is good."""

MAX_PROXIES: Final = 3
"""Trusted proxies one behind the other: a CDN, its load balancer, ours."""

FALLBACK_ID: Final = 2**31 - 1
"""Server id of Serve's own proxy: the largest that HAProxy takes, and not that of any place."""

ERROR_MESSAGES: Final = {
    400: ("bad_request", "this is not an HTTP request that the edge understands"),
    405: ("method_not_allowed", "this method is not taken anywhere here"),
    408: ("request_timeout", "the request did not arrive in time"),
    413: ("too_large", "the body is longer than the limit of {limit} bytes"),
    429: ("too_many_refusals", "requests with this key are refused again and again; slow down"),
    500: ("internal", "the edge failed; give your operator the request id"),
    502: ("bad_gateway", "the replica went away while answering; retry"),
    503: ("no_replica", "no replica can take the request now; retry"),
    504: ("deadline_exceeded", "the replica did not answer in time; retry"),
}


def render(options: EdgeOptions, pool: Sequence[Server], control: Sequence[Server]) -> str:
    """The whole configuration.

    Parameters
    ----------
    pool, control
        Where the two applications' replicas listen; may be empty.
    """
    buffer_bytes = options.retry_body_bytes + HEADER_BYTES + REWRITE_BYTES
    server_timeout_s = options.request_timeout_s + 5
    return f"""# Rendered by flatshare; changes are overwritten.
global
    maxconn {options.max_connections}
    nbthread {options.threads}
    stats socket {quoted(options.socket)} mode 600 level admin expose-fd listeners
    hard-stop-after {options.hard_stop_after_s:.0f}s
    mworker-max-reloads {options.max_old_workers}
    tune.bufsize {buffer_bytes}
    tune.maxrewrite {REWRITE_BYTES}
    tune.http.maxhdr {HEADER_BYTES // 4}
    tune.stick-counters 4

defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server {server_timeout_s:.0f}s
    timeout queue 5s
    timeout http-request 15s
    timeout http-keep-alive 60s
    timeout tarpit 1s
    option redispatch 1
    retries 5
    http-reuse always
    option idle-close-on-response
{_http_errors(options)}

backend refusals
    stick-table type binary len 32 size 100k expire 10s store gpc0,gpc0_rate(10s),gpc1,gpc1_rate(1s)

backend quotas
    stick-table type binary len 32 size 100k expire 10s store gpc(2),gpc_rate(2,{QUOTA_WINDOW_MS}ms)

backend operators
    stick-table type binary len 32 size 10k expire {OPERATOR_S}s store gpc0

{_metrics(options)}frontend edge
    bind {_bind_address(options)}
    # One client that opens connections and says nothing must not take them all.
    stick-table type ipv6 size 100k expire 2m store conn_cur,gpc0,gpc0_rate(10s)
{_clients(options)}
{log_rules(options)}    http-request set-var(txn.id) req.hdr(x-request-id) if {{ req.hdr(x-request-id) -m reg ^[A-Za-z0-9._:-]{{1,64}}$ }}
    http-request set-var(txn.id) uuid() unless {{ var(txn.id) -m found }}
    http-request set-header x-request-id %[var(txn.id)]
    http-request del-header x-request-timeout-seconds
    # An answer that is whole in one piece is not waited for by a reader of disconnects: three tasks a request.
    http-request set-header x-request-disconnect-disabled ?1
    http-request del-header x-request-disconnect-disabled if {{ path /predict/stream }}
    http-request del-header x-session-id
    http-request del-header x-serve-router- -m beg
    http-request del-header x-flatshare- -m beg
    http-request set-header x-forwarded-for %[src]
    {_refuse(400, options)} if {{ req.fhdr_cnt gt {MAX_HEADERS} }}
    {_refuse(400, options)} if {{ req.fhdr_cnt(authorization) gt 1 }} or {{ req.fhdr_cnt(x-api-key) gt 1 }}
    http-request set-var(txn.shown) req.fhdr(authorization),word(2,' ') if {{ req.fhdr(authorization) -m found }}
    http-request set-var(txn.shown) req.fhdr(x-api-key) unless {{ req.fhdr(authorization) -m found }}
    # Digests only: no key stands in a table that the admin socket shows.
    http-request set-var(txn.digest) var(txn.shown),sha2(256) if {{ var(txn.shown) -m found }}
    http-request track-sc1 var(txn.digest) table refusals if {{ var(txn.shown) -m found }}
    http-request tarpit deny_status 429 if {{ sc1_gpc0_rate(refusals) gt {REFUSALS} }} {{ sc1_gpc1_rate(refusals) gt {HELD_BACK_PER_S} }}
    http-request sc-inc-gpc1(1) if {{ var(txn.shown) -m found }}
    # Over a quota is no refusal of the key: what comes beyond three times of what is answered is held back.
    http-request track-sc3 var(txn.digest) table quotas if {{ var(txn.shown) -m found }}
    http-request set-var(txn.within) sc_gpc_rate(0,3,quotas),mul(2),add({HELD_BACK_PER_S * QUOTA_WINDOW_MS // 1000}) if {{ var(txn.shown) -m found }}
    http-request tarpit deny_status 429 if {{ var(txn.shown) -m found }} {{ sc_gpc_rate(1,3,quotas),sub(txn.within) gt 0 }}
    http-response sc-inc-gpc(0,3) if {{ status 200:299 }} {{ var(txn.shown) -m found }}
    http-response sc-inc-gpc(1,3) if {{ status 429 }} {{ var(txn.shown) -m found }}
    # Who tries key after key on the control plane must not keep the operator from it; nor may an address that the
    # operator shares with them, once the control plane took the operator's key.
    http-request set-var(txn.control) bool(true) if {{ path /admin }} or {{ path_beg /admin/ }}
    http-request set-var(txn.open) bool(true) if {{ path_beg {" ".join(OPEN_PATHS)} }}
    {_refuse(429, options)} hdr retry-after 10 if {{ var(txn.control) -m found }} {{ sc0_gpc0_rate gt {REFUSALS} }} !{{ var(txn.digest),in_table(operators) -m bool }}
    http-response sc-inc-gpc0(0) if {{ var(txn.control) -m found }} {{ status 401 }}
    http-response track-sc2 var(txn.digest) table operators if {{ var(txn.control) -m found }} {{ status 200:299 }} {{ var(txn.shown) -m found }} !{{ var(txn.open) -m found }}
    http-response sc-inc-gpc0(1) if {{ status 400:403 405:428 430:499 }} {{ var(txn.shown) -m found }}
    # An operator's key may ask for many tenants, some of them gone; a bad one like it is a 401.
    http-response sc-inc-gpc0(1) if {{ status 404 }} {{ var(txn.shown) -m found }} !{{ var(txn.shown) -m beg fs_ADMIN. }}
{_later(options)}{_too_long("req.hdr_val(content-length)", options)}
    # What Ray Serve or its HTTP server would answer in plain text, or fail on, never gets that far.
    {_refuse(400, options)} if {{ req.hdr(serve_multiplexed_model_id) -m reg '[^ -~]' }} or {{ req.hdr(serve-multiplexed-model-id) -m reg '[^ -~]' }}
    {_refuse(400, options)} if !{{ path_beg / }} or {{ req.hdr(upgrade) -m found }}
    {_refuse(405, options)} if !{{ method GET HEAD POST PUT PATCH DELETE OPTIONS }}
    # A body is taken in, as far as it fits the buffer, before a replica is bothered; then it can be sent again.
    # Not a stream of lines: these are answered while more of them come.
    http-request wait-for-body time 15s unless {{ path /predict/stream }}
{_too_long("req.body_size", options)}
    # '-' and '_' are the same in this header, and acme:production is acme: one home for each model.
    http-request set-header serve_multiplexed_model_id %[req.hdr(serve-multiplexed-model-id)] if {{ req.hdr(serve-multiplexed-model-id) -m found }} !{{ req.hdr(serve_multiplexed_model_id) -m found }}
    # The Open Inference Protocol names the model in its path.
    http-request set-header serve_multiplexed_model_id %[path,field(4,/),url_dec] if {{ path_beg /v2/models/ }}
    {_refuse(400, options)} if {{ path_beg /v2/models/ }} {{ req.hdr(serve_multiplexed_model_id) -m reg '[^ -~]' }}
    http-request set-var(txn.home) req.hdr(serve_multiplexed_model_id),regsub(:production$,)
{sampling_rules(options)}    use_backend control if {{ var(txn.control) -m found }}
    default_backend pool

backend pool
    # A model with a home of its own: its row names the server. One with copies: one of its rows by a throw of dice.
    http-request set-var(txn.copies) var(txn.home),map_str({COPIES_MAP})
    http-request set-var(txn.copy) var(txn.copies) if {{ var(txn.copies) -m beg p }}
    http-request set-var(txn.row) rand({COPY_ROWS}) if {{ var(txn.copies) -m found }} !{{ var(txn.copy) -m found }}
    http-request set-var-fmt(txn.row) "%[var(txn.home)]/%[var(txn.row)]" if {{ var(txn.row) -m found }}
    http-request set-var(txn.copy) var(txn.row),map_str({COPIES_MAP}) if {{ var(txn.row) -m found }}
    use-server %[var(txn.copy)] if {{ var(txn.copy) -m found }}
    balance hash var(txn.home)
    hash-type consistent crc32 avalanche
    retry-on conn-failure empty-response junk-response 0rtt-rejected 502
    option httpchk GET /-/healthz
    http-check expect status 200
    default-server {POOL_CHECKS}
{_servers(pool)}
    server serve-proxy 127.0.0.1:{options.fallback_port} id {FALLBACK_ID} backup

backend control
    balance roundrobin
    # Broadcasts and erasures answer within half of it.
    timeout server 60s
    # Changes are not sent twice: only what never reached a replica is tried again.
    retry-on conn-failure
    option httpchk GET /-/healthz
    http-check expect status 200
    default-server {CONTROL_CHECKS}
{_servers(control)}
    server serve-proxy 127.0.0.1:{options.fallback_port} id {FALLBACK_ID} backup
"""


def _clients(options: EdgeOptions) -> str:
    """Rules that count a client as ``sc0``, by its address; behind a trusted proxy, by the one that it names.

    That is the rightmost address that is not a trusted proxy's: what is left of it is the client's own claim.
    """
    bound = f"tcp-request connection reject if {{ sc0_conn_cur gt {options.max_connections_per_address} }}"
    if not options.trusted_proxies:
        return f"    tcp-request connection track-sc0 src\n    {bound}"
    lines = [f"acl from_proxy src {network}" for network in options.trusted_proxies]
    # A proxy's connection is of many clients: it is not counted, its requests are.
    lines += ["tcp-request connection track-sc0 src if !from_proxy", bound]
    lines += ["http-request set-var(txn.proxied) bool(true) if from_proxy"]
    lines += [
        f"http-request set-src req.hdr_ip(x-forwarded-for,-{hop}) if from_proxy"
        for hop in range(1, MAX_PROXIES + 1)
    ]
    lines += ["http-request track-sc0 src if { var(txn.proxied) -m found }"]
    return "\n".join(f"    {line}" for line in lines)


def _metrics(options: EdgeOptions) -> str:
    """HAProxy's own exporter for Prometheus: without a key, so on loopback only."""
    if not options.metrics_port:
        return ""
    return f"""frontend metrics
    bind 127.0.0.1:{options.metrics_port}
    http-request return status 404 unless {{ path /metrics }}
    http-request use-service prometheus-exporter

"""


def _later(options: EdgeOptions) -> str:
    """Rules for ``Prefer: respond-async``, which makes a request a task; ignored where no tasks are taken.

    The edge does not retry these requests: a task that is sent again would become two.
    """
    if not options.tasks:
        return ""
    wanted = "{ method POST } { req.hdr(prefer) -m sub -i respond-async }"
    lines = [
        f"http-request set-var(txn.later) bool(true) if {wanted} {{ path /predict /classify }}",
        f"http-request set-var(txn.later) bool(true) if {wanted} {{ path_beg /pipelines/ }}",
        "http-request set-header x-task-path %[path] if { var(txn.later) -m found }",
        "http-request set-path /tasks if { var(txn.later) -m found }",
        "http-request disable-l7-retry if { path /tasks } or { path_beg /tasks/ }",
    ]
    return "".join(f"    {line}\n" for line in lines)


def _too_long(size: str, options: EdgeOptions) -> str:
    """Refusals of bodies by a size that HAProxy knows; tasks may be longer."""
    if not options.tasks:
        return f"    {_refuse(413, options)} if {{ {size} gt {options.max_body_bytes} }}"
    task = _refuse(413, replace(options, max_body_bytes=options.max_task_bytes))
    return (
        f"    {_refuse(413, options)} if {{ {size} gt {options.max_body_bytes} }} !{{ path /tasks }}\n"
        f"    {task} if {{ {size} gt {options.max_task_bytes} }} {{ path /tasks }}"
    )


def _bind_address(options: EdgeOptions) -> str:
    host = "127.0.0.1" if options.host == "localhost" else options.host
    address = f"[{host}]:{options.port}" if ":" in host else f"{host}:{options.port}"
    if not options.tls_cert:
        return address
    return f"{address} ssl crt {quoted(options.tls_cert)} alpn h2,http/1.1 ssl-min-ver TLSv1.2"


def _servers(found: Sequence[Server]) -> str:
    return "\n".join(f"    server {server.line}" for server in sorted(found))


def _http_errors(options: EdgeOptions) -> str:
    lines = []
    for status in ERROR_MESSAGES:
        retry = " hdr retry-after 1" if status in (429, 502, 503, 504) else ""
        lines.append(
            f"    http-error status {status} content-type application/json "
            f"lf-string {_error_body(status, options)} hdr x-request-id %[var(txn.id)] "
            f"hdr x-flatshare-code {ERROR_MESSAGES[status][0]}{retry}"
        )
    return "\n".join(lines)


def _refuse(status: int, options: EdgeOptions) -> str:
    """A rule that answers with this error; a condition follows."""
    return (
        f"http-request return status {status} content-type application/json "
        f"lf-string {_error_body(status, options)} hdr x-request-id %[var(txn.id)] "
        f"hdr x-flatshare-code {ERROR_MESSAGES[status][0]}"
    )


def _error_body(status: int, options: EdgeOptions) -> str:
    code, message = ERROR_MESSAGES[status]
    text = message.format(limit=options.max_body_bytes)
    body = {"error": {"code": code, "message": text, "request_id": "%[var(txn.id)]"}}
    return f"'{json.dumps(body)}'"
