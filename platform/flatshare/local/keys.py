"""The operator's keys on this machine: made at the first ``up``, in files that only this user can read."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from flatshare.errors import LocalError
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
    path = key_file(role)
    try:
        status = path.stat()
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise LocalError(f"{path} can be read by others: chmod 600 it, or remove it to have a new key made")
    return text


def make_key(role: str) -> str:
    """The key of a role; made, whole or not at all, when there is none yet.

    Raises
    ------
    LocalError
        Its file can be read by others.
    """
    known = read_key(role)
    if known is not None:
        return known
    path = key_file(role)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_suffix(f".{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(new_key(role.upper()).text + "\n")
        with contextlib.suppress(FileExistsError):  # another `up` was faster: its key counts
            os.link(draft, path)
    finally:
        draft.unlink()
    made = read_key(role)
    assert made is not None, "it was just linked"
    return made
