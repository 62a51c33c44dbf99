"""What ``up`` writes down so that other commands find the platform, and ``down`` ends just that."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from flatshare.errors import LocalError
from flatshare.local.processes import Process, same_process, wait_until_ended
from flatshare.settings import Settings

__all__ = ["PlatformState", "find_states", "known_states", "state_folder", "url_of"]


def state_folder() -> Path:
    """Where state is kept: ``$XDG_STATE_HOME/flatshare``, by default ``~/.local/state/flatshare``.

    Raises
    ------
    LocalError
        This user has no home folder.
    """
    base = os.environ.get("XDG_STATE_HOME", "")
    if base:
        return Path(base) / "flatshare"
    try:
        return Path.home() / ".local" / "state" / "flatshare"
    except RuntimeError as error:  # no HOME, and no entry in /etc/passwd: a bare container
        raise LocalError(
            "there is no folder to keep state in: set XDG_STATE_HOME, or HOME, to one of yours"
        ) from error


@dataclass(frozen=True, slots=True)
class PlatformState:
    """One platform that runs, or is about to.

    Attributes
    ----------
    pid, started_at
        Of the ``up`` process; both must match before anything is ended, because ids are used again.
    url
        Where the edge listens.
    log
        The log file of a detached ``up``; empty in the foreground.
    family
        All that ``up`` had started when this was written.
    phase
        ``starting`` from before anything is started until everything answers.
    """

    pid: int
    started_at: float
    url: str
    port: int
    edge: str
    store: str
    replicas: int
    slots: int
    log: str
    ray_address: str
    family: tuple[Process, ...]
    phase: Literal["starting", "running"] = "running"

    @classmethod
    def starting(cls, settings: Settings, log: str) -> PlatformState:
        """Of this process, which is about to start a platform."""
        return cls(
            phase="starting",
            pid=os.getpid(),
            started_at=psutil.Process().create_time(),
            url=url_of(settings),
            port=settings.port,
            edge=settings.edge,
            store=settings.store,
            replicas=settings.replicas,
            slots=settings.slots,
            log=log,
            ray_address="",
            family=(),
        )

    @staticmethod
    def path(port: int) -> Path:
        """The state file of the platform on this port."""
        return state_folder() / f"platform-{port}.json"

    def claim(self) -> None:
        """Write it where there is none: of several starters one gets the port. Ends what a dead one left.

        Raises
        ------
        LocalError
            Another one runs there, or starts.
        """
        with _folder_locked():
            self._make_way(self.port)
            self.save()

    @classmethod
    def make_way(cls, port: int) -> None:
        """End what a dead platform left behind on a port.

        Raises
        ------
        LocalError
            It is alive; says how to end it.
        """
        with _folder_locked():
            cls._make_way(port)

    @classmethod
    def _make_way(cls, port: int) -> None:
        other = cls.read(port)
        if other is None:
            return
        if other.process() is None:
            other.end_leftovers()
            return
        does = "runs" if other.phase == "running" else "is starting"
        raise LocalError(
            f"flatshare already {does} on port {port} (pid {other.pid}); flatshare down --port {port} ends it"
        )

    def save(self) -> None:
        """Write it, whole or not at all."""
        path = self.path(self.port)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(self.text())
        draft.replace(path)

    @classmethod
    def parse(cls, text: str) -> PlatformState:
        """From the JSON that :meth:`text` made; raises ``ValueError`` or ``TypeError`` for anything else."""
        document = json.loads(text)
        family = tuple((int(pid), float(started_at)) for pid, started_at in document.pop("family"))
        return cls(**document, family=family)

    def text(self) -> str:
        """JSON, on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, port: int) -> PlatformState | None:
        """What was written of the platform on this port, alive or dead.

        Raises
        ------
        LocalError
            The file is damaged.
        """
        path = cls.path(port)
        try:
            return cls.parse(path.read_text())
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LocalError(f"{path} is damaged; remove it") from error

    @classmethod
    def load(cls, port: int) -> PlatformState | None:
        """The platform on this port, if it is alive."""
        state = cls.read(port)
        return state if state is not None and state.process() is not None else None

    def process(self) -> psutil.Process | None:
        """The ``up`` process, if it is still that process."""
        return same_process(self.pid, self.started_at)

    def end_leftovers(self) -> list[str]:
        """End what a killed ``up`` left behind and forget it; names of what was ended.

        HAProxy and Ray's daemons end with ``up`` by themselves; two agents of Ray do not.
        """
        found = [same_process(pid, started_at) for pid, started_at in self.family]
        alive = [process for process in found if process is not None]
        names = []
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                names.append(process.name())
                process.terminate()
        for process in wait_until_ended(alive, 5):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.remove()
        return names

    def remove(self) -> None:
        """Forget it, unless another one is written down there by now."""
        with contextlib.suppress(LocalError):
            now = self.read(self.port)
            if now is not None and (now.pid, now.started_at) == (self.pid, self.started_at):
                self.path(self.port).unlink(missing_ok=True)


def url_of(settings: Settings) -> str:
    """Where clients on this machine reach the edge."""
    everywhere = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104  # nothing listens here
    host = everywhere.get(settings.host, f"[{settings.host}]" if ":" in settings.host else settings.host)
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{settings.port}"


def find_states() -> list[PlatformState]:
    """All platforms that run on this machine for this user; none where there is no folder for state."""
    if not _has_folder():  # a client without a home needs none: a platform elsewhere is named by its URL
        return []
    return [state for state in known_states() if state.phase == "running" and state.process() is not None]


def known_states() -> list[PlatformState]:
    """All that was written down for this user: running, starting, or dead."""
    ports = [
        int(path.stem.removeprefix("platform-"))
        for path in sorted(state_folder().glob("platform-*.json"))
        if path.stem.removeprefix("platform-").isdigit()
    ]
    return [state for port in ports if (state := PlatformState.read(port)) is not None]


def _has_folder() -> bool:
    try:
        state_folder()
    except LocalError:
        return False
    return True


@contextlib.contextmanager
def _folder_locked() -> Iterator[None]:
    """One process at a time; the kernel lets go of the lock when it dies."""
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
