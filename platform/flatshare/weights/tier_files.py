"""What the host tier does with single files: look at their locks, map them, remove or overwrite them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Final

__all__ = [
    "PAGE",
    "boot_id",
    "is_locked",
    "is_still_named",
    "lock_within",
    "overwrite",
    "read_all",
    "read_number",
    "remove_orphan",
    "remove_other_boots",
    "unlink_unless_mapped",
    "view_of",
    "whole_pages",
    "write_number",
]

PAGE: Final = 4096
"""What a file takes is a multiple of this, in bytes."""

MAP_FROM_BYTES: Final = 64 * 1024
"""Smaller tensors are read into memory: a mapping and its open file cost more than a copy."""


FIRST_RETRY_S: Final = 0.0002
LAST_RETRY_S: Final = 0.005


def lock_within(handle: int, operation: int, within_s: float) -> None:
    """Take an ``flock``, but do not wait for ever: its holder may be stopped, and never release it.

    Raises
    ------
    TimeoutError
        Somebody else held it all the time.
    """
    deadline = time.monotonic() + within_s
    pause_s = FIRST_RETRY_S
    while True:
        try:
            fcntl.flock(handle, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, "somebody holds its lock and does not let go") from None
            time.sleep(pause_s)  # flock waits for ever or not at all
            pause_s = min(2 * pause_s, LAST_RETRY_S)
        else:
            return


def view_of(handle: int) -> memoryview:
    """The bytes of an open file: read when few, else mapped.

    The mapping keeps a duplicate of the handle, and with it the lock, until nobody has the view.
    """
    size = os.fstat(handle).st_size
    if size < MAP_FROM_BYTES:
        return memoryview(os.pread(handle, size, 0))
    return memoryview(mmap.mmap(handle, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ))


def read_all(handle: int) -> bytes:
    """The bytes of an open file. One call reads at most 2 GiB (read(2))."""
    parts: list[bytes] = []
    at = 0
    while part := os.pread(handle, 1024**3, at):
        parts.append(part)
        at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def whole_pages(size_bytes: int) -> int:
    """Bytes that a file of this length takes."""
    return -(-size_bytes // PAGE) * PAGE


def read_number(handle: int) -> int:
    """The number in a file; 0 when there is none."""
    text = os.pread(handle, 32, 0)
    return int(text) if text.strip().isdigit() else 0


def write_number(handle: int, value: int) -> None:
    """Put a number in a file."""
    # One write of fixed length: a reader never sees half a number, since readers hold the lock.
    os.pwrite(handle, f"{value:031d}\n".encode(), 0)


def is_still_named(handle: int, path: str | Path) -> bool:
    """Whether an open file is what this path names now.

    To open and to lock are two steps: between them somebody may have removed the file, or put another there.
    """
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def is_locked(path: str) -> bool:
    """Whether a living process holds this file's lock."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def unlink_unless_mapped(path: str) -> int:
    """Remove a file that no process maps; returns the bytes that came free."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_still_named(handle, path):
            return 0
        size = os.fstat(handle).st_size
        os.unlink(path)
    except (BlockingIOError, FileNotFoundError):
        return 0
    finally:
        os.close(handle)
    return whole_pages(size)


def remove_orphan(path: str) -> None:
    """Overwrite and remove a file that a dead process was writing, or overwriting."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A file that was being published when its writer died has a second name, and may be in use.
            if os.fstat(handle).st_nlink == 1:
                overwrite(handle)
        finally:
            os.close(handle)
        os.unlink(path)


def overwrite(locked: int) -> int:
    """Write zeros over a file that is locked and that nobody maps; returns its length.

    It must have lost its name before: a crash in here would leave zeros where weights are looked for.
    """
    os.fchmod(locked, 0o600)
    size = os.fstat(locked).st_size
    handle = os.open(f"/proc/self/fd/{locked}", os.O_WRONLY | os.O_CLOEXEC)  # that file, not that name
    try:
        zeros = bytes(min(size, 1024**2))
        done = 0
        while done < size:
            done += os.pwrite(handle, zeros[: size - done], done)
        os.fsync(handle)  # where the tier is on a disk: the old bytes must not come back from there
    finally:
        os.close(handle)
    return size


def boot_id() -> str:
    """Names this run of the kernel (proc(5), /proc/sys/kernel/random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def remove_other_boots(folder: Path, current: str) -> None:
    """Remove tiers of other runs of the kernel: what a machine crash left is not trusted.

    Only what is a tier: the folder may be one that the operator has other things in.
    """
    for entry in folder.iterdir():
        if entry.name != current and _is_uuid(entry.name) and (entry / "usage").is_file():
            shutil.rmtree(entry, ignore_errors=True)


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
