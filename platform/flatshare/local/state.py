"""What ``up`` writes down so that other commands find the platform, and ``down`` ends just that."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from flatshare.errors import LocalError

__all__ = ["PlatformState", "find_states", "state_folder"]


def state_folder() -> Path:
    """Where state is kept: ``$XDG_STATE_HOME/flatshare``, by default ``~/.local/state/flatshare``."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base else Path.home() / ".local" / "state") / "flatshare"


@dataclass(frozen=True, slots=True)
class PlatformState:
    """One running platform.

    Attributes
    ----------
    pid, started_at
        Of the ``up`` process; both must match before anything is ended, because ids are used again.
    url
        Where the edge listens.
    log
        The log file of a detached ``up``; empty in the foreground.
    family
        Process id and start time of all that ``up`` had started when it was ready.
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
    family: tuple[tuple[int, float], ...]

    @staticmethod
    def path(port: int) -> Path:
        """The state file of the platform on this port."""
        return state_folder() / f"platform-{port}.json"

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
        return _same_process(self.pid, self.started_at)

    def end_leftovers(self) -> list[str]:
        """End what a killed ``up`` left behind and forget it; names of what was ended.

        HAProxy and Ray's daemons end with ``up`` by themselves; two agents of Ray do not.
        """
        found = [_same_process(pid, started_at) for pid, started_at in self.family]
        alive = [process for process in found if process is not None]
        names = []
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                names.append(process.name())
                process.terminate()
        _, stubborn = psutil.wait_procs(alive, timeout=5)
        for process in stubborn:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.remove()
        return names

    def remove(self) -> None:
        """Forget it."""
        self.path(self.port).unlink(missing_ok=True)


def _same_process(pid: int, started_at: float) -> psutil.Process | None:
    """The process with this id, if it started then: ids are used again."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started_at) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if same else None


def find_states() -> list[PlatformState]:
    """All platforms that run on this machine for this user."""
    ports = [
        int(path.stem.removeprefix("platform-"))
        for path in sorted(state_folder().glob("platform-*.json"))
        if path.stem.removeprefix("platform-").isdigit()
    ]
    return [state for port in ports if (state := PlatformState.load(port)) is not None]
