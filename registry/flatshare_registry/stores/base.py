"""The narrow interface between the registry and a place that keeps bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from flatshare_registry.errors import InvalidInput

__all__ = [
    "CHUNK_BYTES",
    "BlobMeta",
    "BlobStore",
    "ByteRange",
    "Create",
    "Overwrite",
    "PutMode",
    "StoredBlob",
    "UpdateIf",
    "check_key",
]

MAX_KEY_CHARS: Final = 512
"""Longest key in characters: S3 allows 1,024 bytes with the prefix, file systems 255 a segment."""


CHUNK_BYTES: Final = 1024 * 1024
"""Longest piece of :meth:`BlobStore.chunks`: it fits a core's cache, so a piece that is hashed as it comes is
read from there. A replica's load of 4.8 MB was a tenth faster than with pieces of 256 KiB."""


@dataclass(frozen=True, slots=True)
class BlobMeta:
    """What a store knows of an object without reading it.

    Attributes
    ----------
    etag
        Opaque; changes whenever the object is written.
    size_bytes
        Length of the whole object.
    modified_s
        POSIX time of the last write, by the store's clock.
    """

    key: str
    etag: str
    size_bytes: int
    modified_s: float


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """Bytes read (all, or the range asked for) and the object's metadata."""

    data: bytes
    meta: BlobMeta


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes ``start`` to ``end`` (exclusive); both within the object."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise InvalidInput(f"byte range {self.start}..{self.end} is empty or negative")


@dataclass(frozen=True, slots=True)
class Create:
    """Put only if there is nothing under the key."""


@dataclass(frozen=True, slots=True)
class Overwrite:
    """Put whatever is there."""


@dataclass(frozen=True, slots=True)
class UpdateIf:
    """Put only if what is there still has this ETag."""

    etag: str


PutMode = Create | Overwrite | UpdateIf


class BlobStore(Protocol):
    """Keeps bytes under keys. All methods are safe to call from several threads and processes at once.

    Conditional puts are atomic across processes; a backend that cannot do that must not exist
    (never check, then set). Keys are relative, ``/``-separated, checked by :func:`check_key`.

    Every method raises ``InvalidInput`` for a bad key and ``Unavailable`` when the store does
    not answer in time; only a real miss is ``NotFound``.
    """

    @property
    def url(self) -> str:
        """Where this is, for people; never holds a secret."""
        ...

    def get(self, key: str, byte_range: ByteRange | None = None) -> StoredBlob:
        """Read an object, or a range of it.

        Raises
        ------
        NotFound
            There is no such object.
        InvalidInput
            The range does not lie within the object.
        """
        ...

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        """Read an object, or a range of it, in pieces of at most ``CHUNK_BYTES``, each as it arrives.

        Raises as :meth:`get`, before the first piece or between two: then the pieces so far are right, and
        the rest can be asked for as a range. If the pieces end without an error, they are complete.
        """
        ...

    def get_unless(self, key: str, etag: str) -> StoredBlob | None:
        """Read an object unless it still has this ETag; None means unchanged.

        Raises
        ------
        NotFound
            There is no such object.
        """
        ...

    def head(self, key: str) -> BlobMeta:
        """Metadata only.

        Raises
        ------
        NotFound
            There is no such object.
        """
        ...

    def put(self, key: str, data: bytes | memoryview, mode: PutMode) -> BlobMeta:
        """Write a whole object; readers see the old bytes or the new, never a mixture.

        Raises
        ------
        AlreadyExists
            ``Create`` and there is one.
        Conflict
            ``UpdateIf`` and it changed or went; or the store asks to try again.
        """
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[BlobMeta]:
        """All objects under a prefix (empty, or ending with ``/``), in any order.

        Most S3 stores list in key order, but not all (Amazon's directory buckets): sort if you need an order.

        Parameters
        ----------
        after
            Only keys that sort after this text, in order of their characters.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        ...

    def purge(self, key: str, *, keep_latest: bool = False) -> int:
        """Remove an object for good, with every earlier version that the store has kept of it.

        Parameters
        ----------
        keep_latest
            Remove only the earlier versions.

        Returns
        -------
        int
            Versions that went, without marks of deletion.
        """
        ...

    def purge_all(self, prefix: str) -> int:
        """As :meth:`purge`, for all objects under a prefix (ending with ``/``), hidden ones too."""
        ...

    def history(self, prefix: str) -> Iterator[str]:
        """Keys under a prefix for which the store still has anything, earlier and hidden versions too.

        A store that can't list versions gives what a plain listing shows: see :meth:`shows_versions`.
        """
        ...

    def shows_versions(self, key: str) -> bool:
        """Whether an object that is there is shown with all that the store has kept of it.

        Some S3 look-alikes can't list versions: :meth:`purge` and :meth:`history` then know only of what a
        plain listing shows. A store that never keeps any says True.
        """
        ...


def check_key(key: str) -> str:
    """Return ``key`` if it is safe to use as a path in any backend.

    Raises
    ------
    InvalidInput
        Empty, too long, absolute, with an empty, ``.`` or ``..`` segment, a backslash or a
        character outside printable ASCII.
    """
    segments = key.split("/")
    if (
        not key
        or len(key) > MAX_KEY_CHARS
        or not key.isascii()
        or not key.isprintable()
        or "\\" in key
        or any(segment in ("", ".", "..") or len(segment) > 200 for segment in segments)
    ):
        raise InvalidInput(f"{key[:80]!a} is not a valid object key")
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if it is empty or a key followed by ``/``.

    Raises
    ------
    InvalidInput
        Otherwise.
    """
    if prefix:
        if not prefix.endswith("/"):
            raise InvalidInput(f"prefix {prefix[:80]!a} must end with '/'")
        check_key(prefix[:-1])
    return prefix
