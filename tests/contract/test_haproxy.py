"""The rendered configuration in the real HAProxy: accepted, stable, retried, reloaded, closed to others."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import itertools
import json
import os
import queue
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from flatshare.edge.configuration import OPEN_PATHS, REFUSALS, render
from flatshare.edge.copies import COPIES_MAP
from flatshare.edge.options import EdgeOptions
from flatshare.edge.process import HaproxyProcess, find_haproxy, run_check
from flatshare.edge.servers import Server
from flatshare.edge.spans import span_of
from flatshare.engine.quotas import Bucket
from flatshare.errors import LocalError
from flatshare_registry.testing.ports import free_ports

MODEL = "serve_multiplexed_model_id"


class Backend:
    """A real HTTP server that names itself, keeps connections open, and can be told to die under a request."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.name = f"replica-{place}"
        self.requests: list[dict[str, str]] = []
        self.bodies: list[int] = []
        self.die_next = False
        self.streams: list[queue.SimpleQueue[bytes]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(b"ok")

            def stream(self) -> None:
                """Sends on what the test puts in, piece by piece, until it puts in nothing."""
                self.send_response(200)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()
                pieces.put(b"first")
                outer.streams.append(pieces)
                while True:
                    piece = pieces.get()
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    if not piece:
                        return

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if outer.die_next:
                    outer.die_next = False
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                outer.requests.append({key.lower(): value for key, value in self.headers.items()})
                outer.bodies.append(len(body))
                if "x-test-stream" in self.headers:
                    self.stream()
                    return
                self.answer(outer.name.encode())

            def answer(self, body: bytes) -> None:
                self.send_response(int(self.headers.get("x-test-status", 200)))
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def at(self) -> Server:
        return Server(self.place, "127.0.0.1", self.server.server_port)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Edge:
    def __init__(self, folder: Path, **changes: Any) -> None:
        self.process = HaproxyProcess(folder / "edge", access_log=changes.pop("log_file", None))
        values: dict[str, Any] = {
            "max_body_bytes": 1_000_000, "retry_body_bytes": 65_536, "request_timeout_s": 10, **changes,
        }  # fmt: skip
        port, fallback_port = free_ports(2)
        self.options = EdgeOptions(
            host="127.0.0.1",
            port=port,
            socket=self.process.admin_socket,
            fallback_port=fallback_port,
            **values,
        )
        self.url = f"http://127.0.0.1:{self.options.port}"

    def config(self, pool: list[Backend], control: list[Backend] | None = None) -> str:
        return render(self.options, [one.at for one in pool], [one.at for one in control or []])

    def reload(self, configuration: str) -> None:
        self.process.write(configuration)
        self.process.reload()


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    edge = Edge(tmp_path)
    yield edge
    edge.process.stop()


@pytest.fixture
def backends() -> Iterator[list[Backend]]:
    made = [Backend(n) for n in range(4)]
    yield made
    for one in made:
        one.close()


def homes(url: str, models: range = range(60)) -> dict[str, str]:
    with httpx.Client() as client:
        return {f"m{n}": client.post(url, headers={MODEL: f"m{n}"}).text for n in models}


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_the_real_haproxy_accepts_it(tmp_path: Path, count: int) -> None:
    options = EdgeOptions(
        "127.0.0.1",
        free_ports(1)[0],
        tmp_path / "a.sock",
        8500,
        8 * 1024**2,
        64 * 1024,
        30,
    )
    targets = [Server(n, "127.0.0.1", 30000 + n) for n in range(count)]
    (tmp_path / COPIES_MAP).touch()
    config = tmp_path / "haproxy.cfg"
    config.write_text(render(options, targets, targets[:1]))
    checked = run_check(find_haproxy(), config)
    assert checked.returncode == 0, checked.stdout.decode()
    assert b"WARNING" not in checked.stdout, checked.stdout.decode()


def test_models_have_stable_homes_and_a_death_moves_only_its_own(edge: Edge, backends: list[Backend]) -> None:
    edge.process.start(edge.config(backends))
    before = homes(edge.url)
    assert homes(edge.url) == before
    assert len(set(before.values())) == 4
    gone = backends[1]
    edge.reload(edge.config([one for one in backends if one is not gone]))
    after = homes(edge.url)
    moved = {model for model in before if before[model] != after[model]}
    assert moved == {model for model, home in before.items() if home == gone.name}


def test_production_by_name_or_not_is_one_home(edge: Edge, backends: list[Backend]) -> None:
    edge.process.start(edge.config(backends))
    for n in range(20):
        answers = {
            httpx.post(edge.url, headers={name: value}).text
            for name, value in (
                (MODEL, f"t{n}"),
                (MODEL, f"t{n}:production"),
                (MODEL.replace("_", "-"), f"t{n}"),
            )
        }
        assert len(answers) == 1


@pytest.mark.parametrize("size", [0, 1_000, 60_000])
def test_a_replica_that_dies_under_a_request_costs_a_retry(
    edge: Edge, backends: list[Backend], size: int
) -> None:
    edge.process.start(edge.config(backends))
    with httpx.Client() as client:
        home = client.post(edge.url, headers={MODEL: "m"}).text
        for one in backends:
            one.die_next = one.name == home
        reply = client.post(edge.url, content=b"x" * size, headers={MODEL: "m"})
    assert reply.status_code == 200
    assert sum(one.bodies.count(size) for one in backends) >= 1


def test_changes_on_the_control_plane_are_never_sent_twice(edge: Edge, backends: list[Backend]) -> None:
    control = backends[0]
    edge.process.start(edge.config(backends[1:], [control]))
    control.die_next = True
    reply = httpx.post(f"{edge.url}/admin/tenants", content=b"{}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, "bad_gateway")
    assert control.requests == []


def test_bodies_over_the_cap_are_refused_in_json(edge: Edge, backends: list[Backend]) -> None:
    edge.process.start(edge.config(backends))
    reply = httpx.post(edge.url, content=b"x" * 1_000_001, headers={MODEL: "m"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")
    assert reply.json()["error"]["request_id"] == reply.headers["x-request-id"]


def raw(edge: Edge, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", edge.options.port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


UNPARSABLE = {
    "not HTTP": b"hello\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "odd encoding": b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\nconnection: close\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\nconnection: close\r\n\r\nab",
    "raw path": b"GET /pr\xe9dict HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n"
    + b"".join(b"x-%d: 1\r\n" % n for n in range(300))
    + b"connection: close\r\n\r\n",
}


@pytest.mark.parametrize("request_", UNPARSABLE.values(), ids=UNPARSABLE.keys())
def test_what_is_no_http_is_refused_and_reaches_nobody(
    edge: Edge, backends: list[Backend], request_: bytes
) -> None:
    edge.process.start(edge.config(backends[:1]))
    assert raw(edge, request_).split()[1] in (b"400", b"422")
    assert backends[0].requests == []


HOSTILE = {
    "many headers": UNPARSABLE["many headers"],
    "as many headers as there is room for": b"GET / HTTP/1.1\r\n"
    + b"a:\r\n" * 3900
    + b"connection: close\r\n\r\n",
    "unknown method": b"FOO /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    "no slash": b"GET predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    "not UTF-8 in the model": b"POST / HTTP/1.1\r\nhost: x\r\nserve_multiplexed_model_id: t\xff\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
    "not UTF-8 in the dashed header": b"POST / HTTP/1.1\r\nhost: x\r\nserve-multiplexed-model-id: \xff\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
    "websocket": b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nconnection: upgrade, close\r\n\r\n",
}


@pytest.mark.parametrize("request_", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_requests_get_json_and_reach_nobody(
    edge: Edge, backends: list[Backend], request_: bytes
) -> None:
    edge.process.start(edge.config(backends[:1]))
    answer = raw(edge, request_)
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status in (400, 405), answer
    assert b"application/json" in head
    assert set(json.loads(body)["error"]) == {"code", "message", "request_id"}
    assert backends[0].requests == []


def test_a_body_that_claims_too_much_is_refused_before_it_comes(edge: Edge, backends: list[Backend]) -> None:
    edge.process.start(edge.config(backends[:1]))
    answer = raw(
        edge, b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000\r\nexpect: 100-continue\r\n"
        b"connection: close\r\n\r\n"
    )  # fmt: skip
    assert answer.split()[1] == b"413"


def test_nobody_there_is_503_in_json(edge: Edge) -> None:
    edge.process.start(edge.config([]))
    reply = httpx.post(edge.url, headers={MODEL: "m", "x-request-id": "abc"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_replica")
    assert (reply.headers["retry-after"], reply.json()["error"]["request_id"]) == ("1", "abc")


def test_as_many_headers_as_haproxy_takes_by_itself_go_through(edge: Edge, backends: list[Backend]) -> None:
    edge.process.start(edge.config(backends[:1]))
    many = {f"x-{number}": "1" for number in range(90)}
    assert httpx.post(edge.url, headers={MODEL: "acme", **many}, content=b"x").status_code == 200


def test_header_hygiene(edge: Edge, backends: list[Backend]) -> None:
    edge.process.start(edge.config(backends[:1]))
    httpx.post(
        edge.url,
        headers={
            MODEL: "m",
            "x-request-timeout-seconds": "0",
            "x-request-disconnect-disabled": "?1",
            "x-session-id": "s",
            "x-serve-router-secret": "1",
            "x-flatshare-tenant": "other",
            "x-forwarded-for": "6.6.6.6",
            "x-request-id": "bad id\t<script>",
        },
    )
    (seen,) = backends[0].requests
    for name in ("x-request-timeout-seconds", "x-session-id", "x-serve-router-secret", "x-flatshare-tenant"):
        assert name not in seen
    assert seen["x-request-disconnect-disabled"] == "?1", "ours, not the caller's"
    assert seen["x-forwarded-for"] == "127.0.0.1"
    assert re.fullmatch(r"[0-9a-f-]{36}", seen["x-request-id"])


def test_a_key_that_is_refused_again_and_again_is_held_back_and_no_other(
    edge: Edge, backends: list[Backend]
) -> None:
    edge.process.start(edge.config(backends[:1]))
    with httpx.Client() as client:

        def ask(status: int, **key: str) -> httpx.Response:
            headers = {MODEL: "m", "x-test-status": str(status), **key}
            return client.post(edge.url, headers=headers, timeout=10)

        # Eight at a time: one after the other is no flood (HAProxy's rates are sliding, not to the request).
        with ThreadPoolExecutor(8) as threads:
            replies = list(threads.map(lambda _: ask(403, authorization="Bearer bad"), range(200)))
        held = [one for one in replies if one.status_code == 429]
        assert len(replies) - len(held) > REFUSALS
        assert len(held) > 5
        for reply in held:
            assert reply.json()["error"]["code"] == "too_many_refusals"
            assert reply.headers["retry-after"] == "1"
            assert reply.elapsed.total_seconds() > 0.9, "a flood in a closed loop comes to a second a turn"
        for key in ({"authorization": "Bearer good"}, {"x-api-key": "bad"}, {}):
            # Each one of a key that is held back takes a second or more: the quickest of five tells.
            others = [ask(200, **key) for _ in range(5)]
            assert {one.status_code for one in others} == {200}
            assert min(one.elapsed.total_seconds() for one in others) < 0.9
        with ThreadPoolExecutor(8) as threads:  # answers are no refusals, however many
            good = threads.map(lambda _: ask(200, authorization="Bearer good").status_code, range(200))
            assert set(good) == {200}
        began = time.monotonic()
        while ask(200, authorization="Bearer bad").status_code == 429:
            assert time.monotonic() - began < 30, "it must be let in again"


def test_who_tries_key_after_key_on_the_control_plane_is_kept_off_it(
    edge: Edge, backends: list[Backend]
) -> None:
    """Each try with another key: nothing of one key's adds up, only the address's."""
    edge.process.start(edge.config(backends[:1], backends[1:2]))
    with httpx.Client(base_url=edge.url) as client:
        for number in range(REFUSALS + 1):
            shown = {"x-api-key": f"fs_ADMIN.{number}", "x-test-status": "401"}
            assert client.get("/admin/tenants", headers=shown).status_code == 401
        refused = client.get("/admin/tenants", headers={"x-api-key": "fs_ADMIN.again"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
        assert refused.json()["error"]["code"] == "too_many_refusals"
        assert client.post("/predict", headers={MODEL: "acme"}).status_code == 200, (
            "the data plane is not closed"
        )


def test_refusals_on_the_data_plane_do_not_keep_an_operator_off_the_control_plane(
    edge: Edge, backends: list[Backend]
) -> None:
    """A tenant that was erased still has clients; theirs may be the operator's address too."""
    edge.process.start(edge.config(backends[:1], backends[1:2]))
    with httpx.Client(base_url=edge.url) as client:
        for number in range(REFUSALS * 2):
            shown = {"x-api-key": f"fs_gone.{number}", "x-test-status": "401"}
            assert client.post("/predict", headers={MODEL: "gone", **shown}).status_code == 401
        assert client.get("/admin/replicas", headers={"x-api-key": "fs_ADMIN.good"}).status_code == 200


def test_an_operator_whose_key_was_taken_lately_is_not_kept_off_by_others_of_the_same_address(
    edge: Edge, backends: list[Backend]
) -> None:
    edge.process.start(edge.config(backends[:1], backends[1:2]))
    good = {"authorization": "Bearer fs_ADMIN.good"}
    with httpx.Client(base_url=edge.url) as client:
        assert client.get("/admin/replicas", headers=good).status_code == 200
        # Neither the data plane nor what is open to all takes a key for the control plane.
        assert client.post("/predict", headers={MODEL: "m", "x-api-key": "fs_tenant.key"}).status_code == 200
        for path in OPEN_PATHS:
            assert client.get(path, headers={"x-api-key": "fs_tenant.key"}).status_code == 200
        for number in range(REFUSALS + 1):
            shown = {"x-api-key": f"fs_ADMIN.{number}", "x-test-status": "401"}
            assert client.get("/admin/tenants", headers=shown).status_code == 401
        for unknown in ({"x-api-key": "fs_ADMIN.again"}, {"x-api-key": "fs_tenant.key"}, {}):
            assert client.get("/admin/tenants", headers=unknown).status_code == 429
        for _ in range(5):
            assert client.get("/admin/tenants", headers=good).status_code == 200


def test_disconnects_are_watched_for_where_an_answer_comes_in_pieces(
    edge: Edge, backends: list[Backend]
) -> None:
    edge.process.start(edge.config(backends[:1]))
    for path, value in (("/predict", "?1"), ("/predict/stream", None)):
        httpx.post(f"{edge.url}{path}", headers={MODEL: "acme", "x-request-disconnect-disabled": "?0"})
        assert backends[0].requests[-1].get("x-request-disconnect-disabled") == value


def test_one_address_can_not_take_all_connections(tmp_path: Path, backends: list[Backend]) -> None:
    edge = Edge(tmp_path, max_connections_per_address=5)
    edge.process.start(edge.config(backends[:1]))
    try:
        idle = [socket.create_connection(("127.0.0.1", edge.options.port)) for _ in range(5)]
        for connection in idle:
            connection.sendall(b"POST / HTTP/1.1\r\n")
        with pytest.raises(httpx.TransportError):
            httpx.post(edge.url, headers={MODEL: "m"})
        idle.pop().close()
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                assert httpx.post(edge.url, headers={MODEL: "m"}).status_code == 200
                break
            assert time.monotonic() < deadline
        for connection in idle:
            connection.close()
    finally:
        edge.process.stop()


def test_tls_ends_at_the_edge(tmp_path: Path, backends: list[Backend]) -> None:
    certificate = self_signed(tmp_path)
    edge = Edge(tmp_path, tls_cert=str(certificate))
    edge.process.start(edge.config(backends[:1]))
    try:
        context = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(verify=context) as client:
            reply = client.post(f"https://localhost:{edge.options.port}", headers={MODEL: "m"})
            assert (reply.status_code, reply.text) == (200, backends[0].name)
        with pytest.raises(httpx.TransportError):
            httpx.post(edge.url, headers={MODEL: "m"})  # no plain HTTP beside it
    finally:
        edge.process.stop()


def self_signed(folder: Path) -> Path:
    """A certificate for localhost and its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = folder / "edge.pem"
    path.write_bytes(
        certificate.public_bytes(Encoding.PEM)
        + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    path.chmod(0o600)
    return path


def test_a_reload_loses_no_request(edge: Edge, backends: list[Backend]) -> None:
    edge.process.start(edge.config(backends))
    stop = threading.Event()
    statuses: list[int] = []

    errors: list[Exception] = []

    def client() -> None:
        try:
            with httpx.Client() as session:
                while not stop.is_set():
                    statuses.append(session.post(edge.url, content=b"x", headers={MODEL: "m"}).status_code)
        except httpx.HTTPError as error:
            errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    rounds = 0
    try:
        while len(statuses) < 300 and rounds < 200 and not errors:
            rounds += 1
            edge.reload(edge.config(backends[: 2 + rounds % 3]))
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert errors == []
    assert len(statuses) >= 300
    assert rounds >= 3
    assert set(statuses) == {200}


@contextlib.contextmanager
def a_stream(edge: Edge, backend: Backend) -> Iterator[tuple[queue.SimpleQueue[bytes], Iterator[bytes]]]:
    """An answer that goes on: what is put in, and what comes out."""
    with httpx.Client(timeout=10) as client:
        with client.stream(
            "POST", f"{edge.url}/predict/stream", headers={MODEL: "m", "x-test-stream": "1"}
        ) as reply:
            pieces = reply.iter_raw()
            assert next(pieces) == b"first"
            source = backend.streams[-1]
            try:
                yield source, pieces
            finally:
                source.put(b"")


def test_a_stream_outlasts_a_change_of_replicas(tmp_path: Path, backends: list[Backend]) -> None:
    # The bound was the time that one request may take, and five seconds.
    edge = Edge(tmp_path, request_timeout_s=0.4)
    edge.process.start(edge.config(backends[:1]))
    try:
        with a_stream(edge, backends[0]) as (source, pieces):
            edge.reload(edge.config(backends[:2]))
            began = time.monotonic()
            while time.monotonic() - began < 7.0:
                source.put(b"more")
                assert next(pieces) == b"more"
                time.sleep(0.5)  # what is tested is that time passes
            source.put(b"")
            assert list(pieces) == []
    finally:
        edge.process.stop()


def old_workers(edge: Edge) -> list[psutil.Process]:
    """Workers of before a reload that still have connections."""
    assert edge.process.pid is not None
    current = edge.process.workers()
    return [one for one in psutil.Process(edge.process.pid).children() if one.pid not in current]


def test_old_workers_end_at_their_bound(tmp_path: Path, backends: list[Backend]) -> None:
    edge = Edge(tmp_path, hard_stop_after_s=1)
    edge.process.start(edge.config(backends[:1]))
    try:
        with a_stream(edge, backends[0]):
            edge.reload(edge.config(backends[:2]))
            old = old_workers(edge)
            assert len(old) == 1
            _, alive = psutil.wait_procs(old, timeout=10)
            assert alive == []
    finally:
        edge.process.stop()


def test_old_workers_do_not_pile_up(tmp_path: Path, backends: list[Backend]) -> None:
    edge = Edge(tmp_path, max_old_workers=3)
    edge.process.start(edge.config(backends[:1]))
    try:
        with contextlib.ExitStack() as stack:
            for count in range(8):
                stack.enter_context(a_stream(edge, backends[0]))
                edge.reload(edge.config(backends[: 1 + count % 2]))
            deadline = time.monotonic() + 10
            while len(old_workers(edge)) > 4:
                assert time.monotonic() < deadline, "a stream each keeps them all"
            assert len(old_workers(edge)) >= 2, "those of the last reloads go on"
    finally:
        edge.process.stop()


@pytest.mark.parametrize("how", ["stop", "master killed"])
def test_old_workers_end_with_the_edge(edge: Edge, backends: list[Backend], how: str) -> None:
    edge.process.start(edge.config(backends[:1]))
    with a_stream(edge, backends[0]):
        edge.reload(edge.config(backends[:2]))
        assert edge.process.pid is not None
        family = psutil.Process(edge.process.pid).children()
        assert len(family) == 2, "one from before the reload, with a stream, and one from after"
        if how == "stop":
            edge.process.stop()
        else:
            os.kill(edge.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize("name", ["a b", "it's", 'say "x"', "a#b", "back\\slash"])
def test_paths_may_hold_what_files_may(tmp_path: Path, backends: list[Backend], name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    certificate = self_signed(folder)
    edge = Edge(folder, tls_cert=str(certificate))
    edge.process.start(edge.config(backends[:1]))
    try:
        context = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(verify=context) as client:
            assert (
                client.post(f"https://localhost:{edge.options.port}", headers={MODEL: "m"}).status_code == 200
            )
        edge.reload(edge.config(backends[:2]))
    finally:
        edge.process.stop()


def forwarded_to(edge: Edge, backend: Backend, client: httpx.Client, *hops: str) -> str:
    """Whom a replica is told that a request is from."""
    headers = [(MODEL, "m"), *[("x-forwarded-for", hop) for hop in hops]]
    assert client.post(edge.url, headers=headers).status_code == 200
    return backend.requests[-1]["x-forwarded-for"]


def test_a_trusted_proxy_says_who_the_client_is(tmp_path: Path, backends: list[Backend]) -> None:
    edge = Edge(tmp_path, trusted_proxies=("127.0.0.1/32", "10.0.0.0/8", "2001:db8::/32"))
    edge.process.start(edge.config(backends[:1]))
    try:
        with httpx.Client() as client:  # one connection, as a load balancer's
            for hops, seen in (
                (["198.51.100.7"], "198.51.100.7"),
                (["6.6.6.6, 198.51.100.8"], "198.51.100.8"),  # the client's own word does not count
                (["6.6.6.6", "198.51.100.9"], "198.51.100.9"),
                (["6.6.6.6, 198.51.100.10, 10.1.2.3"], "198.51.100.10"),  # a proxy behind a proxy
                (["2001:db8:0:1::5, 10.1.2.3"], "2001:db8:0:1::5"),
                (["2a00::1"], "2a00::1"),
                (["nobody"], "127.0.0.1"),
                ([], "127.0.0.1"),
            ):
                assert forwarded_to(edge, backends[0], client, *hops) == seen, hops
    finally:
        edge.process.stop()


def test_who_is_no_trusted_proxy_says_nothing(tmp_path: Path, backends: list[Backend]) -> None:
    edge = Edge(tmp_path, trusted_proxies=("127.0.0.2/32",))
    edge.process.start(edge.config(backends[:1]))
    try:
        with httpx.Client() as client:
            assert forwarded_to(edge, backends[0], client, "198.51.100.7") == "127.0.0.1"
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as client:
            assert forwarded_to(edge, backends[0], client, "198.51.100.7") == "198.51.100.7"
    finally:
        edge.process.stop()


def test_behind_a_trusted_proxy_one_client_is_kept_off_and_no_other(
    tmp_path: Path, backends: list[Backend]
) -> None:
    edge = Edge(tmp_path, trusted_proxies=("127.0.0.1/32",))
    edge.process.start(edge.config(backends, backends[:1]))
    try:
        with httpx.Client() as client:

            def ask(number: int, address: str, status: int = 401) -> int:
                headers = {"authorization": f"Bearer k{number}", "x-test-status": str(status)}
                headers["x-forwarded-for"] = address
                return client.post(f"{edge.url}/admin/tenants", headers=headers, timeout=10).status_code

            with ThreadPoolExecutor(8) as threads:
                tried = list(threads.map(lambda number: ask(number, "198.51.100.7"), range(300)))
            assert 429 in tried
            assert ask(1000, "198.51.100.7", 200) == 429
            assert ask(1001, "198.51.100.8", 200) == 200
    finally:
        edge.process.stop()


def test_a_trusted_proxy_may_have_more_connections_than_a_client(
    tmp_path: Path, backends: list[Backend]
) -> None:
    edge = Edge(tmp_path, max_connections_per_address=3, trusted_proxies=("127.0.0.1/32",))
    edge.process.start(edge.config(backends[:1]))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                connection = stack.enter_context(
                    contextlib.closing(socket.create_connection(("127.0.0.1", edge.options.port)))
                )
                connection.sendall(b"POST / HTTP/1.1\r\n")
            assert httpx.post(edge.url, headers={MODEL: "m"}).status_code == 200
    finally:
        edge.process.stop()


FEW_FILES = """
import resource, sys
from pathlib import Path
from flatshare.edge.configuration import render
from flatshare.edge.options import EdgeOptions
from flatshare.edge.process import HaproxyProcess
from flatshare.local.checks import affordable_connections
from flatshare.edge.servers import Server
from flatshare.edge.spans import span_of

folder, port, limit, replicas = Path(sys.argv[1]), *map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
process = HaproxyProcess(folder / "edge")
room = affordable_connections(replicas)
options = EdgeOptions("127.0.0.1", port, process.admin_socket, 8500, 8 * 1024**2, 64 * 1024, 30, max_connections=room)
pool = [Server(n, "127.0.0.1", 30000 + n) for n in range(replicas)]
process.start(render(options, pool, pool[:1]))
process.stop()
print(room)
"""


@pytest.mark.parametrize(("limit", "replicas"), [(4096, 2), (4096, 200), (800, 2)])
def test_with_few_open_files_it_starts_with_fewer_connections(
    tmp_path: Path, limit: int, replicas: int
) -> None:
    (port,) = free_ports(1)
    arguments = [str(tmp_path), str(port), str(limit), str(replicas)]
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert 256 <= int(done.stdout) < 4096


def test_a_bad_configuration_is_refused_and_the_old_one_stays(edge: Edge, backends: list[Backend]) -> None:
    edge.process.start(edge.config(backends))
    with pytest.raises(LocalError, match="refuses"):
        edge.reload("global\n  nonsense here\n")
    assert httpx.post(edge.url, headers={MODEL: "m"}).status_code == 200


def test_a_taken_port_is_a_clear_error(edge: Edge, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", edge.options.port)):
        with pytest.raises(LocalError, match=r"ended at once.*bind"):
            edge.process.start(edge.config([]))


def test_sockets_are_closed_to_others_and_there_is_no_stats_port(edge: Edge, tmp_path: Path) -> None:
    edge.process.start(edge.config([]))
    folder = tmp_path / "edge"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("admin.sock", "master.sock"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert edge.process.pid is not None
    master = psutil.Process(edge.process.pid)
    family = [master, *master.children(recursive=True)]
    listening = {c.laddr for one in family for c in one.net_connections("inet") if c.status == "LISTEN"}
    assert {(address.ip, address.port) for address in listening} == {("127.0.0.1", edge.options.port)}


PARENT = """
import sys
from pathlib import Path
from flatshare.edge.process import HaproxyProcess
process = HaproxyProcess(Path(sys.argv[1]))
process.start(Path(sys.argv[2]).read_text())
print(process.pid, *process.workers(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_haproxy_dies_with_its_parent(edge: Edge, tmp_path: Path, number: int) -> None:
    (tmp_path / "config").write_text(edge.config([]))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "edge"), str(tmp_path / "config")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    family = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(family) == 2
    os.kill(parent.pid, number)
    parent.communicate()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


class Metered:
    """A replica that answers within a quota, and 429 beyond it: its own bucket, as replicas have it."""

    def __init__(self, rate: float) -> None:
        self.bucket = Bucket(rate, rate, time.monotonic())
        self.answered = self.refused = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if not head.startswith(b"GET"):  # a check
                    await reader.readexactly(2)
                if head.startswith(b"GET") or not self.bucket.take(time.monotonic()):
                    self.answered += not head.startswith(b"GET")
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                else:
                    self.refused += 1
                    writer.write(b"HTTP/1.1 429 Too Many\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n")
        writer.close()


async def flood(port: int, rate: float, seconds: float, key: str) -> list[float]:
    """Requests of one key at a rate: when they were answered with 200, in seconds from the start."""
    request = (
        f"POST /predict HTTP/1.1\r\nhost: x\r\n{MODEL}: acme\r\nx-api-key: {key}\r\n"
        "content-length: 2\r\n\r\n{}"
    ).encode()
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    tasks: set[asyncio.Task[None]] = set()
    good: list[float] = []
    began, sent = time.monotonic(), 0

    async def ask() -> None:
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        length = next(
            int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")
        )
        await reader.readexactly(length)
        if head.startswith(b"HTTP/1.1 200"):
            good.append(time.monotonic() - began)
        idle.append((reader, writer))

    while (at := time.monotonic() - began) < seconds:
        while sent < at * rate:
            tasks.add(asyncio.create_task(ask()))
            sent += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    for _, writer in idle:
        writer.close()
    return good


@pytest.mark.parametrize("factor", [1.3, 3.0, 8.0])
async def test_a_tenant_over_its_quota_gets_its_quota_all_the_time(edge: Edge, factor: float) -> None:
    """It was shut out for eight seconds: each 429 counted as a refusal of its key.

    The best of three: who shares the cores sends in lumps, and can only make it worse.
    """
    rate, seconds = 100.0, 6.0
    replica = Metered(rate)
    server = await asyncio.start_server(replica, "127.0.0.1", 0)
    target = Server(0, "127.0.0.1", server.sockets[0].getsockname()[1])
    # Eight times a hundred a second, each held for one: a machine that stalls for a moment has more of them
    # open than one address may, which is another limit than the one that is looked at here.
    options = replace(edge.options, max_connections_per_address=4000)
    edge.process.start(render(options, [target], []))
    least = 0.9 if factor <= 3 else 0.75  # while a flood is held back, some of what would be within is, too
    seen = []
    for number in range(3):
        # A key of its own, of which the edge remembers nothing: who was shut out is let in again after a while.
        key = f"fs_acme.aaaaaaaaa{number}_{'k' * 43}"
        before = replica.refused
        good = await flood(edge.options.port, rate * factor, seconds, key)
        pause_s = max(b - a for a, b in itertools.pairwise([0.0, *good]))
        steady = sum(at >= 1 for at in good)  # without the burst that it begins with
        refused = replica.refused - before  # a flood costs the replica no more than a few times its quota
        seen.append((steady, pause_s, refused))
        if steady >= least * rate * (seconds - 1) and pause_s < 1 and refused < 3 * seconds * rate:
            break
    else:
        raise AssertionError(f"answered after the first second, longest pause in s, refused: {seen}")
    server.close()


CALLERS = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("flags", ["01", "00", None, "junk"])
def test_the_edge_says_what_is_sampled_and_no_caller_does(
    tmp_path: Path, backends: list[Backend], ratio: float, flags: str | None
) -> None:
    """A caller's trace is joined, so that its id goes on; its flag is not believed."""
    lines = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    lines.bind(str(tmp_path / "spans.sock"))
    edge = Edge(tmp_path, spans=tmp_path / "spans.sock", trace_ratio=ratio)
    try:
        edge.process.start(edge.config(backends[:1]))
        sent = {None: {}, "junk": {"traceparent": "00-junk-01"}}.get(
            flags, {"traceparent": "-".join(("00", *CALLERS, str(flags)))}
        )
        before_us = time.time() * 1e6
        headers = {MODEL: "acme", "tracestate": "vendor=1", **sent}
        assert httpx.post(f"{edge.url}/predict", content=b"{}", headers=headers).status_code == 200
        got = backends[0].requests[-1].get("traceparent")
        joins = flags in ("00", "01")
        assert ("tracestate" in backends[0].requests[-1]) == joins
        if ratio == 0:
            assert got == ("-".join(("00", *CALLERS, "00")) if joins else None)
            lines.settimeout(0.3)
            with pytest.raises(TimeoutError):
                lines.recv(100_000)
            return
        assert got is not None
        version, trace, span, sampled = got.split("-")
        assert (version, sampled) == ("00", "01")
        assert re.fullmatch("[0-9a-f]{32}", trace)
        assert re.fullmatch("[0-9a-f]{16}", span)
        assert span != CALLERS[1]
        lines.settimeout(5)
        made = span_of(json.loads(lines.recv(100_000)))
        assert (made.trace_id, made.span_id) == (trace, span)
        assert (made.trace_id, made.parent_id) == (CALLERS if joins else (trace, ""))
        assert before_us - 1e5 < made.began_ns / 1e3 <= made.ended_ns / 1e3 < time.time() * 1e6 + 1e5
        assert made.attributes["http.response.status_code"] == 200
        assert made.attributes["url.path"] == "/predict"
    finally:
        edge.process.stop()
        lines.close()


def test_sampled_requests_stand_in_the_access_log_like_others(
    tmp_path: Path, backends: list[Backend]
) -> None:
    lines = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    lines.bind(str(tmp_path / "spans.sock"))
    log = tmp_path / "access.log"
    edge = Edge(tmp_path, spans=tmp_path / "spans.sock", trace_ratio=0.5, access_log="stdout", log_file=log)
    try:
        edge.process.start(edge.config(backends[:1]))
        spans: list[str] = []
        lines.settimeout(2)

        def take() -> None:  # beside: a socket holds ten
            with contextlib.suppress(TimeoutError):
                while True:
                    spans.append(json.loads(lines.recv(100_000))["trace"])

        with ThreadPoolExecutor(1) as threads, httpx.Client() as client:
            taken = threads.submit(take)
            for _ in range(60):
                client.post(f"{edge.url}/predict", content=b"{}", headers={MODEL: "acme"})
            taken.result()
    finally:
        edge.process.stop()
        lines.close()
    logged = [json.loads(line)["trace"] for line in log.read_text().splitlines()]
    assert len(logged) == 60
    assert 10 < len(spans) < 50
    assert sorted(one for one in logged if one != "-") == sorted(spans)
