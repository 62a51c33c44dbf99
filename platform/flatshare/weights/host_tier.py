"""The host tier: tensors as files that all replicas of a node share, named by their sha256.

    <folder>/<boot id>/tensors/ab/<sha256>    read-only, exactly the tensor's bytes
                       tmp/<size>-<name>      being written; its writer holds a lock on it
                       locks/<sha256>         held by whoever fetches it
                       usage                  bytes taken, under a lock

- A file gets its name (a hard link) after its sha256 was checked: readers see all of it or nothing.
- Every lock is an ``flock``: the kernel lets go of it when a process dies, however it dies, so there
  is nothing to recover but temporary files, and whoever can lock one of these knows it is an orphan.
- A mapped file carries a shared lock for as long as it is mapped. Eviction takes the file that was
  opened longest ago and is not mapped anywhere: removing a mapped one would free nothing.
- Bytes are set aside in ``usage`` before they are written, so the budget holds at every instant;
  after a crash the count is too high at worst, and the next eviction counts anew.
- These files are used only from here, because everything depends on the order of lock, look and change. That
  makes this module long.
- What a machine crash may leave half-written is under another boot id and is removed, not trusted:
  that is why nothing needs an fsync.

All methods may be called from several threads and processes at once; they block.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flatshare.weights.tier_files import (
    boot_id,
    is_locked,
    is_still_named,
    lock_within,
    overwrite,
    read_number,
    remove_orphan,
    remove_other_boots,
    unlink_unless_mapped,
    view_of,
    whole_pages,
    write_number,
)
from flatshare.weights.tier_writer import TensorWriter

__all__ = ["HostTier", "HostUsage", "Scrubbed"]

logger = logging.getLogger("flatshare.weights")

MARK_S: Final = 3600.0
"""Seconds that the mark of a damaged file stays: replicas look every second."""

HELD_S: Final = 1.0
"""Seconds to wait for a lock that others hold for milliseconds. Otherwise a replica that was stopped while it
held one would stop every load on its node, until somebody ends it."""


@dataclass(frozen=True, slots=True)
class HostUsage:
    """What the tier holds, for people.

    Attributes
    ----------
    used_bytes
        Files and what is being written, in whole pages.
    bypassed
        Tensors that this process kept in its own memory, because the tier or the disk was full.
    scrubbed, damaged
        Files that this process hashed again, and those among them that had changed.
    """

    folder: str
    budget_bytes: int
    used_bytes: int
    bypassed: int
    scrubbed: int = 0
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """What an erasure did to the tier: digests of tensors, and bytes that were overwritten."""

    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    overwritten_bytes: int = 0


class HostTier:
    """One node's shared files.

    Parameters
    ----------
    folder
        On tmpfs or a local disk; made when missing, readable by this user only.
    budget_bytes
        Most bytes of all files, over all processes.

    Attributes
    ----------
    on_pressure
        Called before files are evicted, so that files that are mapped without need are released.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.bypassed = 0
        self.scrubbed = 0
        self.damaged = 0
        self.on_pressure: Callable[[], None] = lambda: None
        self._root = folder / boot_id()
        self._tensors = self._root / "tensors"
        self._tmp = self._root / "tmp"
        self._locks = self._root / "locks"
        self._damage = self._root / "damage"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError(f"{folder} must belong to this user, and nobody else may write there")
        self._make_folders()
        remove_other_boots(folder, self._root.name)
        # If somebody does not let go of the number, use the tier all the same; the number stays as it is.
        with contextlib.suppress(TimeoutError), self._usage_locked() as handle:
            write_number(handle, self._count())

    # -- reading

    def open(self, digest: str, size_bytes: int) -> memoryview | None:
        """The bytes of a tensor if they are here: mapped, or read when small.

        The file was checked against its digest when it was published and can't be written since; here
        its length is checked. Kept by this process for as long as the view lives.
        """
        path = self.path(digest)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            lock_within(handle, fcntl.LOCK_SH, HELD_S)  # an eviction looks at this file, for a moment
            if os.fstat(handle).st_size != size_bytes:
                return None  # the record is wrong, or the file is damaged: publish() puts that right
            if not is_still_named(handle, path):
                return None  # evicted between the two calls; or scrubbed by one that died, and all zeros
            os.utime(handle)
            return view_of(handle)
        except OSError as error:
            logger.warning("host tier: %s can't be read: %s", digest[:12], error.strerror)
            return None
        finally:
            os.close(handle)

    def has(self, digest: str) -> bool:
        """Whether there is a file of this name now; :meth:`open` says whether it is any good."""
        return os.path.exists(self.path(digest))

    # -- writing

    @contextlib.contextmanager
    def fetching(self, digest: str, timeout_s: float) -> Iterator[bool]:
        """Hold the right to fetch a tensor, or learn after ``timeout_s`` that somebody else still does.

        The owner may die: then the kernel lets go of the lock and the next one has it.
        """
        path = self._locks / digest
        try:
            handle = self._lock_file(path, time.monotonic() + timeout_s)
        except OSError as error:  # too many open files, or somebody removed our folders
            self.note_bypass(f"can't be locked: {error.strerror}")
            handle = None
        try:
            yield handle is not None
        finally:
            if handle is not None:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                os.close(handle)

    def writer(self, digest: str, size_bytes: int) -> TensorWriter | None:
        """A writer for a tensor's bytes; None, and a count, when there is no room for it."""
        taken = whole_pages(size_bytes)
        path = self._temporary(taken)
        if taken > self.budget_bytes:
            self.note_bypass(f"is smaller than one tensor of {size_bytes} bytes")
            return None
        try:
            # Setting bytes aside, and making the locked file that stands for them, is one step: a process
            # that counts sees both or neither.
            with self._usage_locked() as usage:
                used = read_number(usage)
                if used + taken > self.budget_bytes:
                    self.on_pressure()
                    used = self._evict(taken)
                    write_number(usage, used)
                if used + taken <= self.budget_bytes:
                    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    write_number(usage, used + taken)
                    return TensorWriter(self, digest, path, handle)
        except OSError as error:
            self.note_bypass(f"can't be written: {error.strerror}")
            with contextlib.suppress(OSError):
                self._make_folders()  # somebody may have removed them: the next one finds them again
            return None
        self.note_bypass(f"has no room for {size_bytes} bytes: {self.budget_bytes} are in use")
        return None

    # -- looking and cleaning

    def usage(self) -> HostUsage:
        """What is held; waits for whoever counts."""
        used = 0
        with contextlib.suppress(OSError), self._usage_locked() as handle:
            used = read_number(handle)
        return HostUsage(str(self._root), self.budget_bytes, used, self.bypassed, self.scrubbed, self.damaged)

    def remove(self, digests: Iterable[str]) -> int:
        """Remove tensors whether mapped or not, for good (erasure); returns how many were here.

        Mapped bytes stay with those who map them until they let go.
        """
        return sum(self._discard(digest) for digest in digests)

    def scrub(self, digests: Iterable[str]) -> Scrubbed:
        """Overwrite and remove tensors that no process maps (erasure).

        Once the tenant's own leases have ended, a tensor that is still mapped is another tenant's too: it
        stays.
        """
        removed: list[str] = []
        kept: list[str] = []
        size = 0
        for digest in digests:
            path = self.path(digest)
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # From here on nobody maps, evicts or scrubs this file; but somebody may have, a moment ago,
                # and the path may be another tenant's new file of the same bytes by now.
                if is_still_named(handle, path):
                    # First it loses its name, then its bytes: a crash between the two leaves an orphan,
                    # which is overwritten when orphans are removed, and never zeros under a digest.
                    orphan = self._temporary(whole_pages(os.fstat(handle).st_size))
                    path.rename(orphan)
                    removed.append(digest)
                    size += overwrite(handle)
                    self.unlink_temporary(orphan)
            except FileNotFoundError:
                pass  # another replica of this node did it
            except BlockingIOError:
                kept.append(digest)
            except OSError as error:
                logger.warning("host tier: %s can't be erased: %s", digest[:12], error.strerror)
                if digest not in removed:
                    kept.append(digest)
            finally:
                os.close(handle)
        # What replicas that died were writing goes too. The receipt is of what was removed, counted or not.
        with contextlib.suppress(TimeoutError), self._usage_locked() as usage:
            write_number(usage, self._count())
        return Scrubbed(tuple(removed), tuple(kept), size)

    # -- looking whether files are what they were (``scrubber.py``)

    def is_damaged(self, digest: str) -> bool:
        """Hash a file again; whether it is here and not what its name says.

        Raises
        ------
        OSError
            It can't be read.
        """
        path = self.path(digest)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        with os.fdopen(handle, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            self.scrubbed += 1
            # An erasure takes a file's name before it overwrites it, so what has no name proves nothing.
            return found != digest and is_still_named(file.fileno(), path)

    def condemn(self, digest: str) -> None:
        """Remove a damaged file, and leave a mark for the other replicas of this node."""
        self.damaged += 1
        self._discard(digest)
        (self._damage / digest).write_bytes(b"")
        now = time.time()
        for entry in os.scandir(self._damage):
            with contextlib.suppress(FileNotFoundError):
                if now - entry.stat().st_mtime > MARK_S:
                    os.unlink(entry.path)

    def damage_marks(self) -> dict[str, int]:
        """What was found damaged lately: digests, with the time of each mark in nanoseconds."""
        found: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._damage):
                with contextlib.suppress(FileNotFoundError):
                    found[entry.name] = entry.stat().st_mtime_ns
        return found

    def take_scrub_turn(self) -> int | None:
        """The right to hash this node's files, as a lock that dies with its holder; None when it is taken."""
        handle = os.open(self._root / "scrub", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def give_scrub_turn(self, turn: int | None) -> None:
        """Let somebody else hash."""
        if turn is not None:
            os.close(turn)

    def digests(self) -> list[str]:
        """What is here."""
        return sorted(entry.name for entry in self._files())

    def note_bypass(self, why: str) -> None:
        """Count a tensor that stays in this process; the first time says so in the log."""
        if not self.bypassed:
            logger.warning("host tier %s %s: such tensors stay in each replica's own memory", self._root, why)
        self.bypassed += 1

    # -- inside

    def _temporary(self, taken: int) -> Path:
        """A name that nobody else takes, for a file that stands for so many bytes."""
        return self._tmp / f"{taken}-{os.getpid()}-{secrets.token_hex(8)}"

    def _make_folders(self) -> None:
        for part in (self._root, self._tensors, self._tmp, self._locks, self._damage):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _lock_file(self, path: Path, deadline: float) -> int | None:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                lock_within(handle, fcntl.LOCK_EX, deadline - time.monotonic())
            except TimeoutError:
                os.close(handle)
                return None
            if is_still_named(handle, path):
                return handle
            os.close(handle)  # its owner removed it when it was done: we locked a file that is gone

    def _evict(self, taken: int) -> int:
        """Remove files that nobody maps, the longest unopened first; returns the bytes still taken."""
        used = self._count()
        wanted = self.budget_bytes - taken - self.budget_bytes // 20  # some more, so that it is not each time
        ages: list[tuple[float, os.DirEntry[str]]] = []
        for entry in self._files():
            with contextlib.suppress(FileNotFoundError):
                ages.append((entry.stat().st_mtime, entry))
        chosen: list[str] = []
        left = used
        for _, entry in sorted(ages, key=lambda aged: aged[0]):
            if left <= max(wanted, 0):
                break
            if not is_locked(entry.path):
                with contextlib.suppress(FileNotFoundError):
                    left -= whole_pages(entry.stat().st_size)
                    chosen.append(entry.path)
        if left + taken > self.budget_bytes:
            return used  # what is mapped leaves too little: then nothing goes
        return used - sum(unlink_unless_mapped(path) for path in chosen)

    def _count(self) -> int:
        """Bytes of all files and of what living writers have set aside; orphans are removed."""
        used = 0
        # Count what is being written first: a file that is published meanwhile is then counted twice. The
        # other way round, it would be missed.
        for entry in os.scandir(self._tmp):
            if is_locked(entry.path):
                used += int(entry.name.partition("-")[0])
            else:
                remove_orphan(entry.path)
        for entry in self._files():
            with contextlib.suppress(FileNotFoundError):
                used += whole_pages(entry.stat().st_size)
        return used

    def _files(self) -> Iterator[os.DirEntry[str]]:
        for folder in os.scandir(self._tensors):
            with contextlib.suppress(FileNotFoundError):
                yield from os.scandir(folder.path)

    def _discard(self, digest: str) -> bool:
        path = self.path(digest)
        with self._usage_locked() as handle:
            try:
                size = path.stat().st_size
                path.unlink()
            except FileNotFoundError:
                return False
            write_number(handle, max(read_number(handle) - whole_pages(size), 0))
            return True

    def path(self, digest: str) -> Path:
        """Where a tensor is, or would be."""
        return self._tensors / digest[:2] / digest

    def unlink_temporary(self, path: Path) -> None:
        """Remove what a writer wrote, and give back what was set aside for it."""
        try:
            with self._usage_locked() as usage, contextlib.suppress(FileNotFoundError):
                path.unlink()
                write_number(usage, max(read_number(usage) - int(path.name.partition("-")[0]), 0))
        except TimeoutError:
            # Nobody can count now. The number stays too high until the next eviction counts anew.
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _usage_locked(self) -> Iterator[int]:
        """The number of bytes in use, held alone.

        Raises
        ------
        TimeoutError
            Another process holds it and does not let go.
        """
        # A handle of its own each time: a lock belongs to the open file, so threads exclude each other too.
        path = self._root / "usage"
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                lock_within(handle, fcntl.LOCK_EX, HELD_S)
                if not is_still_named(handle, path):
                    continue  # somebody removed our files while we waited: the lock is another one now
                yield handle
                return
            finally:
                os.close(handle)
