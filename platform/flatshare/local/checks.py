"""What ``up`` checks before it starts anything: ports, the certificate, open files, the host tier.

Otherwise each problem would show only after Ray's start, in the words of another program. Imports no ray.
"""

from __future__ import annotations

import errno
import resource
import socket
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from flatshare.errors import LocalError, SettingsError
from flatshare.settings import Settings
from flatshare.telemetry.exporting import need_sdk
from flatshare.weights.host_place import demand_host_tier, host_tier_folder

__all__ = ["affordable_connections", "check_edge", "check_machine"]

MAX_CONNECTIONS: Final = 4096
"""Most connections of clients that the edge takes at a time."""

MIN_CONNECTIONS: Final = 256
"""With room for fewer the edge does not start."""

OTHER_FILES: Final = 256
"""Files that HAProxy opens beside connections: listeners, sockets of its own, one check for each server."""

MAX_SOCKET_PATH: Final = 80
"""Longest folder for HAProxy's sockets: Linux takes paths of 107 bytes, and HAProxy adds to them."""

Warn = Callable[[str], None]
"""Called with what is not as it should be, but does not keep the platform from starting."""


def check_machine(settings: Settings, warn: Warn) -> None:
    """See that a platform with these settings can start here.

    Raises
    ------
    LocalError
        Something on this machine is in the way; says what, and what to do.
    SettingsError
        A setting names something that can't be used.
    """
    if settings.edge == "haproxy":
        check_edge(settings, warn)
        check_port("serve_port", "127.0.0.1", settings.serve_port)
    else:
        check_port("port", settings.host, settings.port)
    check_host_tier(settings, warn)


def check_edge(settings: Settings, warn: Warn) -> None:
    """See that HAProxy can start here.

    Raises
    ------
    LocalError
        Something on this machine is in the way.
    SettingsError
        The certificate can't be used, or nothing here exports traces.
    """
    check_certificate(settings.tls_cert)
    if settings.traces != "off":
        need_sdk()
    check_socket_folder(Path(tempfile.gettempdir()))
    room = affordable_connections(settings.most_replicas)
    if room < MAX_CONNECTIONS:
        warn(
            f"the limit of {_hard_limit()} open files (ulimit -Hn) leaves the edge room for {room} "
            f"connections instead of {MAX_CONNECTIONS}"
        )
    check_port("port", settings.host, settings.port)


def check_port(name: str, host: str, port: int) -> None:
    """See that a port is free.

    Parameters
    ----------
    name
        Of the setting that chooses it.

    Raises
    ------
    LocalError
        It is taken, or this user may not listen there.
    SettingsError
        The host is not an address or a known name.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"host: {host!a} is not an address or a known name") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise LocalError(_why_no_port(error, name, host, port)) from error


def _why_no_port(error: OSError, name: str, host: str, port: int) -> str:
    option = f"--{name.replace('_', '-')}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} needs privilege on this machine; choose one from 1024 on with {option}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine; choose another with --host"
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken; end what listens there, or choose another with {option}"
    return f"port {port} on {host}: {error.strerror}; choose another with {option}"


def check_certificate(path: str) -> None:
    """See that a PEM file holds a certificate and the private key that belongs to it.

    Parameters
    ----------
    path
        Empty for none.

    Raises
    ------
    SettingsError
        It does not; says what is missing.
    """
    if not path:
        return

    def no_passphrase() -> str:
        raise SettingsError(f"tls_cert: the key in {path} asks for a passphrase; HAProxy can't give one")

    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"tls_cert: {path}: {error.strerror}") from error
    if b"-----BEGIN CERTIFICATE-----" not in text:
        raise SettingsError(f"tls_cert: there is no certificate in {path} (PEM, the key in the same file)")
    if b"PRIVATE KEY-----" not in text:
        raise SettingsError(f"tls_cert: there is no private key in {path}; append it to the certificate")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path, password=no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError(
                f"tls_cert: the private key in {path} does not belong to its first certificate"
            ) from error
        raise SettingsError(f"tls_cert: {path} is damaged ({error.reason or error})") from error


def check_socket_folder(folder: Path) -> None:
    """See that HAProxy's sockets can be made below a folder.

    Raises
    ------
    LocalError
        Its path is too long for a socket, or holds what HAProxy can't read.
    """
    text = str(folder)
    if len(text.encode()) > MAX_SOCKET_PATH or any(not one.isprintable() or one in ",$" for one in text):
        raise LocalError(
            f"HAProxy can't have its sockets in {text!a}: set TMPDIR to a folder whose path is shorter than "
            f"{MAX_SOCKET_PATH} bytes and has no comma and no $"
        )


def affordable_connections(replicas: int) -> int:
    """Connections that the edge takes at a time: each needs two files, and a process may open only so many.

    Raises
    ------
    LocalError
        They are too few to be of use.
    """
    limit = _hard_limit()
    other = OTHER_FILES + 2 * replicas
    room = min(MAX_CONNECTIONS, (limit - other) // 2)
    if room < MIN_CONNECTIONS:
        raise LocalError(
            f"a process may open only {limit} files here (ulimit -Hn); the edge needs "
            f"{2 * MIN_CONNECTIONS + other}: raise it with ulimit -n, LimitNOFILE or --ulimit nofile"
        )
    return room


def _hard_limit() -> int:
    """Files that a process may open when it asks for all of them, as HAProxy does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if hard == resource.RLIM_INFINITY else hard


def check_host_tier(settings: Settings, warn: Warn) -> None:
    """See that the host tier's folder can be used, as every replica of this machine will.

    Raises
    ------
    SettingsError
        It was named, and can't be used.
    """
    try:
        demand_host_tier(settings.host_dir, settings.host_bytes)
    except OSError as error:
        reason = f"no host tier in {host_tier_folder(settings.host_dir)}: {error.strerror or error}"
        if settings.host_dir != "auto":
            raise SettingsError(f"host_dir: {reason}; choose another folder, or off") from error
        warn(f"{reason}; every load will come from the store")
