"""One HTTP request of a client command. No key goes where it does not belong, or into an error message."""

from __future__ import annotations

import ipaddress
import os
from typing import Any, Final

import httpx

from flatshare.errors import SettingsError
from flatshare_registry.errors import InvalidInput, Unavailable

__all__ = ["NobodyListens", "send", "shown", "without_key"]

PROXY_VARIABLES: Final = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")
SHORTEST_KEY: Final = 8
"""Fewest characters of a key. Shorter text is not a key, and would be found in many ordinary words."""


class NobodyListens(Unavailable):
    """The connection was refused: there is no platform at this address."""


def send(
    method: str, url: str, *, timeout_s: float, headers: dict[str, str], **options: Any
) -> httpx.Response:
    """Send one request and take what comes back; redirects are not followed.

    Parameters
    ----------
    **options
        As ``httpx.Client.request`` has them.

    Raises
    ------
    InvalidInput
        The URL is not ``http://`` or ``https://`` with a host, or has a password in it.
    SettingsError
        The environment names a proxy that can't be used.
    Unavailable, NobodyListens
        There was no answer.
    """
    target = _parsed(url)
    try:
        client = _client(target)
    # httpx names a proxy's URL, which often has a password in it.
    except (ImportError, ValueError, httpx.InvalidURL):
        names = ", ".join(name for name in PROXY_VARIABLES if os.environ.get(name))
        raise SettingsError(
            f"{names}: this is no proxy that can be used; write http://host:port, and in NO_PROXY hosts with "
            "commas between (socks5:// needs: pip install 'httpx[socks]')"
        ) from None
    with client:
        try:
            return client.request(method, target, timeout=timeout_s, headers=headers, **options)
        # Their texts hold the header or the URL that was wrong.
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError, UnicodeError) as error:
            raise InvalidInput(f"{shown(url)} can't be asked: {type(error).__name__}") from None
        except httpx.TransportError as error:
            reason = without_key(str(error) or type(error).__name__, headers)
            kind = NobodyListens if _was_refused(error) else Unavailable
            raise kind(
                f"nothing answers at {shown(url)}: {reason}; is the platform up? (flatshare up)"
            ) from None


def shown(url: str) -> str:
    """A URL for people: without user and password."""
    scheme, slashes, rest = url.partition("://")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}"[:200] if slashes else url.rpartition("@")[2][:200]


def without_key(text: str, headers: dict[str, str]) -> str:
    """A text without the key of these headers, whoever put it there."""
    key = headers.get("authorization", "").removeprefix("Bearer ")
    return text.replace(key, "[the key]") if len(key) >= SHORTEST_KEY else text


def _parsed(url: str) -> httpx.URL:
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):
        target = httpx.URL()
    if target.scheme not in ("http", "https") or not target.host:
        raise InvalidInput(
            f"{shown(url)!a} is not a URL of a platform; write http://host:port or https://host"
        )
    if target.userinfo:  # httpx would show it in place of the key
        raise InvalidInput(
            f"{shown(url)}: no user and password in the URL of a platform; keys are FLATSHARE_API_KEY"
        )
    return target


def _client(target: httpx.URL) -> httpx.Client:
    """A client that may use the environment's proxy for TLS to other machines, and for nothing else.

    Without encryption the proxy would see the key; and loopback, as the proxy sees it, is another machine's.
    """
    if target.scheme == "https" and not _is_loopback(target.host):
        return httpx.Client()
    # With a transport of its own a client uses no proxy; SSL_CERT_FILE still applies.
    return httpx.Client(transport=httpx.HTTPTransport(verify=target.scheme == "https"))


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def _was_refused(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False
