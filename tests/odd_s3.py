"""An S3 that is odd in a named way: a proxy on loopback in front of a real one (or of ``local_s3``).

What S3 look-alikes, and proxies in front of real ones, are known to do otherwise. Each oddity is a function of
the request or of the reply; what it does not change goes through byte for byte.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import urlsplit

__all__ = ["ODDITIES", "Oddity", "Reply", "Seen", "odd_s3"]

Headers = dict[str, str]
"""By name in lower case."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it came; ``body`` is without HTTP's own chunking, and with any other framing."""

    method: str
    path: str
    query: tuple[str, ...]
    headers: Headers = field(repr=False)
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Oddity:
    """A way to be odd.

    Attributes
    ----------
    request
        Changes a request on its way in, or answers it itself.
    reply
        Changes an answer on its way out.
    """

    request: Callable[[Seen], Seen | Reply] = lambda seen: seen
    reply: Callable[[Seen, Reply], Reply] = lambda seen, reply: reply


def _error(status: int, code: str) -> Reply:
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>odd</Message></Error>'
    return Reply(status, {"content-type": "application/xml"}, text.encode())


def _without(seen: Seen, *names: str) -> Seen:
    return replace(seen, headers={name: text for name, text in seen.headers.items() if name not in names})


def _asks_for_versions(seen: Seen) -> bool:
    return seen.method == "GET" and any(part.partition("=")[0] == "versions" for part in seen.query)


def _no_versions(seen: Seen) -> Seen | Reply:
    return _error(501, "NotImplemented") if _asks_for_versions(seen) else seen


def _versions_ignored(seen: Seen) -> Seen:
    if not _asks_for_versions(seen):
        return seen
    left = tuple(part for part in seen.query if part.partition("=")[0] != "versions")
    return replace(seen, query=("list-type=2", *left))


def _framing_kept(seen: Seen) -> Seen:
    """Take the framing of ``aws-chunked`` for the object, as servers that do not know it do."""
    if "TRAILER" not in seen.headers.get("x-amz-content-sha256", ""):
        return seen
    return _without(
        seen, "x-amz-content-sha256", "x-amz-trailer", "x-amz-decoded-content-length", "content-encoding",
        "x-amz-sdk-checksum-algorithm",
    )  # fmt: skip


def _weak_etags(seen: Seen, reply: Reply) -> Reply:
    if "etag" not in reply.headers:
        return reply
    return replace(reply, headers={**reply.headers, "etag": f"W/{reply.headers['etag']}"})


def _together(*oddities: Oddity) -> Oddity:
    def request(seen: Seen) -> Seen | Reply:
        for one in oddities:
            changed = one.request(seen)
            if isinstance(changed, Reply):
                return changed
            seen = changed
        return seen

    def reply(seen: Seen, answer: Reply) -> Reply:
        for one in oddities:
            answer = one.reply(seen, answer)
        return answer

    return Oddity(request, reply)


def _lost_condition(instead: Reply) -> Callable[[Seen, Reply], Reply]:
    return lambda seen, reply: instead if seen.method == "PUT" and reply.status == 412 else reply


ODDITIES: Final[dict[str, Oddity]] = {
    "none": Oddity(),
    "no-versions": Oddity(request=_no_versions),
    "versions-ignored": Oddity(request=_versions_ignored),
    "range-ignored": Oddity(request=lambda seen: _without(seen, "range")),
    "framing-kept": Oddity(request=_framing_kept),
    "weak-etags": Oddity(reply=_weak_etags),
    "lost-is-304": Oddity(reply=_lost_condition(Reply(304, {}, b""))),
    "lost-is-409": Oddity(reply=_lost_condition(_error(409, "OperationAborted"))),
}
ODDITIES["oddest"] = _together(
    *(
        ODDITIES[name]
        for name in ("no-versions", "range-ignored", "framing-kept", "weak-etags", "lost-is-304")
    )
)
ODDITIES["other-oddest"] = _together(
    *(ODDITIES[name] for name in ("versions-ignored", "range-ignored", "weak-etags", "lost-is-409"))
)
"""By name: ``no-versions`` answers 501 to ListObjectVersions, ``versions-ignored`` lists plainly instead;
``range-ignored`` sends whole objects; ``framing-kept`` stores what ``aws-chunked`` puts around an object;
``weak-etags`` says ``W/`` in headers; ``lost-is-...`` has another status where S3 has 412."""


@contextlib.contextmanager
def odd_s3(
    behind: str, oddity: Oddity, *, tls: ssl.SSLContext | None = None
) -> Iterator[tuple[str, list[Seen]]]:
    """Serve the S3 at the URL ``behind`` with an oddity, in threads of this process.

    Yields
    ------
    tuple
        The endpoint URL, and the requests as they come.
    """
    target = urlsplit(behind).netloc
    log: list[Seen] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            path, _, query = self.path.partition("?")
            headers = {name.lower(): text for name, text in self.headers.items()}
            seen = Seen(self.command, path, tuple(filter(None, query.split("&"))), headers, self._body())
            log.append(seen)
            asked = oddity.request(seen)
            reply = asked if isinstance(asked, Reply) else oddity.reply(seen, _forward(target, asked))
            self._answer(reply)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do  # noqa: N815 - http.server's names

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("transfer-encoding", ""):
                return self.rfile.read(int(self.headers.get("content-length") or 0))
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(pieces)

        def _answer(self, reply: Reply) -> None:
            self.send_response_only(reply.status)
            for name, text in reply.headers.items():
                if name not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, text)
            if self.command == "HEAD":
                self.send_header("content-length", reply.headers.get("content-length", "0"))
            elif reply.status not in (204, 304):
                self.send_header("content-length", str(len(reply.body)))
            self.end_headers()
            if self.command != "HEAD" and reply.status not in (204, 304):
                self.wfile.write(reply.body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that closes early is no news."""

    with Server(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True, name="odd-s3")
        thread.start()
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}", log
        finally:
            server.shutdown()
            thread.join()


def _forward(target: str, seen: Seen) -> Reply:
    headers = {
        name: text
        for name, text in seen.headers.items()
        if name not in ("expect", "transfer-encoding", "connection", "content-length")
    }
    headers["content-length"] = str(len(seen.body))
    connection = http.client.HTTPConnection(target, timeout=60)
    try:
        query = "&".join(seen.query)
        connection.request(seen.method, f"{seen.path}?{query}" if query else seen.path, seen.body, headers)
        answer = connection.getresponse()
        body = answer.read()
        return Reply(answer.status, {name.lower(): text for name, text in answer.getheaders()}, body)
    finally:
        connection.close()
