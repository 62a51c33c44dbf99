"""A store in a local folder: durable (fsync), atomic (rename), conditional across processes (file lock)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from flatshare_registry.errors import AlreadyExists, Conflict, InvalidInput, NotFound, Unavailable
from flatshare_registry.stores.base import (
    CHUNK_BYTES,
    BlobMeta,
    ByteRange,
    Create,
    Overwrite,
    PutMode,
    StoredBlob,
    UpdateIf,
    check_key,
    check_prefix,
)

__all__ = ["LocalStore"]

_LOCK_NAME: Final = ".flatshare-lock"
_TEMP_PREFIX: Final = ".flatshare-tmp-"

ABANDONED_S: Final = 24 * 3600.0
"""Age from which a temporary file belongs to a put that crashed."""


class LocalStore:
    """Objects as files below one folder.

    A put writes and fsyncs a temporary file beside the target, then takes the folder's lock
    only to check the condition and rename, so large uploads do not block each other. Works
    on local file systems; not on NFS without working locks.

    Parameters
    ----------
    root
        The folder; made when missing.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self.url = self._root.as_uri()
        with _translated(f"the store folder {self._root}"):
            self._root.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, byte_range: ByteRange | None = None) -> StoredBlob:
        """See :class:`BlobStore`."""
        with _translated(key), self._path(key).open("rb") as file:
            meta = _meta(key, os.fstat(file.fileno()))
            if byte_range is None:
                return StoredBlob(file.read(), meta)
            if byte_range.end > meta.size_bytes:
                raise InvalidInput(f"range ends at {byte_range.end}, {key} has {meta.size_bytes} bytes")
            return StoredBlob(
                os.pread(file.fileno(), byte_range.end - byte_range.start, byte_range.start), meta
            )

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        """See :class:`BlobStore`."""
        with _translated(key), self._path(key).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start, end = (0, size) if byte_range is None else (byte_range.start, byte_range.end)
            if end > size:
                raise InvalidInput(f"range ends at {end}, {key} has {size} bytes")
            while start < end:
                piece = os.pread(file.fileno(), min(CHUNK_BYTES, end - start), start)
                if not piece:
                    raise Unavailable(f"{key} became shorter while it was read")
                yield piece
                start += len(piece)

    def get_unless(self, key: str, etag: str) -> StoredBlob | None:
        """See :class:`BlobStore`."""
        return None if self.head(key).etag == etag else self.get(key)

    def head(self, key: str) -> BlobMeta:
        """See :class:`BlobStore`."""
        with _translated(key):
            return _meta(key, self._path(key).stat())

    def put(self, key: str, data: bytes | memoryview, mode: PutMode) -> BlobMeta:
        """See :class:`BlobStore`."""
        path = self._path(key)
        with _translated(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=_TEMP_PREFIX, dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                with self._locked():
                    self._check(key, path, mode)
                    meta = _meta(key, os.stat(temporary))
                    os.replace(temporary, path)
                _fsync_folder(path.parent)
                return meta
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise

    def list(self, prefix: str, *, after: str = "") -> Iterator[BlobMeta]:
        """See :class:`BlobStore`."""
        start = self._root / check_prefix(prefix)
        found: list[BlobMeta] = []
        with _translated(prefix or "the store folder"):
            for folder, _, names in os.walk(start):
                for name in names:
                    path = Path(folder) / name
                    if name.startswith(_TEMP_PREFIX):
                        _sweep(path)
                    if name == _LOCK_NAME or name.startswith(_TEMP_PREFIX):
                        continue
                    key = path.relative_to(self._root).as_posix()
                    if key <= after:
                        continue
                    # A file that goes while we walk was deleted: leave it out.
                    with contextlib.suppress(FileNotFoundError):
                        found.append(_meta(key, path.stat()))
        yield from sorted(found, key=lambda meta: meta.key)

    def delete(self, key: str) -> None:
        """See :class:`BlobStore`."""
        path = self._path(key)
        with _translated(key), self._locked():
            path.unlink(missing_ok=True)

    def purge(self, key: str, *, keep_latest: bool = False) -> int:
        """See :class:`BlobStore`: no versions are kept here."""
        if keep_latest:
            check_key(key)
            return 0
        path = self._path(key)
        with _translated(key), self._locked():
            try:
                path.unlink()
            except FileNotFoundError:
                return 0
            return 1

    def purge_all(self, prefix: str) -> int:
        """See :class:`BlobStore`."""
        return sum(self.purge(meta.key) for meta in list(self.list(prefix)))

    def history(self, prefix: str) -> Iterator[str]:
        """See :class:`BlobStore`: nothing is kept here."""
        return (meta.key for meta in list(self.list(prefix)))

    def shows_versions(self, key: str) -> bool:
        """See :class:`BlobStore`: no versions are kept here."""
        check_key(key)
        return True

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _check(self, key: str, path: Path, mode: PutMode) -> None:
        """Refuse a put whose condition does not hold; the lock is held."""
        match mode:
            case Create():
                if path.exists():
                    raise AlreadyExists(f"{key} already exists")
            case UpdateIf(etag):
                if not path.exists() or _meta(key, path.stat()).etag != etag:
                    raise Conflict(f"{key} changed meanwhile")
            case Overwrite():
                pass

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # flock belongs to the open file, so a new descriptor each time also excludes our own threads;
        # the kernel releases it when a process dies.
        path = self._root / _LOCK_NAME
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if not _is_still_named(handle, path):
                    continue  # somebody removed it while we waited: the lock is another one now
                yield
                return
            finally:
                os.close(handle)


def _meta(key: str, stat: os.stat_result) -> BlobMeta:
    # Every put is a new inode with its own mtime, so this changes with every write.
    etag = f'"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}"'
    return BlobMeta(key, etag, stat.st_size, stat.st_mtime)


def _is_still_named(handle: int, path: Path) -> bool:
    """Whether an open file is what this path names now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _sweep(temporary: Path) -> None:
    """Remove what a put that crashed left behind; one that is under way is younger."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - temporary.stat().st_mtime > ABANDONED_S:
            temporary.unlink()


def _fsync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn the operating system's errors into the registry's."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise NotFound(f"{what} does not exist") from error
    except OSError as error:
        raise Unavailable(f"{what}: {error.strerror or error}") from error
