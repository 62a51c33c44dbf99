"""What the host tier does with single files: look at their locks, map them, remove or overwrite them."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
from pathlib import Path
from typing import Final

__all__ = [
    "PAGE",
    "boot_id",
    "is_locked",
    "overwrite",
    "read_number",
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


def view_of(handle: int) -> memoryview:
    """The bytes of an open file: read when few, else mapped.

    The mapping keeps a duplicate of the handle, and with it the lock, until nobody has the view.
    """
    size = os.fstat(handle).st_size
    if size < MAP_FROM_BYTES:
        return memoryview(os.pread(handle, size, 0))
    return memoryview(mmap.mmap(handle, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ))


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
        size = os.fstat(handle).st_size
        os.unlink(path)
    except (BlockingIOError, FileNotFoundError):
        return 0
    finally:
        os.close(handle)
    return whole_pages(size)


def overwrite(locked: int) -> int:
    """Write zeros over a file that is locked and that nobody maps; returns its length."""
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
    """Remove the folders of other runs of the kernel: what a machine crash left is not trusted."""
    for entry in folder.iterdir():
        if entry.name != current and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
