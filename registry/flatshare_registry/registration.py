"""How a version comes to be: the steps of a registration, in the order that makes a crash harmless.

Validate locally -> put the blob if absent -> create the version record -> swap the head. Until the
last step readers see nothing of it, and a retry takes up what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from flatshare_registry import layout
from flatshare_registry.blobs import BlobRemoval, NamedBlobs, put_if_gone, put_shared
from flatshare_registry.errors import AlreadyExists, InvalidInput, NotFound, Unavailable
from flatshare_registry.heads import MAX_SWAP_TRIES, HeadStore
from flatshare_registry.ids import PRODUCTION, AliasName, TenantId
from flatshare_registry.records import Action, TenantHead, VersionRecord, utc
from flatshare_registry.stores.base import BlobStore, Create
from flatshare_registry.weights import TensorSpec, WeightsFile, check_architecture, describe

__all__ = ["Probe", "Registered", "Registrar"]

Probe = Callable[[bytes | memoryview], tuple[float, ...]]
"""Runs weights on their architecture's probe input; raises to refuse weights that do not run."""

MAX_VERSIONS: Final = 1000
"""Most live versions of one tenant: all are named in its head, which every replica re-reads."""

MAX_METADATA_CHARS: Final = 4096
"""Keys and values of a version's metadata, all together."""


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


class Registrar:
    """Registers versions; what :meth:`flatshare_registry.catalog.Registry.register` runs."""

    def __init__(
        self,
        store: BlobStore,
        heads: HeadStore,
        actor: str,
        clock: Callable[[], float],
        create_tenant: Callable[[TenantId], TenantHead],
    ) -> None:
        self._store = store
        self._heads = heads
        self._actor = actor
        self._clock = clock
        self._create_tenant = create_tenant

    def register(
        self,
        tenant: TenantId,
        weights: bytes | memoryview,
        architecture: str,
        wanted: Mapping[str, TensorSpec],
        *,
        alias: AliasName | None,
        metadata: Mapping[str, str] | None,
        probe: Probe | None,
        create: bool,
    ) -> Registered:
        """Register weights. An alias is set in the same step, but not on a version that was there already.

        A missing tenant is created, if that is wanted, once all checks have passed and the weights are
        stored: a registration that fails leaves no empty tenant.
        """
        described = describe(weights)
        check_architecture(described.tensors, architecture, wanted)
        notes = dict(metadata or {})
        if sum(len(key) + len(value) for key, value in notes.items()) > MAX_METADATA_CHARS:
            raise InvalidInput(f"metadata is longer than {MAX_METADATA_CHARS} characters")

        missing = False
        try:
            known = self._find_equal(tenant, self._heads.read(tenant), described, architecture)
        except NotFound:
            if not create:
                raise
            known, missing = None, True
        if known is not None:
            self._mend_blob(described.digest, weights)
            return Registered(known, created=False)
        logits = probe(weights) if probe is not None else None
        new_blob = self._put_blob(described.digest, weights)
        if missing:
            self._make_tenant(tenant, described.digest if new_blob else None)
        try:
            record = self._create_record(tenant, described, architecture, notes, logits)
        except NotFound:
            self._take_back(described.digest if new_blob else None)
            raise
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
            self._store.delete(layout.version_key(tenant, record.version))
        except NotFound:  # the tenant was deleted or erased meanwhile: leave nothing of it
            self._store.purge(layout.version_key(tenant, record.version))
            self._take_back(described.digest if new_blob else None)
            raise
        self._mend_blob(described.digest, weights)
        return Registered(winner, created=winner.version == record.version)

    def _make_tenant(self, tenant: TenantId, new_blob: str | None) -> None:
        """Create the tenant, unless somebody else was faster."""
        try:
            self._create_tenant(tenant)
        except AlreadyExists:
            try:
                self._heads.read(tenant)
            except NotFound:  # erased: its id is not given out again
                self._take_back(new_blob)
            else:
                return
            raise

    def _find_equal(
        self, tenant: TenantId, head: TenantHead, described: WeightsFile, architecture: str
    ) -> VersionRecord | None:
        """The tenant's committed version with these weights, if it has one."""
        for number, digest in head.versions.items():
            if digest == described.digest:
                record = self._heads.record(head, number)
                if record.architecture == architecture:
                    return record
        return None

    def _mend_blob(self, digest: str, weights: bytes | memoryview) -> None:
        """Put the blob there again if an erasure of another tenant took it while this one came to name it."""
        put_if_gone(self._store, layout.blob_key(digest), weights)

    def _take_back(self, digest: str | None) -> None:
        """Remove a blob that this registration put there, unless somebody else came to name it meanwhile."""
        if digest is not None:
            named = NamedBlobs(self._store)
            if digest not in named.now():
                removal = BlobRemoval(self._store, layout.HELD, named)
                removal.take(digest)
                removal.settle([digest])

    def _put_blob(self, digest: str, weights: bytes | memoryview) -> bool:
        """Put the blob there; returns whether it was missing."""
        return put_shared(self._store, layout.blob_key(digest), weights)

    def _create_record(
        self,
        tenant: TenantId,
        described: WeightsFile,
        architecture: str,
        notes: dict[str, str],
        probe_logits: tuple[float, ...] | None,
    ) -> VersionRecord:
        """Claim the next free number by creating its record; not visible until the head names it."""
        number = self._heads.read(tenant).next_version
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
                probe_logits=probe_logits,
            )
            try:
                self._store.put(layout.version_key(tenant, number), record.encode(), Create())
            except AlreadyExists:
                # Another registration's number, or one that a crash left behind: take the next.
                number = max(number + 1, self._heads.read(tenant).next_version)
                continue
            return record
        raise Unavailable(f"tenant {tenant}: {MAX_SWAP_TRIES} version numbers in a row were taken")


class _NothingToDo(Exception):
    """The head already holds what was wanted."""
