"""One connection of the door: uvicorn's HTTP protocol, with a shorter way for hot requests.

A hot request whose caller, tenant and model are known costs no task, no ASGI cycle and one write: its headers
identify the caller, its rows are made when the body is complete, the pass calls back. Everything else takes
uvicorn's usual way into the ASGI app: other routes, chunked or compressed bodies, ``Expect``, HTTP/1.0,
pipelined requests, callers and tenants that must be looked up. Both ways give the same answer, byte for byte
(``tests/property/test_door_ways.py``).

To uvicorn a hot request looks like a cycle of its own (:class:`_Exchange`), so its keep-alive timer,
pipeline, flow control and shutdown go on as they are. What is relied on of uvicorn's class is pinned by
``tests/contract/test_uvicorn_protocol.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, Final, cast

from starlette.responses import Response
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from flatshare.api.hot import HotRoute, HotRoutes
from flatshare.api.http import BODY_TIMEOUT_S, REQUEST_ID_HEADER, code_of, error_reply, request_id_of
from flatshare.errors import TooSlow
from flatshare.replica.ticket import Ticket
from flatshare.telemetry.tracing import NO_TRACE, RequestTrace

__all__ = ["DoorProtocol"]

logger = logging.getLogger("flatshare.door")

_REQUEST_ID: Final = REQUEST_ID_HEADER.encode()


class _NoEvent:
    """Stands where a cycle has the event that wakes its task: a hot request has none."""

    def set(self) -> None:
        """Wake nobody."""


_NO_EVENT: Final = _NoEvent()


class _Exchange:
    """A hot request, from its headers to its answer.

    Attributes
    ----------
    response_complete, disconnected, keep_alive, message_event
        What uvicorn's protocol asks of a cycle.
    missing
        Bytes of the body that are not here yet.
    """

    __slots__ = (
        "disconnected", "headers", "keep_alive", "message_event", "missing", "parts", "response_complete",
        "route", "ticket", "too_slow", "trace",
    )  # fmt: skip

    def __init__(self, route: HotRoute, headers: dict[str, str], keep_alive: bool) -> None:
        self.route = route
        self.headers = headers
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False
        self.message_event = _NO_EVENT
        self.ticket: Ticket | None = None
        self.missing = 0
        self.parts: list[bytes] = []
        self.too_slow: asyncio.TimerHandle | None = None
        self.trace: RequestTrace | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it was let in and its body is not all here."""
        return self.ticket is not None and self.missing > 0

    def leave(self) -> None:
        """The request counts no longer."""
        ticket, self.ticket = self.ticket, None
        if ticket is not None:
            ticket.__exit__(None, None, None)
        if self.too_slow is not None:
            self.too_slow.cancel()
            self.too_slow = None


class DoorProtocol(HttpToolsProtocol):
    """A connection to one replica.

    Parameters
    ----------
    hot
        The hot routes.
    body_timeout_s
        Seconds in which a body must be here.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        hot: HotRoutes,
        body_timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._hot = hot
        self._body_timeout_s = body_timeout_s
        self._exchange: _Exchange | None = None

    # -- asyncio's callbacks

    def data_received(self, data: bytes) -> None:
        """Parse, and answer what is whole."""
        super().data_received(data)
        exchange = self._exchange
        if exchange is not None and exchange.is_waiting and exchange.too_slow is None:
            exchange.too_slow = self.loop.call_later(self._body_timeout_s, self._too_slow, exchange)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: a request that still waited for its body no longer counts."""
        super().connection_lost(exc)
        exchange = self._exchange
        if exchange is not None and exchange.is_waiting:
            exchange.leave()

    # -- the parser's callbacks

    def on_message_begin(self) -> None:
        """As uvicorn's, without the scope: a hot request needs none."""
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._exchange = None

    def on_headers_complete(self) -> None:
        """Let a hot request in, or send it the usual way."""
        route = self._hot_route()
        if route is None or not self._enter(route):
            url, headers, expects = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, expects
            self.headers.extend(headers)
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Keep a part of a hot request's body."""
        exchange = self._exchange
        if exchange is None:
            super().on_body(body)
        elif not exchange.response_complete:
            exchange.parts.append(body)
            exchange.missing -= len(body)

    def on_message_complete(self) -> None:
        """The body is whole: begin the pass."""
        exchange = self._exchange
        if exchange is None:
            super().on_message_complete()
        elif not exchange.response_complete:
            self._begin(exchange)

    # -- a hot request

    def _hot_route(self) -> HotRoute | None:
        """The hot route of the request whose headers are here, if it can take the short way."""
        before = cast("_Exchange | None", self.cycle)  # uvicorn's types say that there always is one
        if self.parser.get_method() != b"POST" or (before is not None and not before.response_complete):
            return None
        if b"%" in self.url or b"?" in self.url or not self.url.isascii():
            return None  # what must be parsed first is uvicorn's to parse
        route = self._hot.route(self.url.decode())
        if (
            route is None
            or self.expect_100_continue
            or self.flow.write_paused
            or self.parser.get_http_version() != "1.1"
            or self.parser.should_upgrade()
        ):
            return None
        return route

    def _enter(self, route: HotRoute) -> bool:
        """Admit a request whose caller and tenant are known; returns whether it takes the short way."""
        # Reversed: of a header that came twice the first counts, as in Starlette.
        decoded = (
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in reversed(self.headers)
        )
        headers = dict(decoded)
        claimed = headers.get("content-length")
        if claimed is None or "content-encoding" in headers or "transfer-encoding" in headers:
            return False
        headers[REQUEST_ID_HEADER] = request_id_of(headers)
        exchange = _Exchange(route, headers, self.parser.should_keep_alive())
        refusal: Exception | None = None
        path = self.url.decode()
        trace = exchange.trace = self._hot.trace(headers, path)
        try:
            ticket = self._hot.answers.enter_now(route, headers, self.headers, path, trace or NO_TRACE)
            if ticket is None:
                return False
            exchange.ticket = ticket
            exchange.missing = self._hot.answers.expected_length(ticket, claimed)
        except Exception as error:  # everything becomes an error reply; the parser would make a 400 of it
            refusal = error
        self._exchange = self.cycle = exchange  # type: ignore[assignment]  # a cycle, to uvicorn
        if refusal is not None:
            self._fail(exchange, refusal)
        return True

    def _begin(self, exchange: _Exchange) -> None:
        parts, exchange.parts = exchange.parts, []
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        ticket = exchange.ticket
        assert ticket is not None, "it was let in, and is not answered"
        if exchange.too_slow is not None:
            exchange.too_slow.cancel()
            exchange.too_slow = None

        def done(response: Response) -> None:
            self._answer(exchange, response)

        try:
            if self._hot.answers.begin(exchange.route, ticket, exchange, body, done):
                return
        except Exception as error:
            self._fail(exchange, error)
            return
        task = self.loop.create_task(self._finish(exchange, ticket, body))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    async def _finish(self, exchange: _Exchange, ticket: Ticket, body: bytes) -> None:
        """The rest of a request that has to wait for more than its pass."""
        try:
            with exchange.trace.entered() if exchange.trace is not None else contextlib.nullcontext():
                response = await self._hot.answers.finish(exchange.route, ticket, exchange.headers, body)
        except Exception as error:
            self._fail(exchange, error)
        except BaseException:  # cancelled: nobody is answered
            exchange.leave()
            raise
        else:
            self._answer(exchange, response)

    def _too_slow(self, exchange: _Exchange) -> None:
        if not exchange.response_complete:
            self._fail(exchange, TooSlow(f"the body did not arrive within {self._body_timeout_s:g} s"))

    def _fail(self, exchange: _Exchange, error: Exception) -> None:
        self._answer(exchange, error_reply(exchange, error, exchange.route.form))

    def _answer(self, exchange: _Exchange, response: Response) -> None:
        """Write an answer in one piece, and let uvicorn go on with the connection."""
        exchange.leave()
        exchange.response_complete = True
        if exchange.trace is not None:
            exchange.trace.end(response.status_code, response.raw_headers)
        if exchange.disconnected or self.transport.is_closing():
            return
        pieces = [STATUS_LINE[response.status_code]]
        for name, value in self.server_state.default_headers:
            pieces += (name, b": ", value, b"\r\n")
        for name, value in response.raw_headers:
            pieces += (name, b": ", value, b"\r\n")
        pieces += (_REQUEST_ID, b": ", exchange.headers[REQUEST_ID_HEADER].encode("latin-1"), b"\r\n")
        pieces.append(b"\r\n" if exchange.keep_alive else b"connection: close\r\n\r\n")
        pieces.append(bytes(response.body))
        self.transport.write(b"".join(pieces))
        self._hot.replied(response.status_code, code_of(response.status_code, response.raw_headers))
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()
