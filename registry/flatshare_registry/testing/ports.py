"""Free ports for servers of tests, of the demo and of benchmarks, which bind them seconds later."""

import contextlib
import random
import socket

__all__ = ["free_ports"]

_CANDIDATES = range(20_000, 29_000)
"""Below the kernel's ephemeral ports (Linux: from 32768) and apart from those that Ray takes by itself (its
workers' from 10002, its replicas' from 30000)."""


def free_ports(count: int) -> list[int]:
    """Ports on loopback, all different, on which nobody listens now.

    For port 0 the kernel would choose a port, and soon give it to another connection or listener too: a
    server that binds it seconds later, when Ray has started, may find it taken. The kernel gives the ports
    chosen here only to those who name them.

    Raises
    ------
    OSError
        There are not that many free ports.
    """
    found: list[int] = []
    for port in random.sample(_CANDIDATES, len(_CANDIDATES)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports between {_CANDIDATES.start} and {_CANDIDATES.stop}")
