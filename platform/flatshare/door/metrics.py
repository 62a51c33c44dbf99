"""One replica's own metrics, for scraping each process by itself: Prometheus' text format at its door."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flatshare.api.http import error_reply
from flatshare.api.identity import Identities
from flatshare.errors import BadInput, Forbidden
from flatshare.replica.exposition import CONTENT_TYPE, REPLICA_FAMILIES, exposition, samples_of
from flatshare.replica.snapshot import ReplicaSnapshot

__all__ = ["METRICS_PATH", "MetricsServer"]

METRICS_PATH: Final = "/-/metrics"
"""Where a door serves them; the path can't be reached through an edge."""


class MetricsServer:
    """Says what a replica has counted, to admins and viewers. An ASGI app of one route.

    Parameters
    ----------
    identities
        Tells who calls.
    snapshot
        What the replica has counted.
    """

    def __init__(self, identities: Identities, snapshot: Callable[[], Awaitable[ReplicaSnapshot]]) -> None:
        self._identities = identities
        self._snapshot = snapshot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point."""
        request = Request(scope, receive)
        try:
            reply = await self._answer(request)
        except Exception as error:  # the last handler on this path: everything becomes an error reply
            reply = error_reply(request, error)
        await reply(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        caller = await self._identities.identify(request.headers)
        if caller.role is None:
            raise Forbidden("this is for the platform's operators")
        if request.method not in ("GET", "HEAD"):
            raise BadInput("metrics are read: GET")
        one = await self._snapshot()
        return Response(
            exposition(REPLICA_FAMILIES, samples_of(one, with_host=False), [one]), media_type=CONTENT_TYPE
        )
