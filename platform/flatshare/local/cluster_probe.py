"""Run as a program: whether there is a Ray cluster, and whether it lets this process in.

If a cluster does not answer, Ray keeps asking for minutes, in C++ code that handles no signal. A separate
process can be ended at any time, also by an alarm of its own, which needs no help from others.

    python -m flatshare.local.cluster_probe ADDRESS SECONDS

prints one JSON object a line: ``{"address": "host:port"}`` (null: none was found), then ``{"joined": true}``
or ``{"problem": "..."}``.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
from typing import Any, Final

CONNECT_TIMEOUT_S: Final = 3.0


def main() -> None:
    """Find it, connect to it, and say how that went."""
    wanted, seconds = sys.argv[1], int(sys.argv[2])

    import ray
    from ray._private.services import canonicalize_bootstrap_address  # tests/contract holds what we rely on

    signal.alarm(seconds)  # from here on: importing ray takes what this machine takes
    try:
        address = canonicalize_bootstrap_address(wanted)
    except ConnectionError:
        address = None  # auto, and there is none
    except ValueError:
        _say(problem="not an address: host:port, auto or local")
        return
    _say(address=address)
    if address is None:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        _say(nobody=True, problem=f"nobody listens there ({error})")
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # whatever Ray says: the parent shows it
        _say(problem=" ".join(str(error).split()) or type(error).__name__)
        return
    _say(joined=True)
    ray.shutdown()


def _say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
