"""Who may use which route of the control plane: one row a route, and nothing without a row.

Decided before a byte of the body is read. A tenant's key that may manage sees and changes its own tenant;
whatever else it names is not there.

Keys are in headers, never in cookies or URLs: a web page of another site can't make a browser show one, so
no simple cross-site request carries an identity. Where authentication is off, :mod:`flatshare.api.local_only`
keeps such pages out, here for open routes too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from cachetools import LRUCache
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Message, Receive, Scope, Send

from flatshare.api.http import encoding_of, error_reply, read_body
from flatshare.api.identity import Caller, Identities, Role
from flatshare.api.local_only import check_local
from flatshare.api.openapi import DOCS_PATHS
from flatshare.control.ui import UI_PATHS
from flatshare.engine.quotas import Bucket
from flatshare.errors import Forbidden, OtherStore, ServeError, TooManyAtOnce, TooManyRequests
from flatshare.single_flight import SingleFlight
from flatshare_registry.errors import RegistryError
from flatshare_registry.identity import STORE_HEADER
from flatshare_registry.ids import TenantId
from flatshare_registry.records import Scope as KeyScope

__all__ = ["RULES", "Access", "Gate", "caller_of"]

MAX_BODY_BYTES: Final = 64 * 1024
"""Longest body of a control-plane request: the largest has a tenant's quotas in it."""

MAX_UNDER_WAY: Final = 4
REQUESTS_PER_S: Final = 5.0
BURST: Final = 30
"""Of one tenant's keys on the control plane, which has few places and tells every replica of each change."""

STORE_PATIENCE_S: Final = 1.0
"""Seconds that the OpenAPI document waits for the id: a platform must start while its store is down."""

_CALLER: Final = "flatshare.caller"


class Access(Enum):
    """Who a route is for."""

    OPEN = "everybody, without a key"
    VIEW = "admins and viewers"
    CHANGE = "admins"
    VIEW_OWN = "admins, viewers, and keys of the tenant in the path that may manage"
    CHANGE_OWN = "admins, and keys of the tenant in the path that may manage"


RULES: Final[Mapping[tuple[str, str], Access]] = {
    **{("GET", path): Access.OPEN for path in (*DOCS_PATHS, *UI_PATHS)},
    ("GET", "/tenants"): Access.VIEW,
    ("POST", "/tenants"): Access.CHANGE,
    ("GET", "/tenants/{tenant}"): Access.VIEW_OWN,
    ("DELETE", "/tenants/{tenant}"): Access.CHANGE,
    ("POST", "/tenants/{tenant}/erase"): Access.CHANGE,
    ("POST", "/tenants/{tenant}/suspend"): Access.CHANGE,
    ("POST", "/tenants/{tenant}/resume"): Access.CHANGE,
    ("POST", "/tenants/{tenant}/refresh"): Access.CHANGE_OWN,
    ("GET", "/tenants/{tenant}/audit"): Access.VIEW_OWN,
    ("GET", "/tenants/{tenant}/audit/verify"): Access.VIEW_OWN,
    ("GET", "/tenants/{tenant}/keys"): Access.VIEW_OWN,
    ("POST", "/tenants/{tenant}/keys"): Access.CHANGE_OWN,
    ("POST", "/tenants/{tenant}/keys/{key_id}/rotate"): Access.CHANGE_OWN,
    ("DELETE", "/tenants/{tenant}/keys/{key_id}"): Access.CHANGE_OWN,
    ("GET", "/tenants/{tenant}/quotas"): Access.VIEW_OWN,
    ("PUT", "/tenants/{tenant}/quotas"): Access.CHANGE,
    ("GET", "/tenants/{tenant}/versions"): Access.VIEW_OWN,
    ("GET", "/tenants/{tenant}/versions/{version}"): Access.VIEW_OWN,
    ("DELETE", "/tenants/{tenant}/versions/{version}"): Access.CHANGE_OWN,
    ("PUT", "/tenants/{tenant}/aliases/{alias}"): Access.CHANGE_OWN,
    ("DELETE", "/tenants/{tenant}/aliases/{alias}"): Access.CHANGE_OWN,
    ("POST", "/tenants/{tenant}/aliases/{alias}/rollback"): Access.CHANGE_OWN,
    ("GET", "/plans"): Access.VIEW,
    ("GET", "/replicas"): Access.VIEW,
    ("GET", "/metrics"): Access.VIEW,
    ("GET", "/metrics/targets"): Access.VIEW,
    ("GET", "/history"): Access.VIEW,
    ("POST", "/replicas/{replica}/drain"): Access.CHANGE,
    ("POST", "/nodes/{node}/drain"): Access.CHANGE,
    ("GET", "/scaling"): Access.VIEW,
    ("PUT", "/scaling"): Access.CHANGE,
    ("GET", "/tasks"): Access.VIEW,
    ("GET", "/settings"): Access.VIEW,
    ("PATCH", "/settings"): Access.CHANGE,
    ("POST", "/preload"): Access.CHANGE,
    ("POST", "/unpin"): Access.CHANGE,
    ("POST", "/unload"): Access.CHANGE,
}
"""By method and path, as the application has them."""


@dataclass(slots=True)
class _Account:
    bucket: Bucket
    under_way: int = 0


class Gate:
    """An ASGI app in front of the control plane's: admits allowed callers, and notes who each one is.

    Raises
    ------
    ServeError
        When it is built: a route has no row in :data:`RULES`.
    """

    def __init__(self, app: FastAPI, identities: Identities, store_id: Callable[[], str]) -> None:
        missing = [key for route in app.routes for key in _keys(route) if key not in RULES]
        if missing:
            raise ServeError(f"routes without a rule of access: {missing}")
        self._app = app
        self._identities = identities
        self._store_id = store_id
        self._own: str | None = None
        self._looks: SingleFlight[str, str] = SingleFlight("look at")
        self._tenants: LRUCache[str, _Account] = LRUCache(10_000)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            if self._identities.off:
                check_local(request.headers)
            access, tenant = self._rule(scope)
            if access is not Access.OPEN:
                caller = await self._identities.identify(request.headers)
                _check(access, caller, tenant)
                scope[_CALLER] = caller
                await self._check_store(request)
                with self._counted(caller):
                    encoding_of(request)
                    receive = _given(await read_body(request, MAX_BODY_BYTES), receive)
                    await self._app(scope, receive, send)
                return
            await self._app(scope, receive, await self._naming_the_store(scope, send))
        except ClientDisconnect:
            return
        except Exception as error:
            await error_reply(request, error)(scope, receive, send)

    async def _check_store(self, request: Request) -> None:
        """Return if a change names this platform's store, or names none.

        Raises
        ------
        OtherStore
            It names another store.
        """
        wanted = request.headers.get(STORE_HEADER)
        if wanted is None or request.method in ("GET", "HEAD"):
            return
        if wanted != await self._own_store():
            raise OtherStore("this platform serves another store than the one that the change is in")

    async def _own_store(self) -> str:
        """The id of this platform's store; read by one call at a time, and not again once it is known."""
        if self._own is None:
            self._own = await self._looks.join("the store's id", lambda: asyncio.to_thread(self._store_id))
        return self._own

    async def _naming_the_store(self, scope: Scope, send: Send) -> Send:
        """``send`` for the document that clients look at first: its headers name the store."""
        if not str(scope["path"]).endswith("/openapi.json"):
            return send
        try:
            async with asyncio.timeout(STORE_PATIENCE_S):
                own = (await self._own_store()).encode()
        except (RegistryError, TimeoutError):  # the document itself needs no store
            return send

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (STORE_HEADER.encode(), own)]}
            await send(message)

        return named

    @contextlib.contextmanager
    def _counted(self, caller: Caller) -> Iterator[None]:
        """Count a request against the limits of its tenant; operators have none.

        Raises
        ------
        TooManyAtOnce, TooManyRequests
            It is over them.
        """
        if caller.tenant is None:
            yield
            return
        account = self._tenants.get(caller.tenant)
        if account is None:
            account = self._tenants[caller.tenant] = _Account(Bucket(REQUESTS_PER_S, BURST, time.monotonic()))
        if account.under_way >= MAX_UNDER_WAY:
            raise TooManyAtOnce(f"tenant {caller.tenant} has {MAX_UNDER_WAY} requests of this kind under way")
        if account.bucket.take(time.monotonic()):
            raise TooManyRequests(
                f"tenant {caller.tenant} sends more than {REQUESTS_PER_S:g} of these a second"
            )
        account.under_way += 1
        try:
            yield
        finally:
            account.under_way -= 1

    def _rule(self, scope: Scope) -> tuple[Access, str]:
        for route in self._app.routes:
            match, found = route.matches(scope)
            if match is Match.FULL and isinstance(route, Route):
                method = "GET" if scope["method"] == "HEAD" else scope["method"]
                return RULES[method, route.path], str(found.get("path_params", {}).get("tenant", ""))
        return Access.OPEN, ""  # there is no such route, or not with this method: the application says so


def caller_of(request: Request) -> Caller:
    """The caller that the gate admitted."""
    caller: Caller = request.scope[_CALLER]
    return caller


def _check(access: Access, caller: Caller, tenant: str) -> None:
    """Return if a caller may use a route.

    Raises
    ------
    NotFound
        It is another tenant's.
    Forbidden
        The key does not allow it.
    """
    if caller.role is Role.ADMIN:
        return
    if caller.role is Role.VIEWER:
        if access in (Access.VIEW, Access.VIEW_OWN):
            return
        raise Forbidden("a viewer's key may look, and change nothing")
    if access not in (Access.VIEW_OWN, Access.CHANGE_OWN):
        raise Forbidden("this is for the platform's operators")
    caller.may(TenantId(tenant), KeyScope.MANAGE)


def _keys(route: BaseRoute) -> Iterable[tuple[str, str]]:
    if isinstance(route, Route):
        return [(method, route.path) for method in sorted(route.methods or ()) if method != "HEAD"]
    return [("?", str(route))]


def _given(body: bytes, receive: Receive) -> Receive:
    """An ASGI ``receive`` that gives a body which was read already, then whatever comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Message:
        return messages.pop() if messages else await receive()

    return given
