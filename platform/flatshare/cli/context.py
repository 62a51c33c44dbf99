"""What most commands need: settings, the registry, a running platform's address."""

from __future__ import annotations

import functools
import getpass
import importlib.util
from dataclasses import dataclass
from typing import Annotated, Any, Final

import httpx
import typer

from flatshare.cli.answers import About, Fleet, Problem, Refreshed, not_ours, parsed
from flatshare.cli.errors import NotTold
from flatshare.cli.web import NobodyListens, send, shown, without_key
from flatshare.errors import (
    BadInput,
    Forbidden,
    OtherStore,
    OverQuota,
    ServeError,
    SettingsError,
    Unauthenticated,
)
from flatshare.models.architecture import Architecture
from flatshare.settings import load_settings
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import InvalidInput, NotFound, RegistryError, Unavailable
from flatshare_registry.identity import STORE_HEADER, ensure_identity
from flatshare_registry.registration import Probe
from flatshare_registry.stores.base import BlobStore

__all__ = [
    "Platform",
    "StoreOption",
    "Told",
    "UrlOption",
    "call",
    "credentials",
    "find_platform",
    "need_mnist",
    "need_serve_extra",
    "open_registry",
    "platform_url",
    "probe_of",
    "registry_for_change",
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

CLIENT_TIMEOUT_S: Final = 60.0
LATER: Final = "replicas see it within seconds (FLATSHARE_VIEW_TTL_S)"
MAYBE_OURS: Final = frozenset({401, 403, 407, 429})
"""What a gateway in front of a platform may answer to whoever shows no key."""


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
    return Registry(settings.open_store(), actor=actor_name())


def actor_name() -> str:
    """The name under which the command line changes something, for audit logs."""
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


def need_mnist() -> None:
    """Say what is missing, if this install serves but has no MNIST.

    Raises
    ------
    SettingsError
        The room is not there, or serving is not installed.
    """
    need_serve_extra()
    if importlib.util.find_spec("flatshare.mnist") is None:
        raise SettingsError("this command needs MNIST's digits: flatshare.mnist is not installed here")


@dataclass(frozen=True, slots=True)
class Platform:
    """A platform to talk to.

    Attributes
    ----------
    found
        It is known to run: it was started on this machine, and its process is alive.
    asked_for
        It runs here, or an option or the environment names it, or a key to show to it. Otherwise the address
        is a guess, and what answers there may not be ours.
    """

    url: str
    found: bool = False
    asked_for: bool = True


def find_platform(url: str | None) -> Platform:
    """The platform to talk to: the option's, else the one that runs here, else at the default port.

    Raises
    ------
    SettingsError
        Several run here, and none is named.
    """
    states: list[Any] = []
    if importlib.util.find_spec("psutil") is not None:
        from flatshare.local.state import find_states

        states = find_states()
    if url:
        address = url.rstrip("/")
        return Platform(address, found=any(state.url == address for state in states))
    if len(states) > 1:
        urls = ", ".join(state.url for state in states)
        raise SettingsError(f"several platforms run here ({urls}); choose one with --url")
    if states:
        return Platform(states[0].url, found=True)
    settings = load_settings()
    return Platform(f"http://127.0.0.1:{settings.port}", asked_for=bool(settings.api_key.get_secret_value()))


def platform_url(url: str | None) -> str:
    """The address of :func:`find_platform`."""
    return find_platform(url).url


def call(method: str, url: str, **options: Any) -> httpx.Response:
    """One request to a running platform; its errors come back as ours.

    Raises
    ------
    Unavailable
        Nobody answers there, or it says to try again.
    NotFound, BadInput, ServeError
        What it answered.
    InvalidInput
        What answered is not a platform, or redirects us.
    """
    headers = {**credentials(url), **options.pop("headers", {})}
    timeout_s = options.pop("timeout", CLIENT_TIMEOUT_S)
    reply = send(method, url, timeout_s=timeout_s, headers=headers, **options)
    if 300 <= reply.status_code < 400:
        target = shown(reply.headers.get("location", "elsewhere"))
        raise not_ours(reply, f"a redirect to {target}, which is not followed: a key is shown where you say")
    if reply.status_code < 400:
        return reply
    problem_code = ""
    try:
        problem = parsed(reply, Problem)["error"]
        problem_code = problem["code"]
        text = without_key(f"{problem['message']} (request {problem['request_id']})", headers)
    except InvalidInput as error:
        # A proxy on the way may answer for a platform that is gone; what else is not in our form is not ours.
        if reply.status_code < 500 and reply.status_code != httpx.codes.TOO_MANY_REQUESTS:
            raise error from None
        text = f"{shown(url)} answered {reply.status_code}"
    if reply.status_code == 401:
        raise Unauthenticated(f"{text}; set FLATSHARE_API_KEY (flatshare keys create makes one)")
    if reply.status_code == 403:
        raise Forbidden(text)
    if reply.status_code == 404:
        raise NotFound(text)
    if problem_code == "other_store":
        raise OtherStore(text)
    if reply.status_code == 429:
        raise OverQuota(text)
    if reply.status_code in (502, 503, 504):
        raise Unavailable(text)
    raise (BadInput if reply.status_code < 500 else ServeError)(text)


def credentials(url: str) -> dict[str, str]:
    """What to show to a platform: ``FLATSHARE_API_KEY``; to one that this user runs here, its admin key.

    The admin key goes nowhere else, whatever ``--url`` says.

    Raises
    ------
    SettingsError
        The key has a character that no header takes.
    """
    settings = load_settings()
    key = settings.api_key.get_secret_value()
    if not key and importlib.util.find_spec("psutil") is not None:
        from flatshare.local.keys import key_file, read_key
        from flatshare.local.state import find_states

        own = any(url == state.url or url.startswith(f"{state.url}/") for state in find_states())
        key = settings.admin_key.get_secret_value() if own else ""
        if own and not key:
            key = read_key("admin") or ""
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise SettingsError(
                    f"{key_file('admin')} does not hold a key; remove it to have a new one made"
                )
    return {"authorization": f"Bearer {key}"} if key else {}


def probe_of(network: Architecture) -> Probe | None:
    """What a registration runs the weights with: needs torch, so a light install registers without."""
    if importlib.util.find_spec("torch") is None:
        return None
    from flatshare.models.probe import probe_logits

    return functools.partial(probe_logits, network)


# -- changes: made in the store, then told to a running platform


def registry_for_change(store: str | None, url: str | None) -> Registry:
    """The registry, for a change, after a check that ``url`` is a platform's, or that nothing answers there.

    Raises
    ------
    SettingsError
        No store is named, or a setting is wrong.
    InvalidInput
        Something else answers at ``url``. Nothing was changed.
    """
    registry = open_registry(store)
    if url:
        _refuse_strangers(url.rstrip("/"), registry)
    return registry


def _refuse_strangers(base: str, registry: Registry) -> None:
    """Raise when what answers at an address is not a platform, or is one of another store. Show it no
    key.
    """
    try:
        reply = send("GET", f"{base}/admin/openapi.json", timeout_s=CLIENT_TIMEOUT_S, headers={})
    except Unavailable:  # down, or not reached: whoever tells it of the change says so
        return
    if reply.status_code in MAYBE_OURS or reply.status_code >= 500:
        return
    try:
        if reply.status_code == httpx.codes.OK:
            title = parsed(reply, About)["info"]["title"]
            if title == "flatshare control plane":
                serves = reply.headers.get(STORE_HEADER)
                if serves is None or serves == ensure_identity(registry.store):
                    return
                raise InvalidInput(f"the platform at {shown(base)} serves another store.")
            raise not_ours(reply, f"it is {title[:80]!a}")
        raise not_ours(reply, "it has no control plane")
    except InvalidInput as error:
        raise InvalidInput(f"{error.message} Nothing was changed.") from None


@dataclass(frozen=True, slots=True)
class Told:
    """The result of telling a running platform about a change that was made in the store.

    Attributes
    ----------
    text
        For the line that says what was changed.
    failure
        Why a platform that runs, or should, was not told; None when it was, and when there is none.
    """

    text: str
    failure: str | None = None

    def __str__(self) -> str:
        """The text."""
        return self.text

    def check(self) -> None:
        """Raise if a platform was not told; call it after the change itself was reported.

        Raises
        ------
        NotTold
            A platform should have been told and was not.
        """
        if self.failure is not None:
            raise NotTold(f"the change stands in the store, but {self.failure}; {LATER}")


def about(store: BlobStore) -> dict[str, str]:
    """A header for calls that change something: which store they are about.

    Raises
    ------
    UnfitStore, Unavailable
        The store has no identity yet, and can't be given one.
    """
    return {STORE_HEADER: ensure_identity(store)}


def own_store() -> dict[str, str]:
    """As :func:`about`, of the store that the environment names, if it names one."""
    settings = load_settings()
    return about(settings.open_store()) if settings.store else {}


def tell_replicas(registry: Registry, tenant: str, url: str | None) -> Told:
    """After a change in the store: have a running platform see it at once; says how it went. Never fails.

    A platform of another store is not told, and accepts nothing from us: its tenant of the same name is
    another tenant.
    """
    try:
        platform = find_platform(url)
    except (RegistryError, ServeError) as error:  # several run here
        return Told("no platform was told", f"no platform was told: {error.message}")
    base = platform.url
    try:
        route = f"{base}/admin/tenants/{tenant}/refresh"
        reply = call("POST", route, headers=about(registry.store))
        refreshed = parsed(reply, Refreshed)["refreshed"]
        if refreshed or (replicas := _replicas(base)) == 0:
            return Told(f"{len(refreshed)} replicas see it now")
    except OtherStore as error:
        text = f"no platform of this store was told: the one at {shown(base)} serves another"
        return Told(f"{text}; {LATER}", f"{text} ({error.message})" if url else None)
    except (RegistryError, ServeError) as error:
        nobody = isinstance(error, NobodyListens) and not platform.found
        if nobody or not platform.asked_for:
            if nobody:
                return Told(
                    "no platform runs here to be told; one that starts, or runs elsewhere, sees it by itself"
                )
            return Told(f"no running platform was told ({error.message}); {LATER}")
        return Told(
            "the platform was not told", f"the platform at {shown(base)} was not told: {error.message}"
        )
    of = "no replica" if replicas is None else f"none of {replicas} replicas"
    return Told(f"{of} took it up", f"{of} of the platform at {shown(base)} took it up")


def _replicas(base: str) -> int | None:
    """How many replicas a platform has; None when this key may not ask."""
    try:
        fleet = parsed(call("GET", f"{base}/admin/replicas"), Fleet)
    except (RegistryError, ServeError):
        return None
    return len(fleet["replicas"]) + len(fleet["not_answering"])
