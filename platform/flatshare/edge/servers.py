"""HAProxy's servers at run time: what it has, what it should have, and the commands between the two.

Pure: text and values in, commands out. Commands are derived from what HAProxy says that it has, never from
what it was told before. So the next look repairs what a lost command, or an HAProxy that died between two
commands, left undone.

A server is a place of the ring (``placement.ring``), not a replica: a replacement changes the server's
address, and no model moves. The admin socket's commands are those of HAProxy 2.8 (``management.txt``, 9.3),
each used in ``tests/contract/test_haproxy_servers.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from flatshare.placement.ring import SERVER_WEIGHT, server_id

__all__ = [
    "CONTROL_CHECKS",
    "POOL_CHECKS",
    "RunningServer",
    "Server",
    "commands",
    "running_servers",
    "same",
    "server_name",
]

POOL_CHECKS: Final = (
    "check inter 1s fastinter 250ms fall 2 rise 1 observe layer4 error-limit 1 on-error mark-down "
    f"weight {SERVER_WEIGHT}"
)
"""How the pool's servers are watched; a server that is added does not inherit ``default-server``."""

CONTROL_CHECKS: Final = "check inter 2s fall 3 rise 1"

_MAINTENANCE: Final = 0x01
"""``SRV_ADMF_FMAINT`` of ``srv_admin_state``: put into maintenance by a command."""

_PREFIX: Final = "p"


def server_name(place: int) -> str:
    """What HAProxy calls a place."""
    return f"{_PREFIX}{place}"


@dataclass(frozen=True, slots=True, order=True)
class Server:
    """Where the replica of one place listens."""

    place: int
    host: str
    port: int

    @property
    def name(self) -> str:
        """What HAProxy calls it."""
        return server_name(self.place)

    @property
    def line(self) -> str:
        """Name, address and id, as the configuration file and ``add server`` take them."""
        return f"{self.name} {_address(self)} id {server_id(self.place)}"


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server as HAProxy has it.

    Attributes
    ----------
    resting
        In maintenance: takes no new request.
    """

    server: Server
    resting: bool


def running_servers(state: str) -> list[RunningServer]:
    """What ``show servers state BACKEND`` says; the fallback is left out."""
    found = []
    columns: list[str] = []
    for line in state.splitlines():
        if line.startswith("# "):
            columns = line[2:].split()
            continue
        row = dict(zip(columns, line.split(), strict=False))
        number = row.get("srv_name", "").removeprefix(_PREFIX)
        if row.get("srv_name", "").startswith(_PREFIX) and number.isdigit():
            server = Server(int(number), row["srv_addr"], int(row["srv_port"]))
            found.append(RunningServer(server, bool(int(row["srv_admin_state"]) & _MAINTENANCE)))
    return found


def commands(
    backend: str, running: Sequence[RunningServer], wanted: Iterable[Server], checks: str
) -> list[str]:
    """What to tell HAProxy so that a backend has these servers.

    A server that is no longer wanted is first put into maintenance, so that its requests end. It is deleted
    when nothing is connected to it: until then HAProxy refuses, and the next look asks again.
    """
    by_place = {one.server.place: one for one in running}
    told: list[str] = []
    kept = set()
    for server in sorted(wanted):
        kept.add(server.place)
        name = f"{backend}/{server.name}"
        known = by_place.get(server.place)
        if known is None:
            told += [
                f"add server {name} {_address(server)} id {server_id(server.place)} {checks}",
                f"enable server {name}",
                f"enable health {name}",
            ]
            continue
        if known.server != server:
            told.append(f"set server {name} addr {server.host} port {server.port}")
        if known.resting:
            told.append(f"set server {name} state ready")
    for one in running:
        if one.server.place not in kept:
            name = f"{backend}/{one.server.name}"
            if not one.resting:
                told.append(f"set server {name} state maint")
            told.append(f"del server {name}")
    return told


def same(running: Iterable[RunningServer], wanted: Iterable[Server]) -> bool:
    """Whether a backend serves exactly what it should; a server in maintenance does not count."""
    return {one.server for one in running if not one.resting} == set(wanted)


def _address(server: Server) -> str:
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"{host}:{server.port}"
