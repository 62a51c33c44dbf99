"""The operator's keys on this machine: made at the first ``up``, in files that only this user can read."""

from __future__ import annotations

from pathlib import Path

from flatshare.local.private_file import make_private, read_private
from flatshare.local.state import state_folder
from flatshare_registry.keys import new_key

__all__ = ["key_file", "make_key", "read_key"]


def key_file(role: str) -> Path:
    """Where the key of a role (``admin``, ``viewer``) is kept."""
    return state_folder() / f"{role}.key"


def read_key(role: str) -> str | None:
    """The key of a role, if it was made here.

    Raises
    ------
    LocalError
        Its file can be read by others.
    """
    return read_private(key_file(role))


def make_key(role: str) -> str:
    """The key of a role; made, whole or not at all, when there is none yet.

    Raises
    ------
    LocalError
        Its file can be read by others.
    """
    return make_private(key_file(role), lambda: new_key(role.upper()).text)
