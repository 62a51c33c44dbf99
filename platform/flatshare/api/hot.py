"""The hot routes' way round FastAPI: same handlers, same error replies, without the framework between.

In a profile of a loaded replica FastAPI and Starlette were on the stack in 42 % of the samples, our
own handler in 22 %: middlewares, routing and dependency solving, of which these routes use nothing.
FastAPI still holds these routes for the OpenAPI, and everything else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from flatshare.api.http import Incoming, error_reply

__all__ = ["HotRequest", "HotRoutes"]

Handler = Callable[[Incoming], Awaitable[Response]]


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
    """An ASGI app that answers POSTs to some exact paths itself and passes the rest on.

    Parameters
    ----------
    app
        Gets everything else.
    handlers
        By path, relative to where the app is mounted.
    """

    def __init__(self, app: ASGIApp, handlers: Mapping[str, Handler]) -> None:
        self._app = app
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point."""
        handler = None
        if scope["type"] == "http" and scope["method"] == "POST":
            handler = self._handlers.get(scope["path"].removeprefix(scope.get("root_path", "")))
        if handler is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await handler(HotRequest(scope, receive))
        except ClientDisconnect:
            return  # nobody is there to be answered
        except Exception as error:  # the last handler on this path: everything becomes an error reply
            response = error_reply(Request(scope, receive), error)
        await response(scope, receive, send)
