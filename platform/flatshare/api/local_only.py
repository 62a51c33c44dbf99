"""Where authentication is off: this machine's own programs may call, a web page that is open on it may not.

Listening on loopback keeps other machines out, not browsers: every page that is open here can send requests
to it, and one whose name is made to resolve to 127.0.0.1 can read the answers too (DNS rebinding). Such
requests are recognised by headers that a browser can't hide: ``Host``, ``Origin``, and ``Sec-Fetch-Site``.

With authentication on this is not needed: a key is in a header of its own, which no page can set for another
site without asking first (CORS), and we allow no site anything. There are no cookies.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from flatshare.api.http import ErrorForm, error_reply
from flatshare.errors import NotLocal

__all__ = ["LocalOnly", "check_local"]

_HOST: Final = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9.-]{1,253})(?::[0-9]{1,5})?", re.ASCII)


def check_local(headers: Mapping[str, str]) -> None:
    """Return if a request may come from this machine's own user, and from no other site's page.

    Parameters
    ----------
    headers
        By name in lower case.

    Raises
    ------
    NotLocal
        Its Host is not loopback, or a browser says that another site's page sent it.
    """
    host = headers.get("host")
    # Without a Host (HTTP/1.0) it is no browser.
    if host is not None and not _is_loopback(host):
        raise NotLocal(
            "authentication is off, so only requests to localhost, 127.0.0.0/8 or [::1] are taken; the Host "
            f"header says {host[:80]!a}"
        )
    origin = headers.get("origin")
    if origin is not None and not _same(origin, host):
        raise NotLocal(
            "authentication is off, so no page of another site may call; the Origin header says "
            f"{origin[:80]!a}"
        )
    site = headers.get("sec-fetch-site")
    if site is not None and site.strip().lower() not in ("none", "same-origin"):
        raise NotLocal(
            "authentication is off, so no page of another site may call; the Sec-Fetch-Site header says "
            f"{site[:80]!a}"
        )


class LocalOnly:
    """An ASGI app that lets only those requests through for which :func:`check_local` returns.

    Parameters
    ----------
    app
        Gets them.
    form_of
        The form of a refusal.
    """

    def __init__(self, app: ASGIApp, form_of: Callable[[Request], ErrorForm]) -> None:
        self._app = app
        self._form_of = form_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point."""
        if scope["type"] == "http":
            request = Request(scope, receive)
            try:
                check_local(request.headers)
            except NotLocal as error:
                await error_reply(request, error, self._form_of(request))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this machine by one of the names that no DNS can give to another."""
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = match[1].lower()
    if name == "localhost":
        return True
    try:
        if name.startswith("["):
            return ipaddress.IPv6Address(name[1:-1]) == ipaddress.IPv6Address("::1")
        return ipaddress.IPv4Address(name).is_loopback
    except ValueError:
        return False


def _same(origin: str, host: str | None) -> bool:
    """Whether an Origin header names the very site that the request goes to."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and host is not None and parts.netloc.lower() == host.lower()
