"""The hot routes: answered without FastAPI, by the replica's own door or as ASGI, in the same words.

In a profile of a loaded replica FastAPI and Starlette were on the stack in 42 % of the samples, our own
handler in 22 %: middlewares, routing and dependency solving, of which these routes use nothing. FastAPI still
holds these routes for the OpenAPI, and everything else.

There are two ways to an answer. :meth:`HotAnswers.answer` is a coroutine over any request. The door
(``door/protocol.py``) takes the steps one by one, so that a request for a resident model needs no task:
:meth:`HotAnswers.enter_now`, :meth:`HotAnswers.expected_length`, :meth:`HotAnswers.begin`; where one says
that something must be waited for, the coroutine does the rest.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flatshare.api.bodies import BodyReader
from flatshare.api.decoding import INLINE_BYTES, DecodeRoom
from flatshare.api.http import (
    REQUEST_ID_HEADER,
    ErrorForm,
    Incoming,
    WithHeaders,
    claimed_length,
    code_of,
    error_reply,
    own_form,
    route_path,
)
from flatshare.api.identity import Identities
from flatshare.models.architecture import Architecture
from flatshare.replica.request import InferenceService
from flatshare.replica.ticket import Prediction, Rows, Ticket
from flatshare.telemetry.tracing import NO_TRACE, TRACEPARENT, RequestTrace, Trace, request_trace, sent_on
from flatshare_registry.ids import ModelRef

__all__ = ["Call", "HotAnswers", "HotRequest", "HotRoute", "HotRoutes", "RawHeaders"]

_TRACEPARENT: Final = TRACEPARENT.encode()

RawHeaders = Sequence[tuple[bytes, bytes]]
"""Headers as they came: names in lower case, in order, duplicates included."""


class Call(Protocol):
    """One request of a hot route, whose body is here."""

    def rows(self, network: Architecture, most: int) -> Rows:
        """Rows ``(N, *input.shape)``, at most ``most``. Raises ``BadInput`` and ``TooLarge``."""
        ...

    def reply(self, prediction: Prediction) -> Response:
        """The answer."""
        ...


@dataclass(frozen=True, slots=True)
class HotRoute:
    """What distinguishes one hot route from another.

    Attributes
    ----------
    ref
        The model that a request names, by its headers and path; raises ``BadInput`` or ``InvalidRef``.
    call
        Makes the call from headers, body and ref; looks at none of them yet.
    form
        The form of error replies.
    """

    ref: Callable[[RawHeaders, str], ModelRef]
    call: Callable[[Mapping[str, str], bytes, ModelRef], Call]
    form: ErrorForm = own_form


class HotAnswers:
    """Answers requests of hot routes.

    Parameters
    ----------
    bodies, decoding
        Read bodies, and decode long ones.
    max_body_bytes, max_rows
        Limits of one request; beyond them 413.
    """

    def __init__(
        self,
        service: InferenceService,
        identities: Identities,
        bodies: BodyReader,
        decoding: DecodeRoom,
        *,
        max_body_bytes: int,
        max_rows: int,
    ) -> None:
        self._service = service
        self._identities = identities
        self._bodies = bodies
        self._decoding = decoding
        self._max_body_bytes = max_body_bytes
        self._max_rows = max_rows

    async def answer(self, route: HotRoute, request: Incoming) -> Response:
        """Do everything: identify the caller, parse the ref and admit the request, then read its body.

        Raises
        ------
        ServeError, RegistryError
            What the error table knows.
        ClientDisconnect
            The client went away before the end of the body.
        """
        caller = await self._identities.identify(request.headers)
        ref = route.ref(request.scope["headers"], route_path(request.scope))
        with await self._service.enter(caller, ref) as ticket:
            body = await self._bodies.read(request, ticket)
            return await self.finish(route, ticket, request.headers, body)

    def enter_now(
        self,
        route: HotRoute,
        headers: Mapping[str, str],
        raw: RawHeaders,
        path: str,
        trace: Trace = NO_TRACE,
    ) -> Ticket | None:
        """Admit a request whose caller and tenant are known; None if either must be looked up first."""
        caller = self._identities.identify_now(headers)
        if caller is None:
            return None
        return self._service.enter_now(caller, route.ref(raw, path), trace=trace)

    def expected_length(self, ticket: Ticket, claimed: str) -> int:
        """The length of a body, by its Content-Length; it counts as held from now on.

        Raises
        ------
        TooLarge, BodyOverQuota, TooManyBytesAtOnce, Overloaded
            The body is too long for everybody, for this tenant, or for this moment.
        """
        length = claimed_length(claimed, self._max_body_bytes, ticket.limits.body_bytes)
        ticket.hold_bytes(length)
        return length

    def begin(
        self,
        route: HotRoute,
        ticket: Ticket,
        request: WithHeaders,
        body: bytes,
        done: Callable[[Response], None],
    ) -> bool:
        """Answer a request that waits for nothing but its pass; ``done`` gets the response later, once.

        Returns
        -------
        bool
            False: the body is long, or the request must wait for more. Nothing has begun: use :meth:`finish`.

        Raises
        ------
        ServeError, RegistryError
            It is refused; ``done`` is not called.
        """
        if len(body) > INLINE_BYTES:
            return False
        call = route.call(request.headers, body, ticket.ref)

        def answered(result: Prediction | Exception) -> None:
            try:
                if isinstance(result, Exception):
                    raise result
                response = call.reply(result)
                ticket.trace.lap("encode")
            except Exception as error:  # the last handler on this way: everything becomes an error reply
                response = error_reply(request, error, route.form)
            done(response)

        return self._service.begin(ticket, lambda network: self._rows(ticket, call, network), answered)

    async def finish(
        self, route: HotRoute, ticket: Ticket, headers: Mapping[str, str], body: bytes
    ) -> Response:
        """Finish a request that was admitted and whose body is complete. Raises as :meth:`answer`."""
        call = route.call(headers, body, ticket.ref)

        def decode(network: Architecture) -> Rows | Awaitable[Rows]:
            return self._decoding.here_or_there(
                ticket.ref.tenant, len(body), lambda: self._rows(ticket, call, network)
            )

        response = call.reply(await self._service.predict(ticket, decode))
        ticket.trace.lap("encode")
        return response

    def _rows(self, ticket: Ticket, call: Call, network: Architecture) -> Rows:
        return ticket.decode(self._max_rows, lambda most: call.rows(network, most))


class HotRequest:
    """What the hot routes need of a request.

    Headers are decoded once; Starlette's are searched anew each time.
    """

    __slots__ = ("_receive", "headers", "scope")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self._receive = receive
        # Reversed: of a header that came twice the first counts, as in Starlette.
        self.headers: Mapping[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The body's parts as they arrive.

        Raises
        ------
        ClientDisconnect
            The client went away before its end.
        """
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            yield message.get("body", b"")
            if not message.get("more_body", False):
                return


class HotRoutes:
    """An ASGI app that answers POSTs to hot routes itself and passes the rest on.

    Parameters
    ----------
    app
        Gets everything else.
    answers
        Answers requests of the hot routes.
    routes
        By path, relative to where the app is mounted.
    route_of
        Finds the hot route of any other path, if it has one.
    replied
        Called with the status of each answer, and with the code if it is an error.
    traced
        Whether requests that are sampled leave spans.
    """

    def __init__(
        self,
        app: ASGIApp,
        answers: HotAnswers,
        routes: Mapping[str, HotRoute],
        route_of: Callable[[str], HotRoute | None],
        replied: Callable[[int, str], None],
        traced: bool = False,
    ) -> None:
        self._app = app
        self._traced = traced
        self._routes = routes
        self._route_of = route_of
        self.answers = answers
        self.replied = replied

    def route(self, path: str) -> HotRoute | None:
        """The hot route of POSTs to a path; None when it is none."""
        return self._routes.get(path) or self._route_of(path)

    def trace(self, headers: Mapping[str, str], path: str) -> RequestTrace | None:
        """The trace of a request, if it is sampled."""
        if not self._traced or TRACEPARENT not in headers:  # most come by an edge that sends none
            return None
        about = {"url.path": path, "flatshare.request_id": headers.get(REQUEST_ID_HEADER, "")}
        return request_trace(headers, "request", about)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = None
        if self._traced and any(name == _TRACEPARENT for name, _ in scope["headers"]):
            trace = self.trace(HotRequest(scope, receive).headers, route_path(scope))
        if trace is None:
            await self._answer(scope, receive, send)
            return
        status, shown = 499, []  # as if nobody was there any more

        async def watched(message: Message) -> None:
            nonlocal status, shown
            if message["type"] == "http.response.start":
                status, shown = message["status"], list(message.get("headers", ()))
            await send(message)

        with trace.entered():
            # FastAPI makes spans of its own, of what this header names.
            headers = [pair for pair in scope["headers"] if pair[0] != _TRACEPARENT]
            ours = {**scope, "headers": [*headers, (_TRACEPARENT, sent_on().encode())]}
            try:
                await self._answer(ours, receive, watched)
            finally:
                trace.end(status, shown)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.replied(message["status"], code_of(message["status"], message.get("headers", ())))
            await send(message)

        route = self.route(route_path(scope)) if scope["method"] == "POST" else None
        if route is None:
            await self._app(scope, receive, counted)
            return
        try:
            response = await self.answers.answer(route, HotRequest(scope, receive))
        except ClientDisconnect:
            return  # nobody is there to be answered
        except Exception as error:  # the last handler on this path: everything becomes an error reply
            response = error_reply(Request(scope, receive), error, route.form)
        await response(scope, receive, counted)
