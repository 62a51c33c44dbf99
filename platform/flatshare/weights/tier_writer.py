"""Writes one tensor beside the host tier, then publishes it: whole, checked, and mapped from then on."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Protocol

from flatshare.weights.tier_files import read_all, view_of

__all__ = ["TensorWriter"]


class Folder(Protocol):
    """What a writer asks of its host tier."""

    def path(self, digest: str) -> Path:
        """Where a tensor is, or would be."""
        ...

    def open(self, digest: str, size_bytes: int) -> memoryview | None:
        """The bytes of a tensor if they are here."""
        ...

    def note_bypass(self, why: str) -> None:
        """Count a tensor that stays in this process."""
        ...

    def unlink_temporary(self, path: Path) -> None:
        """Remove what a writer wrote, and give back what was set aside for it."""
        ...


class TensorWriter:
    """Writes one tensor beside the tier, then publishes it; ends with :meth:`publish` or :meth:`abort`."""

    def __init__(self, tier: Folder, digest: str, path: Path, handle: int) -> None:
        self._tier = tier
        self._digest = digest
        self._path = path
        self._handle = handle

    def write(self, data: memoryview) -> bool:
        """Append; False when the disk is full or failing: read back what is there, then abort."""
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except OSError as error:
            self._tier.note_bypass(f"could not be written: {error.strerror}")
            return False
        return True

    def read_back(self) -> bytes:
        """What was written so far."""
        return read_all(self._handle)

    def publish(self) -> memoryview:
        """Make the file visible under its digest and return its bytes, mapped; ends the writer.

        The bytes must have been checked. When the disk refuses, or somebody was faster and their file
        is already gone again, the bytes come back in this process's memory.
        """
        target = self._tier.path(self._digest)
        # Before the file has its name: changing from one lock to the other is not one step, and a process
        # that took the lock in between could evict or scrub what we are about to map. Without a name, the
        # worst that can happen is that it is treated as an orphan.
        fcntl.flock(self._handle, fcntl.LOCK_SH)
        try:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            # link, not rename: if somebody was faster their file may be mapped already, and stays.
            os.link(self._path, target)
        except OSError as error:
            data = None
            if isinstance(error, FileExistsError):
                data = self._tier.open(self._digest, os.fstat(self._handle).st_size)
                if data is None:  # damaged: ours takes its place
                    with contextlib.suppress(OSError):
                        os.replace(self._path, target)
                        return self._mapped()
            else:
                self._tier.note_bypass(f"could not be written: {error.strerror}")
            data = data if data is not None else memoryview(self.read_back())
            self.abort()
            return data
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        return self._mapped()

    def _mapped(self) -> memoryview:
        """The published bytes; ends the writer."""
        try:
            return view_of(self._handle)
        except OSError as error:  # too many open files, or mappings: the file is there for others
            self._tier.note_bypass(f"can't be mapped: {error.strerror}")
            return memoryview(self.read_back())
        finally:
            os.close(self._handle)

    def abort(self) -> None:
        """Forget what was written."""
        self._tier.unlink_temporary(self._path)
        os.close(self._handle)
