"""What a process knows about versions by digest: it never changes, so it need not be found out again."""

from __future__ import annotations

import threading
from typing import Final, Generic, TypeVar

from cachetools import LRUCache

from flatshare.errors import ModelFailed
from flatshare.models.architecture import Architecture, architecture
from flatshare_registry.errors import InvalidInput
from flatshare_registry.records import VersionRecord
from flatshare_registry.weights import check_architecture

__all__ = ["Known", "architecture_of"]

T = TypeVar("T")


class Known(Generic[T]):
    """What is known of digests under architectures; the least recently asked goes first. Safe for threads."""

    def __init__(self, most: int) -> None:
        self._found: LRUCache[tuple[str, str], T] = LRUCache(most)
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str]) -> T | None:
        """What is known of a digest under an architecture."""
        with self._lock:
            return self._found.get(key)

    def put(self, key: tuple[str, str], value: T) -> None:
        """Know something of it."""
        with self._lock:
            self._found[key] = value

    def forget(self, key: tuple[str, str]) -> None:
        """Know nothing of it any more."""
        with self._lock:
            self._found.pop(key, None)


_checked: Final = Known[Architecture](10_000)


def architecture_of(record: VersionRecord) -> Architecture:
    """A version's architecture; checked once for each digest, since neither changes in a process.

    Raises
    ------
    ModelFailed
        It is not installed here, or has other tensors: the operator must fix that, not the caller.
    """
    known = _checked.get((record.digest, record.architecture))
    if known is not None and len(record.tensors) == len(known.tensors):
        return known
    try:
        network = architecture(record.architecture)
        check_architecture(record.tensors, network.name, network.tensors)
    except InvalidInput as error:
        raise ModelFailed(f"{record.name} can't be served here: {error.message}") from error
    _checked.put((record.digest, record.architecture), network)
    return network
