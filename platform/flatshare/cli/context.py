"""What most commands need: settings, the registry, a running platform's address."""

from __future__ import annotations

import contextlib
import functools
import getpass
import importlib.util
from typing import Annotated, Any, Final

import httpx
import typer

from flatshare.errors import (
    BadInput,
    Forbidden,
    OverQuota,
    ServeError,
    SettingsError,
    Unauthenticated,
)
from flatshare.models.architecture import Architecture
from flatshare.settings import load_settings
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import AlreadyExists, InvalidInput, NotFound, RegistryError, Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.registration import Probe

__all__ = [
    "StoreOption",
    "UrlOption",
    "call",
    "credentials",
    "need_serve_extra",
    "open_registry",
    "platform_url",
    "tell_replicas",
]

StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Store URL: s3://bucket/prefix or file:///path.", envvar="FLATSHARE_STORE"),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url", help="A running platform; by default the one that `up` started here.", envvar="FLATSHARE_URL"
    ),
]

DEFAULT_URL: Final = "http://127.0.0.1:8000"
CLIENT_TIMEOUT_S: Final = 60.0


def open_registry(store: str | None) -> Registry:
    """The registry in the store that an option or the environment names.

    Raises
    ------
    SettingsError
        None is named.
    """
    settings = load_settings(store=store)
    if not settings.store:
        raise SettingsError("no store: set FLATSHARE_STORE or --store to s3://bucket/prefix or file:///path")
    return Registry(settings.open_store(), actor=_actor())


def _actor() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (OSError, KeyError):  # no such user in a bare container
        return "cli"


def need_serve_extra() -> None:
    """Say which extra to install, if serving is not installed.

    Raises
    ------
    SettingsError
        Ray or torch is missing.
    """
    missing = [name for name in ("ray", "torch", "fastapi") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"this command needs {', '.join(missing)}: install the serving extra, "
            "pip install 'flatshare[serve]'"
        )


def platform_url(url: str | None) -> str:
    """The platform to talk to: the option, else the one that runs here, else the default port."""
    if url:
        return url.rstrip("/")
    if importlib.util.find_spec("psutil") is not None:
        from flatshare.local.state import find_states

        states = find_states()
        if len(states) > 1:
            urls = ", ".join(state.url for state in states)
            raise SettingsError(f"several platforms run here ({urls}); choose one with --url")
        if states:
            return states[0].url
    return DEFAULT_URL


def call(method: str, url: str, **options: Any) -> httpx.Response:
    """One request to a running platform; its errors come back as ours.

    Raises
    ------
    Unavailable
        Nobody answers there, or it says to try again.
    NotFound, BadInput, ServeError
        What it answered.
    """
    headers = {**credentials(url), **options.pop("headers", {})}
    try:
        timeout_s = options.pop("timeout", CLIENT_TIMEOUT_S)
        reply = httpx.request(method, url, timeout=timeout_s, headers=headers, **options)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError, UnicodeError) as error:
        raise InvalidInput(f"{url[:80]!a} is not a URL of a platform: {error}") from error
    except httpx.TransportError as error:
        raise Unavailable(f"nothing answers at {url}: {error}; is the platform up? (flatshare up)") from error
    if reply.status_code < 400:
        return reply
    try:
        problem = reply.json()["error"]
        text = f"{problem['message']} (request {problem['request_id']})"
    except (ValueError, KeyError, TypeError):
        text = f"{url} answered {reply.status_code}"
    if reply.status_code == 401:
        raise Unauthenticated(f"{text}; set FLATSHARE_API_KEY (flatshare keys create makes one)")
    if reply.status_code == 403:
        raise Forbidden(text)
    if reply.status_code == 404:
        raise NotFound(text)
    if reply.status_code == 429:
        raise OverQuota(text)
    if reply.status_code in (502, 503, 504):
        raise Unavailable(text)
    raise (BadInput if reply.status_code < 500 else ServeError)(text)


def credentials(url: str) -> dict[str, str]:
    """What to show to a platform: ``FLATSHARE_API_KEY``; to one that this user runs here, its admin key.

    The admin key goes nowhere else, whatever ``--url`` says.
    """
    key = load_settings().api_key.get_secret_value()
    if not key and importlib.util.find_spec("psutil") is not None:
        from flatshare.local.keys import read_key
        from flatshare.local.state import find_states

        own = any(url == state.url or url.startswith(f"{state.url}/") for state in find_states())
        key = (load_settings().admin_key.get_secret_value() or read_key("admin") or "") if own else ""
    return {"authorization": f"Bearer {key}"} if key else {}


def ensure_tenant(registry: Registry, tenant: TenantId) -> None:
    """Create a tenant unless it exists: one conditional write, however many tenants there are."""
    with contextlib.suppress(AlreadyExists):
        registry.create_tenant(tenant)


def probe_of(network: Architecture) -> Probe | None:
    """What a registration runs the weights with: needs torch, so a light install registers without."""
    if importlib.util.find_spec("torch") is None:
        return None
    from flatshare.models.probe import probe_logits

    return functools.partial(probe_logits, network)


def tell_replicas(tenant: str, url: str | None) -> str:
    """After a change in the store: have a running platform see it at once; says how it went."""
    try:
        refreshed = call("POST", f"{platform_url(url)}/admin/tenants/{tenant}/refresh").json()["refreshed"]
    except (RegistryError, ServeError):  # the change stands, whatever the platform says or is called
        return "no running platform was told; replicas see it within their view's TTL"
    return f"{len(refreshed)} replicas see it now"
