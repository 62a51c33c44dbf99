"""The door: a uvicorn server in the replica's own event loop, on an address of its own."""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Mapping
from typing import Any, Final, cast

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flatshare.api.hot import HotRoutes
from flatshare.api.http import REQUEST_ID_HEADER, request_id_of
from flatshare.door.metrics import METRICS_PATH
from flatshare.door.protocol import DoorProtocol
from flatshare.weights.peers import PEER_PATH

__all__ = ["HEALTH_PATH", "Door"]

logger = logging.getLogger("flatshare.door")

HEALTH_PATH: Final = "/-/healthz"
"""What the edge asks: 200 while the door takes new work, 503 when it does not any more."""

BACKLOG: Final = 2048
"""Connections that wait to be accepted: uvicorn's own default."""

KEEP_ALIVE_S: Final = 90
"""Seconds that an idle connection is kept: longer than the edge keeps it (60 s), which must close first."""

NOTICE_S: Final = 1.5
"""Seconds that a stopping door goes on taking work while its health says no: the edge looks once a second,
and four times a second once a check has failed."""


class Door:
    """One replica's listener.

    Must be used on the replica's event loop. Its address is known, and connections wait, from the beginning.

    Parameters
    ----------
    data_plane
        Answers everything; its hot routes the short way.
    host
        Address to listen on.
    port
        0: any that is free.
    tier
        Answers other nodes' replicas; None: they find nothing here.
    metrics
        Says what this replica has counted; None: nobody asks.

    Raises
    ------
    OSError
        The address can't be had.
    """

    def __init__(
        self,
        data_plane: HotRoutes,
        host: str,
        port: int = 0,
        *,
        tier: ASGIApp | None = None,
        metrics: ASGIApp | None = None,
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # With the protocol's number: asyncio checks it before it sets TCP_NODELAY. Without TCP_NODELAY an
        # answer in two writes waits 40 ms for the client's acknowledgement.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(BACKLOG)
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise
        self.host, self.port = self._socket.getsockname()[:2]
        self.taking = True
        config = uvicorn.Config(
            _Plain(data_plane, self, {PEER_PATH: tier, METRICS_PATH: metrics}),
            # uvicorn calls it for each connection, and asks no more of it.
            http=cast("Any", functools.partial(DoorProtocol, hot=data_plane)),
            loop="none",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self._ticking: asyncio.Task[None] | None = None

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._server.server_state.connections)

    async def start(self) -> None:
        """Take connections."""
        await self._server.startup(sockets=[self._socket])
        # Renews the Date header; ends with ``should_exit``.
        self._ticking = asyncio.get_running_loop().create_task(self._server.main_loop(), name="door")

    async def stop(self, timeout_s: float, notice_s: float = NOTICE_S) -> None:
        """Say that no new work is taken, then end what is under way, then close.

        Parameters
        ----------
        timeout_s
            Seconds that requests under way may take before their connections are cut.
        notice_s
            Seconds for which new requests are still taken, while the edge finds out.
        """
        self.taking = False
        if self._ticking is None:
            self._socket.close()
            return
        if self.connections:
            await asyncio.sleep(notice_s)
        self._server.should_exit = True
        await self._ticking
        self._server.config.timeout_graceful_shutdown = max(int(timeout_s), 1)
        await self._server.shutdown(sockets=[self._socket])
        for connection in list(self._server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()


def _came_by_an_edge(scope: Scope) -> bool:
    return any(name == b"x-forwarded-for" for name, _ in scope["headers"])


class _Plain:
    """The usual way: health, routes closed to edges, and request ids on requests and replies, as in Serve."""

    def __init__(self, app: ASGIApp, door: Door, inside: Mapping[str, ASGIApp | None]) -> None:
        self._app = app
        self._inside = inside
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point."""
        if scope["type"] != "http":
            return
        raw = [(name, value) for name, value in scope["headers"] if name == b"x-request-id"]
        given = raw[0][1].decode("latin-1") if raw else ""
        request_id = request_id_of({REQUEST_ID_HEADER: given}).encode()
        if not raw or raw[0][1] != request_id or len(raw) > 1:
            others = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
            scope["headers"] = [*others, (b"x-request-id", request_id)]

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"x-request-id", request_id)]
                message = {**message, "headers": headers}
            await send(message)

        # A request that came through an edge names its client, and finds no such path.
        inside = self._inside.get(scope["path"])
        if inside is not None and not _came_by_an_edge(scope):
            await inside(scope, receive, with_id)
            return
        if scope["path"] == HEALTH_PATH:
            status = 200 if self._door.taking else 503
            await JSONResponse({"taking": self._door.taking}, status)(scope, receive, with_id)
            return
        await self._app(scope, receive, with_id)
