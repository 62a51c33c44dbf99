"""The registry: tenants, their versions and aliases, over a blob store.

Every change of a tenant is one compare-and-swap of its head. The order of a registration is:
validate locally -> put the blob if absent -> create the version record -> swap the head. Readers
believe the head alone, so a crash between any two steps leaves them with the old state, and a
retry finishes. What a crash left behind is collected by :mod:`flatshare_registry.gc`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from flatshare_registry import layout
from flatshare_registry.errors import (
    AlreadyExists,
    Corrupt,
    InvalidInput,
    NotFound,
    StillReferenced,
    Unavailable,
)
from flatshare_registry.heads import MAX_SWAP_TRIES, HeadStore
from flatshare_registry.ids import PRODUCTION, AliasName, ModelRef, TenantId
from flatshare_registry.records import (
    Action,
    AuditEntry,
    TenantHead,
    TenantState,
    VersionRecord,
    utc,
)
from flatshare_registry.stores.base import BlobStore, Create, Overwrite
from flatshare_registry.weights import TensorSpec, WeightsFile, check_architecture, describe

__all__ = ["BLOB_REFRESH_S", "Registered", "Registry"]

BLOB_REFRESH_S: Final = 3600.0
"""A blob that is already there and older than this is written again when a registration reuses it,
so that ``gc`` (whose grace period is never shorter than twice this) can't take it in the meantime."""

MAX_VERSIONS: Final = 1000
"""Most live versions of one tenant: all are named in its head, which every replica re-reads."""

MAX_METADATA_CHARS: Final = 4096
"""Keys and values of a version's metadata, all together."""

LIST_THREADS: Final = 16
"""Heads read at a time by a listing: below the 32 connections of one S3 client."""


@dataclass(frozen=True, slots=True)
class Registered:
    """Outcome of a registration.

    Attributes
    ----------
    created
        False when the tenant already had a version with these weights; that one is returned.
    """

    version: VersionRecord
    created: bool


class Registry:
    """Tenants, versions, aliases, audit.

    Holds no state of its own: any number may work on one store, from any number of processes.
    All methods are blocking and may be called from several threads.

    Parameters
    ----------
    store
        Where the objects are.
    actor
        Who is named in audit entries.
    clock
        POSIX seconds.

    Notes
    -----
    Every method raises ``Unavailable`` when the store does not answer, and ``Corrupt`` when
    what it holds can't be read; nothing has been changed half by then.
    """

    def __init__(
        self, store: BlobStore, *, actor: str = "unknown", clock: Callable[[], float] = time.time
    ) -> None:
        self.store = store
        self._actor = actor
        self._clock = clock
        self._heads = HeadStore(store, actor, clock)

    # -- tenants

    def create_tenant(self, tenant: TenantId) -> TenantHead:
        """Create a tenant, or bring a deleted id back empty (its version numbers go on).

        Raises
        ------
        AlreadyExists
            There is an active tenant of this id.
        """
        try:
            return self._heads.create(tenant)
        except AlreadyExists:
            now = utc(self._clock())

            def revive(head: TenantHead) -> TenantHead:
                if head.state is TenantState.ACTIVE:
                    raise AlreadyExists(f"tenant {tenant} already exists")
                return head.model_copy(
                    update={"state": TenantState.ACTIVE, "versions": {}, "aliases": {}, "created_at": now}
                )

            return self._heads.change(tenant, Action.TENANT_CREATED, revive, also_deleted=True)

    def list_tenants(self) -> list[TenantHead]:
        """Heads of all active tenants, by id. One GET a tenant, ``LIST_THREADS`` at a time."""
        texts = (layout.tenant_of_head(meta.key) for meta in self.store.list(layout.TENANTS))
        tenants = sorted(TenantId(text) for text in texts if text is not None)
        with ThreadPoolExecutor(LIST_THREADS) as threads:
            heads = threads.map(self._active_head, tenants)
            return [head for head in heads if head is not None]

    def head(self, tenant: TenantId) -> TenantHead:
        """A tenant's aliases and versions as of now.

        Raises
        ------
        NotFound
            No such tenant.
        """
        return self._heads.read(tenant)

    def head_unless(self, tenant: TenantId, etag: str | None) -> tuple[TenantHead, str] | None:
        """A tenant's head with its ETag, or None when it still has this ETag: for views that poll.

        Raises
        ------
        NotFound
            No such tenant.
        """
        return self._heads.read_unless(tenant, etag)

    def delete_tenant(self, tenant: TenantId) -> None:
        """Delete a tenant: from the first step on nobody resolves it; then its version records go.

        Blobs that nobody names any more are left to ``gc``; the audit log and an empty head stay.
        Run again after a crash, it finishes.

        Raises
        ------
        NotFound
            No such tenant, and nothing of it left over.
        """
        leftovers = [meta.key for meta in self.store.list(layout.versions_prefix(tenant))]
        try:
            self._heads.change(
                tenant,
                Action.TENANT_DELETED,
                lambda head: head.model_copy(
                    update={"state": TenantState.DELETED, "versions": {}, "aliases": {}}
                ),
            )
        except NotFound:
            if not leftovers:
                raise
        for key in leftovers:
            self.store.delete(key)

    # -- versions

    def register(
        self,
        tenant: TenantId,
        weights: bytes | memoryview,
        architecture: str,
        wanted: Mapping[str, TensorSpec],
        *,
        alias: AliasName | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Registered:
        """Register weights as the tenant's next version; idempotent for equal weights.

        Parameters
        ----------
        weights
            A whole safetensors file.
        architecture, wanted
            Its architecture's name and tensors; the file must hold exactly these.
        alias
            Also point this alias at the version, in the same step. A tenant's first version
            becomes ``production`` without being asked.
        metadata
            Short strings to keep with the version (what trained it, on what).

        Raises
        ------
        InvalidWeights
            The file is malformed or not of this architecture; the store has not been touched.
        NotFound
            No such tenant.
        """
        described = describe(weights)
        check_architecture(described.tensors, architecture, wanted)
        notes = dict(metadata or {})
        if sum(len(key) + len(value) for key, value in notes.items()) > MAX_METADATA_CHARS:
            raise InvalidInput(f"metadata is longer than {MAX_METADATA_CHARS} characters")

        known = self._find_equal(tenant, self.head(tenant), described, architecture)
        if known is not None:
            if alias is not None:
                self.set_alias(tenant, alias, known.version)
            return Registered(known, created=False)
        self._put_blob(described.digest, weights)
        record = self._create_record(tenant, described, architecture, notes)
        winner = record

        def commit(head: TenantHead) -> TenantHead:
            nonlocal winner
            # Somebody else may have committed equal weights since we looked.
            winner = self._find_equal(tenant, head, described, architecture) or record
            if winner.version != record.version:
                raise _NothingToDo
            if record.version in head.versions:
                return head  # our own swap landed although its answer was lost
            if len(head.versions) >= MAX_VERSIONS:
                raise InvalidInput(
                    f"tenant {tenant} has {MAX_VERSIONS} versions, the limit; delete some first"
                )
            names = {alias} if alias is not None else set()
            if not head.versions:
                names.add(PRODUCTION)
            return head.model_copy(
                update={
                    "versions": {**head.versions, record.version: record.digest},
                    "aliases": {**head.aliases, **{str(name): record.version for name in names}},
                    "next_version": max(head.next_version, record.version + 1),
                }
            )

        try:
            self._heads.change(
                tenant, Action.VERSION_REGISTERED, commit, alias=alias, to_version=record.version
            )
        except _NothingToDo:
            self.store.delete(layout.version_key(tenant, record.version))
            if alias is not None:
                self.set_alias(tenant, alias, winner.version)
        return Registered(winner, created=winner.version == record.version)

    def version(self, tenant: TenantId, version: int) -> VersionRecord:
        """One version's record.

        Raises
        ------
        NotFound
            The tenant has no such version.
        """
        return self.record(self.head(tenant), version)

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
            record = VersionRecord.decode(self.store.get(key).data, key)
        except NotFound as error:
            raise Corrupt(f"{key} is named by its tenant's head but is gone") from error
        if (record.tenant, record.version, record.digest) != (head.tenant, version, digest):
            raise Corrupt(f"{key} does not describe the version that its tenant's head names")
        return record

    def list_versions(self, tenant: TenantId) -> list[VersionRecord]:
        """All versions of a tenant, oldest first.

        Raises
        ------
        NotFound
            No such tenant.
        """
        head = self.head(tenant)
        return [self.record(head, number) for number in sorted(head.versions)]

    def resolve(self, ref: ModelRef) -> VersionRecord:
        """The version that a ref means now.

        Raises
        ------
        NotFound
            No such tenant, alias or version.
        """
        head = self.head(ref.tenant)
        return self.record(head, select(head, ref))

    def delete_version(self, tenant: TenantId, version: int) -> None:
        """Delete a version that no alias names.

        Raises
        ------
        StillReferenced
            An alias names it.
        NotFound
            The tenant has no such version.
        """

        def remove(head: TenantHead) -> TenantHead:
            if version not in head.versions:
                raise NotFound(f"tenant {tenant} has no version {version}")
            names = sorted(name for name, number in head.aliases.items() if number == version)
            if names:
                raise StillReferenced(
                    f"{tenant}@{version} is what {', '.join(names)} names; move the alias first"
                )
            kept = {number: digest for number, digest in head.versions.items() if number != version}
            return head.model_copy(update={"versions": kept})

        self._heads.change(tenant, Action.VERSION_DELETED, remove, from_version=version)
        self.store.delete(layout.version_key(tenant, version))

    # -- aliases

    def set_alias(self, tenant: TenantId, alias: AliasName, version: int) -> TenantHead:
        """Point an alias at a version. Setting it to what it is changes nothing.

        Raises
        ------
        NotFound
            No such tenant or version.
        """
        return self._move_alias(tenant, alias, lambda _: version, Action.ALIAS_SET)

    def remove_alias(self, tenant: TenantId, alias: AliasName) -> TenantHead:
        """Remove an alias.

        Raises
        ------
        NotFound
            No such tenant or alias.
        """

        def remove(head: TenantHead) -> TenantHead:
            if alias not in head.aliases:
                raise NotFound(f"tenant {tenant} has no alias {alias}")
            return head.model_copy(update={"aliases": {k: v for k, v in head.aliases.items() if k != alias}})

        return self._heads.change(tenant, Action.ALIAS_REMOVED, remove, alias=alias)

    def rollback(self, tenant: TenantId, alias: AliasName = PRODUCTION) -> TenantHead:
        """Point an alias back at what it named before its last move, as the audit log tells.

        Rolling back twice returns to where it was: a rollback is a move like any other.

        Raises
        ------
        NotFound
            No such tenant or alias, or the alias never named another version that still exists.
        """

        def previous(head: TenantHead) -> int:
            current = head.aliases.get(alias)
            if current is None:
                raise NotFound(f"tenant {tenant} has no alias {alias}")
            for entry in self._heads.newest_first(tenant, head):
                if entry.alias == alias and entry.to_version == current and entry.from_version is not None:
                    if entry.from_version not in head.versions:
                        raise NotFound(
                            f"{tenant}:{alias} named version {entry.from_version} before, which is deleted"
                        )
                    return entry.from_version
            raise NotFound(f"{tenant}:{alias} has named no version before {current}")

        return self._move_alias(tenant, alias, previous, Action.ALIAS_ROLLED_BACK)

    # -- audit

    def audit(self, tenant: TenantId) -> list[AuditEntry]:
        """All changes of a tenant, oldest first; also of one that was deleted.

        Raises
        ------
        NotFound
            There has never been such a tenant.
        """
        return self._heads.audit(tenant)

    # -- how it is done

    def _active_head(self, tenant: TenantId) -> TenantHead | None:
        try:
            return self.head(tenant)
        except NotFound:
            return None

    def _move_alias(
        self,
        tenant: TenantId,
        alias: AliasName,
        target: Callable[[TenantHead], int],
        action: Action,
    ) -> TenantHead:
        def move(head: TenantHead) -> TenantHead:
            version = target(head)
            if version not in head.versions:
                raise NotFound(f"tenant {tenant} has no version {version}")
            return head.model_copy(update={"aliases": {**head.aliases, str(alias): version}})

        return self._heads.change(tenant, action, move, alias=alias)

    def _find_equal(
        self, tenant: TenantId, head: TenantHead, described: WeightsFile, architecture: str
    ) -> VersionRecord | None:
        """The tenant's committed version with these weights, if it has one."""
        for number, digest in head.versions.items():
            if digest == described.digest:
                record = self.record(head, number)
                if record.architecture == architecture:
                    return record
        return None

    def _put_blob(self, digest: str, weights: bytes | memoryview) -> None:
        key = layout.blob_key(digest)
        try:
            self.store.put(key, weights, Create())
        except AlreadyExists:
            try:
                stale = self._clock() - self.store.head(key).modified_s > BLOB_REFRESH_S
            except NotFound:  # collected between the two calls
                stale = True
            if stale:
                self.store.put(key, weights, Overwrite())

    def _create_record(
        self, tenant: TenantId, described: WeightsFile, architecture: str, notes: dict[str, str]
    ) -> VersionRecord:
        """Claim the next free number by creating its record; not visible until the head names it."""
        number = self.head(tenant).next_version
        for _ in range(MAX_SWAP_TRIES):
            record = VersionRecord(
                tenant=tenant,
                version=number,
                architecture=architecture,
                digest=described.digest,
                size_bytes=described.size_bytes,
                tensors=described.tensors,
                created_at=utc(self._clock()),
                created_by=self._actor,
                metadata=notes,
            )
            try:
                self.store.put(layout.version_key(tenant, number), record.encode(), Create())
            except AlreadyExists:
                # Another registration's number, or one that a crash left behind: take the next.
                number = max(number + 1, self.head(tenant).next_version)
                continue
            return record
        raise Unavailable(f"tenant {tenant}: {MAX_SWAP_TRIES} version numbers in a row were taken")


class _NothingToDo(Exception):
    """The head already holds what was wanted."""


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
    return version
