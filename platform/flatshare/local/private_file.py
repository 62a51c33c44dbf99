"""Small secrets in files that only this user can read, made whole or not at all; and folders like them."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from flatshare.errors import LocalError

__all__ = ["make_private", "private_folder", "read_private"]


def read_private(path: Path) -> str | None:
    """The text of a file, without the white space around it; None when there is no file.

    Raises
    ------
    LocalError
        Others can read it, or it is not this user's.
    """
    try:
        status = path.stat()
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise LocalError(f"{path} can be read by others: chmod 600 it, or remove it to have a new one made")
    return text


def private_folder(path: Path) -> Path:
    """A folder that only this user can enter; made when it is missing.

    Raises
    ------
    LocalError
        It is not this user's, or others can enter it, or it is a link.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise LocalError(f"{path} is not this user's alone: remove it, or chmod 700 it if it is yours")
    return path


def make_private(path: Path, make: Callable[[], str]) -> str:
    """The text of a file, which is made (mode 0600) when there is none; of two who make it, one wins.

    Raises
    ------
    LocalError
        Others can read the file that is there.
    """
    known = read_private(path)
    if known is not None:
        return known
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_suffix(f".{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(make() + "\n")
        with contextlib.suppress(FileExistsError):  # another process was faster: its file counts
            os.link(draft, path)
    finally:
        draft.unlink()
    made = read_private(path)
    assert made is not None, "it was just linked"
    return made
