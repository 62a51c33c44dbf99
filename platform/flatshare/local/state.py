"""What ``up`` writes down so that other commands find the platform, and ``down`` ends just that."""

from __future__ import annotations

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

    @staticmethod
    def path(port: int) -> Path:
        """The state file of the platform on this port."""
        return state_folder() / f"platform-{port}.json"

    def save(self) -> None:
        """Write it, whole or not at all."""
        path = self.path(self.port)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(asdict(self), indent=2))
        draft.replace(path)

    @classmethod
    def load(cls, port: int) -> PlatformState | None:
        """The platform on this port, if it is alive; a dead one's file is removed."""
        path = cls.path(port)
        try:
            state = cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise LocalError(f"{path} is damaged; remove it") from error
        if state.process() is None:
            path.unlink(missing_ok=True)
            return None
        return state

    def process(self) -> psutil.Process | None:
        """The ``up`` process, if it is still that process."""
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.started_at) < 1 and process.status() != "zombie"
        except psutil.NoSuchProcess:
            return None
        return process if alive else None

    def remove(self) -> None:
        """Forget it."""
        self.path(self.port).unlink(missing_ok=True)


def find_states() -> list[PlatformState]:
    """All platforms that run on this machine for this user."""
    ports = [
        int(path.stem.removeprefix("platform-"))
        for path in sorted(state_folder().glob("platform-*.json"))
        if path.stem.removeprefix("platform-").isdigit()
    ]
    return [state for port in ports if (state := PlatformState.load(port)) is not None]
