"""Ports for servers that bind them later."""

import socket
from pathlib import Path

import pytest

from flatshare_registry.testing import ports
from flatshare_registry.testing.ports import free_ports


def test_they_differ_can_be_bound_and_are_none_that_the_kernel_gives_away() -> None:
    found = free_ports(5)
    assert len(set(found)) == 5
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(found) < first_ephemeral
    for port in found:
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_a_taken_port_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = free_ports(2)
    monkeypatch.setattr(ports, "_CANDIDATES", range(min(one, other), max(one, other) + 1, abs(one - other)))
    with socket.create_server(("127.0.0.1", one)):
        assert free_ports(1) == [other]
        with pytest.raises(OSError, match="no 2 free ports"):
            free_ports(2)
