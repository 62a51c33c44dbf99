"""The hot routes' way round FastAPI: same handlers, same error replies, without the framework between.

In a profile of a loaded replica FastAPI and Starlette were on the stack in 42 % of the samples, our
own handler in 22 %: middlewares, routing and dependency solving, of which these routes use nothing.
FastAPI still holds these routes for the OpenAPI, and everything else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from flatshare.api.http import error_reply

__all__ = ["HotRoutes"]

Handler = Callable[[Request], Awaitable[Response]]


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
        request = Request(scope, receive)
        try:
            response = await handler(request)
        except ClientDisconnect:
            return  # nobody is there to be answered
        except Exception as error:  # the last handler on this path: everything becomes an error reply
            response = error_reply(request, error)
        await response(scope, receive, send)
