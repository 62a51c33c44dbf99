"""What tenants used, for bills and to judge promotions: one object per hour and replica, and their sums.

A replica writes its object of this hour again and again (``put``; it never reads it). So when it dies, it
loses only what it counted since its last write: a minute, unless the operator says otherwise. Each process
writes under its own name, so sums count everything once. Counts outlive an erasure: they hold a tenant's name
and numbers, and nothing else of it. ``gc`` removes counts that are older than :data:`KEPT`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from flatshare_registry import layout
from flatshare_registry.errors import Corrupt, NotFound
from flatshare_registry.stores.base import BlobMeta, BlobStore, Overwrite

__all__ = ["OTHERS", "Used", "UsedVersion", "old_usage", "read_usage", "write_usage"]

OTHERS: Final = "(others)"
"""Stands for the tenants of an hour that a replica does not count separately."""

KEPT: Final = timedelta(days=400)
"""How long counts are kept: a year, and the month in which its bill is made."""

READERS: Final = 16
"""Objects that are read at a time."""


class UsedVersion(NamedTuple):
    """Whose use it is: a tenant, and a version's number."""

    tenant: str
    version: int


@dataclass(slots=True)
class Used:
    """Counts, which can be added.

    Attributes
    ----------
    requests, failed
        Answered, and not answered for a reason on this side (a pass, a load, too late).
    rows
        Of the answered ones.
    cold_loads
        Requests that were not answered from a device: they waited for a load.
    body_bytes
        Of the answered ones' bodies.
    seconds
        From when a body was here until its answer was made, of all answered requests together.
    labels
        How often each class was the answer, by its number.
    """

    requests: int = 0
    failed: int = 0
    rows: int = 0
    cold_loads: int = 0
    body_bytes: int = 0
    seconds: float = 0.0
    labels: list[int] = field(default_factory=list)

    def add(self, other: Used) -> None:
        """Add another's counts to these."""
        self.requests += other.requests
        self.failed += other.failed
        self.rows += other.rows
        self.cold_loads += other.cold_loads
        self.body_bytes += other.body_bytes
        self.seconds += other.seconds
        self.labels.extend([0] * (len(other.labels) - len(self.labels)))
        for label, count in enumerate(other.labels):
            self.labels[label] += count


def write_usage(
    store: BlobStore,
    hour: datetime,
    writer: str,
    used: Mapping[UsedVersion, Used],
    *,
    last: bool = False,
) -> None:
    """Write one process's counts of one hour; what it wrote of that hour before is replaced.

    Parameters
    ----------
    last
        It is not written again: earlier writes that a bucket with versions has kept are removed.

    Raises
    ------
    Unavailable
        The store does not take it.
    """
    tenants: dict[str, dict[str, list[object]]] = {}
    for (tenant, version), one in used.items():
        tenants.setdefault(tenant, {})[str(version)] = [
            one.requests, one.failed, one.rows, one.cold_loads, one.body_bytes,
            round(one.seconds, 6), one.labels,
        ]  # fmt: skip
    document = json.dumps({"format": 1, "tenants": tenants}, separators=(",", ":")).encode()
    key = layout.usage_key(hour, writer)
    store.put(key, document, Overwrite())
    if last:
        store.purge(key, keep_latest=True)


def read_usage(
    store: BlobStore,
    since: datetime,
    until: datetime,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[UsedVersion, Used]:
    """Sums over all processes, of the whole hours that ``since`` and ``until`` are in and those between.

    Parameters
    ----------
    progress
        Called with how many objects were read, and how many there are.

    Raises
    ------
    Corrupt
        An object is not what this release writes.
    Unavailable
        The store does not answer.
    """
    metas = list(_objects(store, since, until))
    total: dict[UsedVersion, Used] = {}
    with ThreadPoolExecutor(READERS) as threads:
        for done, document in enumerate(threads.map(lambda meta: _read(store, meta.key), metas), 1):
            for key, used in document:
                total.setdefault(key, Used()).add(used)
            progress(done, len(metas))
    return total


def old_usage(store: BlobStore, now: datetime) -> list[str]:
    """Keys of counts that are older than anybody asks for."""
    return [meta.key for meta in _objects(store, None, now - KEPT - timedelta(hours=1))]


def _objects(store: BlobStore, since: datetime | None, until: datetime) -> Iterator[BlobMeta]:
    after = layout.USAGE + layout.usage_hour(since) if since is not None else ""
    last = layout.usage_hour(until)
    for meta in store.list(layout.USAGE, after=after):
        if meta.key.removeprefix(layout.USAGE).partition("/")[0] <= last:  # stores list in any order
            yield meta


def _read(store: BlobStore, key: str) -> Iterable[tuple[UsedVersion, Used]]:
    try:
        document: dict[str, Any] = json.loads(store.get(key).data)
        if document["format"] != 1:
            raise Corrupt(f"{key} was written by a newer release")
        return [
            (
                UsedVersion(str(tenant), int(version)),
                Used(*counts),
            )
            for tenant, versions in document["tenants"].items()
            for version, counts in versions.items()
        ]
    except NotFound:
        return ()  # it was removed meanwhile
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise Corrupt(f"{key} is not what a replica writes") from error
