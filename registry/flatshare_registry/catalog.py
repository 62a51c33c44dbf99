"""The registry: tenants, their versions and aliases, over a blob store.

Every change of a tenant is one compare-and-swap of its head (``heads.py``; for registrations also
``registration.py``). Readers believe the head alone, so a crash between any two steps leaves them
with the old state, and a retry finishes. What a crash left behind, :mod:`flatshare_registry.gc` collects.
This module is long because it is what callers see: one verb after the other, with what each promises and
raises.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from flatshare_registry import layout
from flatshare_registry.erasure import Eraser
from flatshare_registry.errors import AlreadyExists, NotFound, StillReferenced, Unavailable
from flatshare_registry.heads import HeadStore, select
from flatshare_registry.history import audit_page, since_created, version_before
from flatshare_registry.ids import PRODUCTION, AliasName, ModelRef, TenantId
from flatshare_registry.pins import Pins
from flatshare_registry.records import (
    Action,
    AuditEntry,
    TenantHead,
    TenantState,
    VersionRecord,
    utc,
    with_past,
)
from flatshare_registry.registration import Probe, Registered, Registrar
from flatshare_registry.stores.base import BlobStore
from flatshare_registry.tenancy import EMPTY, Tenancy
from flatshare_registry.weights import TensorSpec

__all__ = ["Registry"]

LIST_THREADS: Final = 16
"""Heads read at a time by a listing: below the 32 connections of one S3 client."""


class Registry:
    """Tenants, versions, aliases, audit.

    Holds no state of its own: any number may work on one store, from any number of processes.
    All methods are blocking and may be called from several threads.

    Parameters
    ----------
    store
        Where the objects are.
    actor, request_id
        Who is named in audit entries, and by which request.
    clock
        POSIX seconds.

    Attributes
    ----------
    tenancy
        Keys, quotas, suspension.
    eraser
        Erasure, as far as the store goes.
    pins
        What every replica keeps resident.
    feed
        Which heads are about to change.

    Notes
    -----
    Every method raises ``Unavailable`` when the store does not answer, and ``Corrupt`` when
    what it holds can't be read; nothing has been changed half by then.
    """

    def __init__(
        self,
        store: BlobStore,
        *,
        actor: str = "unknown",
        request_id: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.actor = actor
        self._clock = clock
        self._heads = HeadStore(store, actor, clock, request_id)
        self._registrar = Registrar(store, self._heads, actor, clock, self.create_tenant)
        self.tenancy = Tenancy(self._heads)
        self.eraser = Eraser(store, self._heads)
        self.pins = Pins(store, self._heads)
        self.feed = self._heads.feed

    def acting_as(self, actor: str, request_id: str | None = None) -> Registry:
        """The same registry, for changes that somebody else makes."""
        return Registry(self.store, actor=actor, request_id=request_id, clock=self._clock)

    # -- tenants

    def create_tenant(self, tenant: TenantId) -> TenantHead:
        """Create a tenant, or bring a deleted id back empty (its version numbers go on).

        Raises
        ------
        AlreadyExists
            There is a tenant of this id, or one was erased: a caller that still holds a ref of the erased one
            must not reach somebody else.
        """
        try:
            return self._heads.create(tenant)
        except AlreadyExists:
            now = utc(self._clock())

            def revive(head: TenantHead) -> TenantHead:
                if head.state.exists:
                    raise AlreadyExists(f"tenant {tenant} already exists")
                if head.state is TenantState.ERASED:
                    raise AlreadyExists(f"a tenant {tenant} was erased; its id is not given out again")
                return head.model_copy(update={**EMPTY, "state": TenantState.ACTIVE, "created_at": now})

            return self._heads.change(tenant, Action.TENANT_CREATED, revive, also_deleted=True)

    def list_tenants(self) -> list[TenantHead]:
        """Heads of all tenants, suspended ones too, by id. One GET each, ``LIST_THREADS`` at a time."""
        with ThreadPoolExecutor(LIST_THREADS) as threads:
            heads = threads.map(self._active_head, self.all_ids())
            return [head for head in heads if head is not None]

    def all_ids(self) -> list[TenantId]:
        """Ids of all tenants that there ever were, deleted and erased ones too."""
        texts = (layout.tenant_of_head(meta.key) for meta in self.store.list(layout.TENANTS))
        return sorted(TenantId(text) for text in texts if text is not None)

    def any_head(self, tenant: TenantId) -> TenantHead:
        """A tenant's head, also of one that is suspended, deleted or erased: to tell others what it is now.

        Raises
        ------
        NotFound
            There has never been such a tenant.
        """
        return self._heads.read_any(tenant)

    def last_entry(self, tenant: TenantId) -> AuditEntry:
        """The newest entry of a tenant's log, also of one that was deleted or erased.

        Raises
        ------
        NotFound
            There has never been such a tenant.
        """
        return self._heads.read_any(tenant).last_entry

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
        leftovers = [meta.key for prefix in _leftovers(tenant) for meta in self.store.list(prefix)]
        # A delete may come late: a tenant that is given this id meanwhile must not use these numbers.
        numbers = [found[1] for found in map(layout.version_of, leftovers) if found is not None]
        try:
            self._heads.change(
                tenant,
                Action.TENANT_DELETED,
                lambda head: with_past(head, head.versions.values()).model_copy(
                    update={
                        **EMPTY,
                        "state": TenantState.DELETED,
                        "next_version": max([head.next_version, *(number + 1 for number in numbers)]),
                    }
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
        probe: Probe | None = None,
        create: bool = False,
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
        probe
            Runs the weights once, before anything is stored; the answer is kept with the version, and
            every replica compares its own with it (``flatshare.models.probe``). This package has no
            torch; None registers without.
        create
            Make the tenant if it is missing: with this version, or not at all.

        Raises
        ------
        InvalidWeights
            The file is malformed or not of this architecture; the store has not been touched.
        NotFound
            No such tenant, and ``create`` is False.
        AlreadyExists
            ``create`` is True, and a tenant of this id was erased.
        """
        done = self._registrar.register(
            tenant, weights, architecture, wanted, alias=alias, metadata=metadata, probe=probe, create=create
        )
        if alias is not None and not done.created:
            self.set_alias(tenant, alias, done.version.version)
        return done

    def version(self, tenant: TenantId, version: int) -> VersionRecord:
        """One version's record.

        Raises
        ------
        NotFound
            The tenant has no such version.
        """
        return self.record(self.head(tenant), version)

    def record(self, head: TenantHead, version: int) -> VersionRecord:
        """The record of a version that a head names: for views that hold heads. Raises as :meth:`version`."""
        return self._heads.record(head, version)

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
            return with_past(head, [head.versions[version]]).model_copy(update={"versions": kept})

        self._heads.change(tenant, Action.VERSION_DELETED, remove, from_version=version)
        self.store.delete(layout.version_key(tenant, version))
        self.store.delete(layout.pin_key(ModelRef(tenant, version)))

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

        head = self._heads.change(tenant, Action.ALIAS_REMOVED, remove, alias=alias)
        with contextlib.suppress(Unavailable):  # the change has landed, and a pin of nothing harms nobody
            self.store.delete(layout.pin_key(ModelRef(tenant, alias)))
        return head

    def rollback(
        self, tenant: TenantId, alias: AliasName = PRODUCTION, *, expected: int | None = None
    ) -> TenantHead:
        """Point an alias back at what it named before its last move, as the audit log tells.

        Rolling back twice returns to where it was: a rollback is a move like any other. With ``expected`` it
        can be done again without harm.

        Parameters
        ----------
        expected
            The version that the alias names now and should name no longer. If its last move was the rollback
            from that version, nothing is changed: it is done already.

        Raises
        ------
        NotFound
            No such tenant or alias, or the alias never named another version that still exists.
        AliasMoved
            The alias does not name the expected version, and was not rolled back from it either.
        """

        def previous(head: TenantHead) -> int:
            return version_before(head, alias, self._heads.newest_first(tenant, head), expected)

        return self._move_alias(tenant, alias, previous, Action.ALIAS_ROLLED_BACK)

    # -- audit

    def audit(self, tenant: TenantId, *, since_created: bool = False) -> list[AuditEntry]:
        """All changes of a tenant, oldest first; also of one that was deleted.

        A tenant itself may read those ``since_created``: its id may have been another customer's before.

        Raises
        ------
        NotFound
            There has never been such a tenant.
        """
        return self._heads.audit(tenant, since_created=since_created)

    def audit_page(
        self, tenant: TenantId, limit: int, before: str | None = None, *, own: bool = False
    ) -> tuple[list[AuditEntry], bool]:
        """The newest changes of a tenant, or the newest before an entry; also of one that was deleted.

        Parameters
        ----------
        limit
            Most entries that are read.
        before
            An entry's id.
        own
            Only this tenant's entries, not those of an earlier tenant with the same id.

        Returns
        -------
        entries, more
            Oldest first; and whether there are older ones.

        Raises
        ------
        NotFound
            There has never been such a tenant.
        """
        with ThreadPoolExecutor(LIST_THREADS) as threads:
            head = self.any_head(tenant)
            page = audit_page(self.store, head, limit, before, threads)
            return since_created(head, page) if own else page

    def note(self, tenant: TenantId, action: Action, detail: Mapping[str, str]) -> None:
        """Write an audit entry of something that is done with a tenant outside the registry.

        It is written before the act: an entry without an act is noticed sooner than an act without an entry.

        Raises
        ------
        NotFound
            No such tenant.
        """
        self._heads.change(tenant, action, lambda head: head, entry_only=True, tell=lambda old, new: detail)

    def verify_audit(self, tenant: TenantId) -> list[str]:
        """What is wrong with a tenant's audit log, in words; empty when its chain is whole.

        Raises
        ------
        NotFound
            There has never been such a tenant.
        """
        return self._heads.verify(tenant)

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


def _leftovers(tenant: TenantId) -> tuple[str, ...]:
    """Prefixes of what a tenant has beside its head and log."""
    return (
        layout.versions_prefix(tenant), layout.used_prefix(tenant), layout.pins_prefix(tenant),
        layout.open_tasks_prefix(tenant), layout.tasks_prefix(tenant),
    )  # fmt: skip
