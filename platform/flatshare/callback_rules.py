"""Where callbacks of tasks may go: hosts and origins that the operator allows, and public addresses."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from flatshare.errors import BadInput

__all__ = ["CallbackRules", "is_public"]

MOST_URL: Final = 2000

_INTERNET: Final = ipaddress.IPv6Network("2000::/3")
"""All of IPv6 that is given out as global unicast; translations of IPv4 (64:ff9b::) are outside of it."""

_NOT_THERE: Final = tuple(map(ipaddress.ip_network, ("2001::/23", "2002::/16", "3fff::/20")))
"""Parts of it that hold an IPv4 address which somebody on the way connects to, or that are for documents."""

_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)


@dataclass(frozen=True, slots=True)
class CallbackRules:
    """Where callbacks may go.

    Attributes
    ----------
    hosts
        ``hooks.acme.com``; ``*.acme.com``, any name below it; ``*``, any name.
    origins
        ``http://10.0.0.5:8080``: the operator vouches for it, so neither https nor a public address is
        needed.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> CallbackRules:
        """From a setting: hosts and origins, with commas between.

        Raises
        ------
        ValueError
            One is neither.
        """
        hosts, origins = set(), set()
        for part in filter(None, (part.strip().lower() for part in text.split(","))):
            if "://" in part:
                if _origin(part) != part.rstrip("/"):
                    raise ValueError(
                        f"{part[:100]!a} is no origin: write scheme://host or scheme://host:port"
                    )
                origins.add(_origin(part))
            elif any(mark in part for mark in "/:@ ") or "*" in part.removeprefix("*"):
                raise ValueError(f"{part[:100]!a} is no host: write hooks.acme.com, *.acme.com or *")
            else:
                hosts.add(part)
        return cls(frozenset(hosts), frozenset(origins))

    def check(self, url: str) -> None:
        """Return if a callback may go there, as far as its text says.

        Raises
        ------
        BadInput
            It may not.
        """
        if not self.hosts and not self.origins:
            raise BadInput("no callbacks are sent here; FLATSHARE_TASKS_CALLBACK_HOSTS allows them")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise BadInput(f"the callback {url[:100]!a} is no URL") from None
        if len(url) > MOST_URL or not url.isascii() or not url.isprintable() or not parts.hostname:
            raise BadInput(f"the callback {url[:100]!a} is no URL of at most {MOST_URL} ASCII characters")
        if parts.username is not None or parts.password is not None:
            raise BadInput("a callback's URL holds no user or password; the message is signed")
        if self.is_origin(url):
            return
        if parts.scheme != "https" or port not in (None, 443):
            raise BadInput("a callback's URL begins with https:// and names no port")
        name = parts.hostname.removesuffix(".")
        if not _is_host(name):
            raise BadInput(f"the callback's host {name[:100]!a} is no name and no address")
        above = {"*." + rest for rest in _endings(name)}
        if not self.hosts & {"*", name, *above}:
            raise BadInput(f"callbacks to {name[:100]!a} are not allowed here")

    def is_origin(self, url: str) -> bool:
        """Whether an operator named this very origin."""
        return _origin(url) in self.origins


def _is_host(name: str) -> bool:
    labels = name.split(".")
    if ":" in name or labels[-1].isdigit():
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
    return len(name) <= 253 and all(map(_LABEL.fullmatch, labels))


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[number:]) for number in range(1, len(parts))]


def _origin(url: str) -> str:
    try:
        parts = urlsplit(url.lower())
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError:
        return ""
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        return ""
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}"


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, and not of this machine or its networks."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip not in _INTERNET or any(ip in network for network in _NOT_THERE):
            return False
    return ip.is_global and not ip.is_multicast
