"""A small HTTP/1.1 client for load: one request at a time on each kept-alive connection.

A load generator shares the cores with what it measures. A request and its answer cost aiohttp's client
0.35 ms of CPU here and this one 0.06 ms (Python 3.11, one core): with aiohttp the client was what bounded
the fastest contender. Parsing is httptools' (the llhttp of Node.js), as in uvicorn.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

from flatshare.errors import BadInput

__all__ = ["Connection", "NoAnswer", "Reply", "Target"]

_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_HEADER_VALUE: Final = re.compile(r"[ -~]*", re.ASCII)


class NoAnswer(Exception):
    """The server could not be reached, or the connection ended before the answer did.

    Attributes
    ----------
    begun : bool
        A part of the answer had come: a proxy in between has passed it on, and can't retry.
    """

    def __init__(self, text: str, *, begun: bool = False) -> None:
        super().__init__(text)
        self.begun = begun


@dataclass(slots=True)
class Reply:
    """An answer.

    Attributes
    ----------
    headers
        Names in lower case.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Raises
    ------
    BadInput
        The URL is not ``http://`` or ``https://`` with a host.
    """

    host: str
    port: int
    path: str
    tls: bool

    @classmethod
    def of(cls, url: str) -> Target:
        """From a URL."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:  # the port is no number, or a bracket stands alone
            host = port = None
        if not host or parts.scheme not in ("http", "https"):
            raise BadInput(f"{url.rpartition('@')[2][:80]!a} is not an http:// or https:// URL")
        tls = parts.scheme == "https"
        return cls(host, port or (443 if tls else 80), parts.path or "/", tls)

    def request(self, headers: dict[str, str], body: bytes) -> bytes:
        """A POST, ready to send; worth keeping when the same is sent often.

        Raises
        ------
        BadInput
            A header has a character that would end it, or that HTTP does not allow. Its value is not shown:
            it may be a key.
        """
        for name, value in headers.items():
            if _HEADER_NAME.fullmatch(name) is None or _HEADER_VALUE.fullmatch(value) is None:
                raise BadInput(f"the header {name[:80]!a} has a character that no header takes")
        lines = [
            f"POST {self.path} HTTP/1.1",
            f"host: {self.host}:{self.port}",
            f"content-length: {len(body)}",
        ]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("ascii") + body


class Connection(asyncio.Protocol):
    """A connection that is opened when needed and again when it was closed; for one request at a time."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Reply] | None = None
        self._start_reply()

    async def post(self, request: bytes, timeout_s: float) -> Reply:
        """Send and wait for the answer.

        Raises
        ------
        NoAnswer
            There was none, or not within ``timeout_s``.
        """
        loop = asyncio.get_running_loop()
        try:
            if self._transport is None or self._transport.is_closing():
                await loop.create_connection(
                    lambda: self, self._target.host, self._target.port, ssl=self._target.tls or None
                )
            assert self._transport is not None, "create_connection calls connection_made"
            self._start_reply()
            self._answer = loop.create_future()
            timer = loop.call_later(timeout_s, self.close)
            try:
                self._transport.write(request)
                return await self._answer
            finally:
                timer.cancel()
        except OSError as error:
            raise NoAnswer(str(error)) from None

    def close(self) -> None:
        """Close the connection; a request under way has no answer."""
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See :class:`asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its bases

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        self._begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(NoAnswer("the connection was closed", begun=self._begun))

    # -- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of the answer."""
        self._reply.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """A piece of its body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Its end."""
        reply = self._reply
        reply.status = self._parser.get_status_code()
        reply.body = b"".join(self._body)
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(reply)

    def _start_reply(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._reply = Reply()
        self._body: list[bytes] = []
        self._begun = False
