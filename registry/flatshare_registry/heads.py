"""Tenant heads: read them, change them by compare-and-swap, keep the audit log in step.

The entry of a change travels inside the head that the change makes (``last_entry``), so change
and entry are one step. Its log object is written right after, and once more by whoever changes
the head next, in case the writer died in between. A change is announced before it is made (``feed.py``).
This module is long because a head's swap and its audit entry are one step: a reader of one must see the
other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Final

from flatshare_registry import layout
from flatshare_registry.errors import AlreadyExists, Conflict, Corrupt, NotFound, Unavailable
from flatshare_registry.feed import LATE_S, ChangeFeed
from flatshare_registry.ids import AliasName, ModelRef, TenantId
from flatshare_registry.records import (
    ULID_TIME_CHARS,
    Action,
    AuditEntry,
    TenantHead,
    VersionRecord,
    new_ulid,
    next_ulid_time,
    utc,
)
from flatshare_registry.stores.base import BlobStore, Create, PutMode, UpdateIf

__all__ = ["MAX_SWAP_TRIES", "HeadStore", "chain_problems", "decode_head", "select"]

MAX_SWAP_TRIES: Final = 50
"""Tries of one compare-and-swap before giving up: each lost race means that somebody else's change
landed, so this many in a row is a store that misbehaves, not contention."""


def chain_problems(head: TenantHead, log: Iterable[AuditEntry], latest: int) -> list[str]:
    """What is wrong with a tenant's audit entries, in words; empty when their chain is whole.

    Parameters
    ----------
    latest
        The newest revision that an entry may have.
    """
    problems: list[str] = []
    entries: dict[int, AuditEntry] = {head.last_entry.revision: head.last_entry}
    for entry in log:
        known = entries.setdefault(entry.revision, entry)
        if known != entry:
            what = "the head says" if known is head.last_entry else f"{known.id} says"
            problems.append(f"entry {entry.id} of revision {entry.revision} is not what {what}")
    if head.revision != head.last_entry.revision:
        problems.append(f"the head is at revision {head.revision}, its last entry at another")
    unchained = True
    for revision in range(1, head.revision + 1):
        entry_now, before = entries.get(revision), entries.get(revision - 1)
        # Entries from before there was a chain have no link; the chain begins after them.
        unchained = unchained and entry_now is not None and entry_now.previous is None
        if unchained:
            continue
        if entry_now is None:
            problems.append(f"the entry of revision {revision} is missing")
        elif revision == 1 and entry_now.previous is not None:
            problems.append("the first entry names one before it")
        elif before is not None and entry_now.previous != before.link:
            problems.append(f"the entry of revision {revision - 1} was altered, or that of {revision}")
    return problems + [f"there is an entry of revision {one}" for one in entries if one > latest]


class HeadStore:
    """The heads of all tenants in one store.

    Parameters
    ----------
    store
        Where the objects are.
    actor
        Who is named in audit entries.
    clock
        POSIX seconds.
    request_id
        The request that audit entries name.
    """

    def __init__(
        self, store: BlobStore, actor: str, clock: Callable[[], float], request_id: str | None = None
    ) -> None:
        self.actor = actor
        self.feed = ChangeFeed(store, clock)
        self._store = store
        self._clock = clock
        self._request_id = request_id

    def now(self) -> datetime:
        """The time that changes are written with."""
        return utc(self._clock())

    def read(self, tenant: TenantId) -> TenantHead:
        """A tenant's head, also of one that is suspended.

        Raises
        ------
        NotFound
            No such tenant.
        """
        head, _ = self._read_any(tenant)
        if not head.state.exists:
            raise NotFound(f"there is no tenant {tenant}")
        return head

    def read_any(self, tenant: TenantId) -> TenantHead:
        """A tenant's head, also of one that was deleted or erased.

        Raises
        ------
        NotFound
            There has never been such a tenant.
        """
        return self._read_any(tenant)[0]

    def read_unless(self, tenant: TenantId, etag: str | None) -> tuple[TenantHead, str] | None:
        """A tenant's head and its ETag; None when it still has this ETag (one cheap request).

        Raises
        ------
        NotFound
            No such tenant.
        """
        key = layout.head_key(tenant)
        try:
            blob = self._store.get(key) if etag is None else self._store.get_unless(key, etag)
        except NotFound:
            raise NotFound(f"there is no tenant {tenant}") from None
        if blob is None:
            return None
        head = decode_head(tenant, blob.data)
        if not head.state.exists:
            raise NotFound(f"there is no tenant {tenant}")
        return head, blob.meta.etag

    def record(self, head: TenantHead, version: int) -> VersionRecord:
        """The record of a version that a head names, checked against the head.

        Raises
        ------
        NotFound
            The head does not name it.
        Corrupt
            The record is missing or is another version's.
        """
        digest = head.versions.get(version)
        if digest is None:
            raise NotFound(f"tenant {head.tenant} has no version {version}")
        key = layout.version_key(TenantId(head.tenant), version)
        try:
            record = VersionRecord.decode(self._store.get(key).data, key)
        except NotFound as error:
            raise Corrupt(f"{key} is named by its tenant's head but is gone") from error
        if (record.tenant, record.version, record.digest) != (head.tenant, version, digest):
            raise Corrupt(f"{key} does not describe the version that its tenant's head names")
        return record

    def create(self, tenant: TenantId) -> TenantHead:
        """The first head of a tenant.

        Raises
        ------
        AlreadyExists
            There is a head, of an active or a deleted tenant.
        """
        entry = self._entry(tenant, 1, Action.TENANT_CREATED)
        head = TenantHead(tenant=tenant, created_at=entry.at, last_entry=entry)
        try:
            self.swap(head, Create())
        except AlreadyExists:
            found = self.read_any(tenant)
            if not self._landed(entry, found):
                raise
            return found
        with contextlib.suppress(Unavailable, Conflict):
            self._write_log(entry)
        return head

    def change(
        self,
        tenant: TenantId,
        action: Action,
        edit: Callable[[TenantHead], TenantHead],
        *,
        also_deleted: bool = False,
        entry_only: bool = False,
        alias: AliasName | None = None,
        from_version: int | None = None,
        to_version: int | None = None,
        tell: Callable[[TenantHead, TenantHead], Mapping[str, str]] = lambda old, new: {},
    ) -> TenantHead:
        """Change a head; every change passes here.

        Parameters
        ----------
        edit
            Gets the current head and returns the wanted one, or raises. May run several times.
            Returning an equal head changes nothing, unless ``entry_only``.
        also_deleted
            Whether ``edit`` also wants the heads of deleted tenants.
        entry_only
            The change is not in the head; its entry is written all the same.
        alias, from_version, to_version
            For the audit entry; the versions of an alias are filled in from the two heads.
        tell
            Makes the entry's ``detail`` of the old head and the new one.

        Raises
        ------
        NotFound
            No such tenant.
        Unavailable
            The store failed, or the swap lost ``MAX_SWAP_TRIES`` times.
        """
        # The random half identifies this change in all tries; the time half is new in each try.
        mark = new_ulid(self._clock())[ULID_TIME_CHARS:]
        tried: AuditEntry | None = None
        for _ in range(MAX_SWAP_TRIES):
            head, etag = self._read_any(tenant)
            if tried is not None and self._landed(tried, head):
                return head
            if not head.state.exists and not also_deleted:
                raise NotFound(f"there is no tenant {tenant}")
            wanted = edit(head)
            if wanted == head and not entry_only:
                return head
            self._write_log(head.last_entry)  # the last writer may have died before it could
            entry = self._entry(
                tenant,
                head.revision + 1,
                action,
                entry_id=_id_after(head.last_entry.id, mark, self._clock()),
                alias=alias,
                from_version=from_version if alias is None else head.aliases.get(alias),
                to_version=to_version if alias is None else wanted.aliases.get(alias),
                detail=tell(head, wanted),
                previous=head.last_entry.link,
            )
            changed = wanted.model_copy(update={"revision": entry.revision, "last_entry": entry})
            tried = entry
            try:
                self.swap(changed, UpdateIf(etag))
            except Conflict:
                continue
            # The change has landed and must not be reported as failed: whoever changes the head next
            # writes this entry's log object, and until then it is read from the head.
            with contextlib.suppress(Unavailable, Conflict):
                self._write_log(entry)
            return changed
        raise Unavailable(f"tenant {tenant} could not be changed: {MAX_SWAP_TRIES} swaps in a row lost")

    def swap(self, head: TenantHead, mode: PutMode) -> None:
        """Announce a head, then put it: the only way in which one gets into the store.

        Raises
        ------
        AlreadyExists, Conflict
            As :meth:`BlobStore.put`.
        Unavailable
            The store does not answer.
        """
        tenant = TenantId(head.tenant)
        announced_at = self.feed.announce(tenant, head.revision)
        self._store.put(layout.head_key(tenant), head.encode(), mode)
        if self._clock() - announced_at > LATE_S:  # readers may have stopped looking for it
            with contextlib.suppress(Unavailable, Conflict):
                self.feed.announce(tenant, head.revision)

    def entry_after(self, head: TenantHead, action: Action, detail: Mapping[str, str]) -> AuditEntry:
        """The entry that follows a head's last one."""
        mark = new_ulid(self._clock())[ULID_TIME_CHARS:]
        return self._entry(
            TenantId(head.tenant),
            head.revision + 1,
            action,
            entry_id=_id_after(head.last_entry.id, mark, self._clock()),
            detail=detail,
            previous=head.last_entry.link,
        )

    def write_log(self, entry: AuditEntry) -> None:
        """Write an entry's object, unless it is there; if that fails, the next to change the head does so."""
        with contextlib.suppress(Unavailable, Conflict):
            self._write_log(entry)

    def audit(self, tenant: TenantId, *, since_created: bool = False) -> list[AuditEntry]:
        """All changes of a tenant, or those ``since_created``, oldest first; also of one that was deleted.

        Raises
        ------
        NotFound
            There has never been such a tenant.
        """
        head, _ = self._read_any(tenant)
        if since_created:
            return sorted(self.newest_first(tenant, head), key=lambda entry: entry.revision)
        entries = {head.last_entry.revision: head.last_entry}
        for meta in self._store.list(layout.log_prefix(tenant)):
            entry = AuditEntry.decode(self._store.get(meta.key).data, meta.key)
            entries[entry.revision] = entry
        return [entries[revision] for revision in sorted(entries)]

    def last_used(self, tenant: TenantId) -> dict[str, datetime]:
        """When each of a tenant's keys was used last, as the replicas have noted it."""
        used: dict[str, datetime] = {}
        for meta in self._store.list(layout.used_prefix(tenant)):
            key_id = meta.key.rpartition("/")[2].removesuffix(".json")
            # One note that can't be read must not hide all others.
            with contextlib.suppress(NotFound, ValueError, OverflowError, OSError, KeyError, TypeError):
                used[key_id] = utc(float(json.loads(self._store.get(meta.key).data)["used_at"]))
        return used

    def verify(self, tenant: TenantId) -> list[str]:
        """What is wrong with a tenant's log, in words; empty when it is whole.

        Finds an entry that was altered, removed, added or moved. Somebody who can write the whole store could
        make a new chain from the beginning, so keep the last entry's ``link`` elsewhere too.

        Raises
        ------
        NotFound
            There has never been such a tenant.
        """
        head, _ = self._read_any(tenant)
        problems: list[str] = []
        entries: list[AuditEntry] = []
        for meta in self._store.list(layout.log_prefix(tenant)):
            try:
                entry = AuditEntry.decode(self._store.get(meta.key).data, meta.key)
            except Corrupt as error:
                problems.append(error.message)
                continue
            if meta.key != layout.log_key(tenant, entry.id) or entry.tenant != tenant:
                problems.append(f"{meta.key} holds another entry, {entry.id} of {entry.tenant}")
            entries.append(entry)
        latest = self._read_any(tenant)[0].revision  # somebody may have changed the tenant while we read
        return sorted(problems) + chain_problems(head, sorted(entries, key=lambda one: one.id), latest)

    def newest_first(self, tenant: TenantId, head: TenantHead) -> Iterator[AuditEntry]:
        """Changes of a tenant, the newest first, read one by one: for whoever needs only the last few.

        Ends with its newest creation: what is before it was done to another tenant of this id.
        """
        yield head.last_entry
        if head.last_entry.action is Action.TENANT_CREATED:
            return
        # Ids of one tenant rise with its revisions (see _id_after), so key order is their order.
        keys = [meta.key for meta in self._store.list(layout.log_prefix(tenant))]
        for key in sorted(keys, reverse=True):
            if key != layout.log_key(tenant, head.last_entry.id):
                entry = AuditEntry.decode(self._store.get(key).data, key)
                yield entry
                if entry.action is Action.TENANT_CREATED:
                    return

    def _landed(self, entry: AuditEntry, head: TenantHead) -> bool:
        """Whether a swap that was reported as lost has landed after all, since its first answer never came.

        If so, its entry is the head's last one, or it is in the log: whoever changed the head next has
        written it there first.
        """
        if head.last_entry.id == entry.id:
            return True
        try:
            self._store.head(layout.log_key(TenantId(entry.tenant), entry.id))
        except NotFound:
            return False
        return True

    def _read_any(self, tenant: TenantId) -> tuple[TenantHead, str]:
        """Head and ETag, active or deleted."""
        key = layout.head_key(tenant)
        try:
            blob = self._store.get(key)
        except NotFound:
            raise NotFound(f"there is no tenant {tenant}") from None
        return decode_head(tenant, blob.data), blob.meta.etag

    def _entry(
        self,
        tenant: TenantId,
        revision: int,
        action: Action,
        *,
        entry_id: str | None = None,
        alias: AliasName | None = None,
        from_version: int | None = None,
        to_version: int | None = None,
        detail: Mapping[str, str] | None = None,
        previous: str | None = None,
    ) -> AuditEntry:
        now_s = self._clock()
        return AuditEntry(
            id=entry_id or new_ulid(now_s),
            tenant=tenant,
            revision=revision,
            at=utc(now_s),
            actor=self.actor,
            action=action,
            alias=alias,
            from_version=from_version,
            to_version=to_version,
            request_id=self._request_id,
            detail=dict(detail or {}),
            previous=previous,
        )

    def _write_log(self, entry: AuditEntry) -> None:
        with contextlib.suppress(AlreadyExists):
            self._store.put(layout.log_key(TenantId(entry.tenant), entry.id), entry.encode(), Create())


def _id_after(last_id: str, mark: str, now_s: float) -> str:
    """A ULID that sorts after the last entry's, also when this writer's clock is behind."""
    now, last = new_ulid(now_s)[:ULID_TIME_CHARS], last_id[:ULID_TIME_CHARS]
    return (now if now > last else next_ulid_time(last)) + mark


def decode_head(tenant: TenantId, data: bytes) -> TenantHead:
    """Parse a head and check that it is this tenant's.

    Raises
    ------
    Corrupt
        It does not parse, or is another tenant's.
    """
    key = layout.head_key(tenant)
    head = TenantHead.decode(data, key)
    if head.tenant != tenant:
        raise Corrupt(f"{key} is the head of another tenant")
    return head


def select(head: TenantHead, ref: ModelRef) -> int:
    """The version number that a ref means under this head.

    Raises
    ------
    NotFound
        The head has no such alias or version.
    """
    if isinstance(ref.selector, int):
        if ref.selector not in head.versions:
            raise NotFound(f"tenant {ref.tenant} has no version {ref.selector}")
        return ref.selector
    version = head.aliases.get(ref.selector)
    if version is None:
        raise NotFound(f"tenant {ref.tenant} has no alias {ref.selector}")
    if version not in head.versions:  # a head that was brought in from elsewhere may say anything
        raise NotFound(f"{ref} names version {version}, which does not exist")
    return version
