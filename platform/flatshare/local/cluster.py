"""The Ray cluster under a platform: a running one, after a check that it lets us in, or one of our own.

Imports ray, so it must be imported only after ``pool.environment.prepare``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil
import ray

from flatshare.errors import LocalError
from flatshare.local.private_file import private_folder

__all__ = ["joined_cluster", "ray_cluster", "reachable_cluster"]

logger = logging.getLogger("flatshare.local")

ANSWER_TIMEOUT_S: Final = 10
"""Seconds that a cluster has to let us in."""

IMPORT_TIMEOUT_S: Final = 60
"""Seconds that importing ray may take besides, on a busy machine."""

OBJECT_STORE_BYTES: Final = 128 * 1024**2
"""Ray's object store on a cluster that we start: nothing large goes through it."""

QUIET: Final[dict[str, Any]] = {"log_to_driver": False, "logging_level": logging.ERROR}


@contextlib.contextmanager
def ray_cluster(wanted: str, environment: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """Connect to the cluster at an address, or to one of our own; yields its address, and whether it is ours.

    Parameters
    ----------
    wanted
        ``auto``: a running cluster, else one of our own. ``local``: always one of our own. Else an address.
    environment
        For all processes of an existing cluster that run our code.

    Raises
    ------
    LocalError
        There is no such cluster, or it does not let us in.
    """
    address = None if wanted == "local" else reachable_cluster(wanted)
    if address is None:
        with own_cluster() as address:
            yield address, True
        return
    with _signals_kept():
        _join(address, runtime_env={"env_vars": environment}, namespace="flatshare")
    try:
        yield address, False
    finally:
        ray.shutdown()


@contextlib.contextmanager
def joined_cluster(wanted: str) -> Iterator[str]:
    """Connect to a cluster that runs already; yields its address.

    Raises
    ------
    LocalError
        There is none, or it does not let us in.
    """
    address = reachable_cluster(wanted)
    if address is None:
        raise LocalError("there is no Ray cluster on this machine; start a platform with: flatshare up")
    with _signals_kept():
        _join(address)
    try:
        yield address
    finally:
        ray.shutdown()


@contextlib.contextmanager
def own_cluster() -> Iterator[str]:
    """A cluster that ends with the block; its address."""
    cores = os.cpu_count() or 1
    context: Any = None
    try:
        with _signals_kept():
            context = ray.init(
                address="local",
                # A count for scheduling: replicas ask for one each, whatever the machine has.
                num_cpus=max(cores, 64),
                _temp_dir=str(_ray_folder()),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                namespace="flatshare",
                **QUIET,
            )
        yield str(context.address_info["gcs_address"])
    finally:
        children = psutil.Process().children(recursive=True)
        ray.shutdown()
        _end_leftovers(children, told=context is not None)


def _ray_folder() -> Path:
    """Where Ray keeps sockets, logs and code of a cluster of ours.

    Everybody can write to Ray's own choice, ``/tmp/ray``, and to all that Ray makes in it: another user of
    the machine could put a socket where the next worker looks for its raylet. Ray opens up the folder that it
    is given, so that folder lies inside another, which Ray leaves alone. The path is short: a socket's name
    has 107 characters.

    Raises
    ------
    LocalError
        The folder is somebody else's.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    return private_folder(base / f"flatshare-ray-{os.getuid()}") / "ray"


def reachable_cluster(wanted: str) -> str | None:
    """The address of a running cluster that lets us in; None when ``auto`` finds none.

    Raises
    ------
    LocalError
        It does not answer in time, is of another version, or asks for what we do not have.
    """
    command = [sys.executable, "-m", "flatshare.local.cluster_probe", wanted, str(ANSWER_TIMEOUT_S)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as probe:
        try:
            said = probe.communicate(timeout=IMPORT_TIMEOUT_S + ANSWER_TIMEOUT_S)[0]
        except subprocess.TimeoutExpired:
            probe.kill()
            said = probe.communicate()[0]
        except BaseException:  # Ctrl-C, SIGTERM
            probe.kill()
            raise
    found: dict[str, Any] = {}
    for line in said.splitlines():
        if line.startswith(b"{"):
            found |= json.loads(line)
    address = found.get("address")
    if found.get("joined"):
        return str(address)
    if found and address is None and "problem" not in found:
        return None
    if found.get("nobody") and wanted == "auto" and not os.environ.get("RAY_ADDRESS"):
        logger.warning("Ray's address file names %s, where nobody listens; starting a cluster", address)
        return None
    problem = found.get("problem") or (
        f"no answer within {ANSWER_TIMEOUT_S} s (does it ask for a token? RAY_AUTH_TOKEN_PATH)"
    )
    where = wanted if address in (None, wanted) else f"{wanted} ({address})"
    raise LocalError(
        f"the Ray cluster at {where} can't be joined: {problem}; --ray local starts one of our own"
    )


def _join(address: str, **options: Any) -> None:
    try:
        ray.init(address=address, **options, **QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:  # it answered a moment ago
        raise LocalError(f"the Ray cluster at {address} went away: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep our signal handlers: ``ray.init`` installs its own, which ends the process where it stands."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_leftovers(children: list[psutil.Process], *, told: bool) -> None:
    """Wait until Ray's own processes have ended, and kill those that do not.

    Parameters
    ----------
    told
        Whether Ray told them to end; one that was stopped while it started does not know them all.
    """
    for process in () if told else children:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(children, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            logger.warning("killing %s (%d), which outlived Ray", process.name(), process.pid)
            process.kill()
    psutil.wait_procs(alive, timeout=5)
