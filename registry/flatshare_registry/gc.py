"""Garbage collection: what a crash or a deletion left behind, after a grace period.

Collected are blobs that no committed version names, version records that no head names, announcements
of changes that no reader looks for any more, and counts of usage that are older than a bill can be. No head
is changed, so there is nothing to announce.
Objects are listed *before* heads are read, and a registration that reuses an old blob writes it
again first, so whatever a registration in progress needs is younger than the grace period. Age is
read again just before each delete; a delete may still come late, or twice, so weights go in two steps
(``blobs.py``), and a version record goes only if its number can't be given out again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from flatshare_registry import layout
from flatshare_registry.blobs import BLOB_REFRESH_S, BlobRemoval, NamedBlobs
from flatshare_registry.errors import InvalidInput, NotFound
from flatshare_registry.feed import ChangeFeed
from flatshare_registry.records import TenantHead
from flatshare_registry.store_clock import agreed_now
from flatshare_registry.stores.base import BlobMeta, BlobStore
from flatshare_registry.usage import old_usage

__all__ = ["DEFAULT_GRACE_S", "MIN_GRACE_S", "GarbageReport", "collect"]

DEFAULT_GRACE_S: Final = 24 * 3600.0
MIN_GRACE_S: Final = 2 * BLOB_REFRESH_S
"""Shorter would race with a registration that relies on a blob written up to ``BLOB_REFRESH_S`` ago."""


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """What was found, and whether it was removed.

    Attributes
    ----------
    removed
        False in a dry run.
    garbage
        Unreferenced objects older than the grace period.
    spared
        How many unreferenced objects were too young.
    live_blobs
        How many blobs are in use.
    announcements
        How many old announcements of changes went, or would go.
    usage
        How many objects of what tenants used, likewise.
    """

    removed: bool
    garbage: tuple[BlobMeta, ...]
    spared: int
    live_blobs: int
    announcements: int = 0
    usage: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes that were, or would be, freed."""
        return sum(meta.size_bytes for meta in self.garbage)


def collect(
    store: BlobStore,
    *,
    grace_s: float = DEFAULT_GRACE_S,
    remove: bool = False,
    clock: Callable[[], float] = time.time,
) -> GarbageReport:
    """Find, and with ``remove`` delete, what nobody names.

    Raises
    ------
    InvalidInput
        The grace period is shorter than :data:`MIN_GRACE_S`; or the clocks of this machine and of the
        store do not agree.
    Corrupt
        A head can't be read: nothing is deleted then, since it may name anything.
    """
    if grace_s < MIN_GRACE_S:
        raise InvalidInput(f"the grace period is at least {MIN_GRACE_S:.0f} s")
    now_s = agreed_now(store, clock())
    blobs = [meta for meta in store.list(layout.BLOBS) if layout.digest_of(meta.key) is not None]
    tenant_objects = list(store.list(layout.TENANTS))
    named = NamedBlobs(store)
    removal = BlobRemoval(store, layout.HELD, named)
    if remove:
        removal.restore(older_than_s=MIN_GRACE_S)
    live_digests: set[str] = set()
    live_versions: set[tuple[str, int]] = set()
    next_versions: dict[str, int] = {}
    for meta in tenant_objects:
        if layout.tenant_of_head(meta.key) is not None:
            head = TenantHead.decode(store.get(meta.key).data, meta.key)
            next_versions[head.tenant] = head.next_version
            if head.state.exists:
                live_digests.update(head.versions.values())
                live_versions.update((head.tenant, number) for number in head.versions)
    unnamed = [meta for meta in blobs if layout.digest_of(meta.key) not in live_digests]
    unnamed += [
        meta
        for meta in tenant_objects
        if (version := layout.version_of(meta.key)) is not None
        and version not in live_versions
        # The next registration may be given this number, and put its record there.
        and version[1] < next_versions.get(version[0], version[1] + 1)
    ]
    garbage = tuple(meta for meta in unnamed if now_s - meta.modified_s > grace_s)
    if remove:
        garbage = tuple(meta for meta in garbage if _remove_unless_renewed(store, meta, removal))
        digests = {layout.digest_of(meta.key): meta for meta in garbage}
        back = removal.settle(digest for digest in digests if digest is not None)
        garbage = tuple(meta for meta in garbage if layout.digest_of(meta.key) not in back)
    live_blobs = sum(layout.digest_of(meta.key) in live_digests for meta in blobs)
    announced = ChangeFeed(store, clock).old(now_s)
    used = old_usage(store, datetime.fromtimestamp(now_s, UTC))
    if remove:
        for key in (*announced, *used):
            store.purge(key)
    return GarbageReport(remove, garbage, len(unnamed) - len(garbage), live_blobs, len(announced), len(used))


def _remove_unless_renewed(store: BlobStore, meta: BlobMeta, removal: BlobRemoval) -> bool:
    """Remove an object unless it was written again since it was listed."""
    try:
        # Whole seconds: some stores list with milliseconds and answer HEAD without.
        if int(store.head(meta.key).modified_s) != int(meta.modified_s):
            return False
    except NotFound:
        return False
    digest = layout.digest_of(meta.key)
    if digest is None:
        store.delete(meta.key)
    else:
        removal.take(digest)
    return True
