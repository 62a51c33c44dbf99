"""The store's part in erasing a tenant. Each step can be repeated: a rerun finishes what a crash interrupted.

First the tombstone is written, in one swap: from then on nothing resolves the tenant, not even a replica that
starts later. Then the platform erases replicas and nodes. Then the store's objects are removed, with every
version that a bucket has kept of them. The tombstone, the audit log and a record of the erasure stay.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from flatshare_registry import layout
from flatshare_registry.blobs import BlobRemoval, NamedBlobs
from flatshare_registry.errors import Corrupt, InvalidWeights, NotFound
from flatshare_registry.heads import HeadStore
from flatshare_registry.ids import TenantId
from flatshare_registry.records import Action, TenantHead, TenantState, VersionRecord, with_past
from flatshare_registry.stores.base import BlobStore, Overwrite
from flatshare_registry.tenancy import EMPTY
from flatshare_registry.weights import describe

__all__ = ["Eraser", "Leaving", "StoreErasure"]


@dataclass(frozen=True, slots=True)
class Leaving:
    """What a tenant that is being erased still has in the store.

    Attributes
    ----------
    link
        Of the audit entry of the tombstone.
    versions
        Version records that are, or were, there: number and blob.
    tensors
        Digests of all their tensors: files of these names are on the nodes.
    blobs
        Every blob that the tenant ever named.
    """

    tenant: TenantId
    link: str
    versions: tuple[tuple[int, str], ...]
    tensors: tuple[str, ...]
    blobs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoreErasure:
    """What went from the store.

    Attributes
    ----------
    removed_blobs, kept_blobs
        Digests; those that are kept are another tenant's too.
    objects
        Objects that went, each version that a bucket had kept counted.
    versions_checked
        False if the store can't list versions: then it is not known whether it keeps earlier ones.
    """

    removed_blobs: tuple[str, ...]
    kept_blobs: tuple[str, ...]
    objects: int
    versions_checked: bool


class Eraser:
    """Erases tenants from one store.

    Parameters
    ----------
    store
        Where.
    heads
        Names who does it, in the audit entry.
    """

    def __init__(self, store: BlobStore, heads: HeadStore) -> None:
        self._store = store
        self._heads = heads

    def begin(self, tenant: TenantId) -> Leaving:
        """Write the tombstone, unless it is there, and find out what is left.

        Raises
        ------
        NotFound
            There has never been such a tenant.
        """

        def bury(head: TenantHead) -> TenantHead:
            if head.state is TenantState.ERASED:
                return head
            return with_past(head, head.versions.values()).model_copy(
                update={**EMPTY, "state": TenantState.ERASED}
            )

        head = self._heads.change(tenant, Action.TENANT_ERASED, bury, also_deleted=True)
        # What an interrupted erasure has found counts too: its objects may be gone by now.
        known = self._plan(tenant)
        versions = {(number, digest) for number, digest in known["versions"]}
        tensors = set(known["tensors"])
        for meta in self._store.list(layout.versions_prefix(tenant)):
            # Also records that no head names, of registrations that were cut short. One that can't be read
            # names nothing that could be found; it goes all the same.
            with contextlib.suppress(Corrupt, NotFound):
                record = VersionRecord.decode(self._store.get(meta.key).data, meta.key)
                versions.add((record.version, record.digest))
                tensors.update(one.sha256 for one in record.tensors)
        blobs = {*head.past_digests, *(digest for _, digest in versions)}
        for digest in blobs - {digest for _, digest in versions}:
            # Of a version that was deleted: its tensors may still lie on a node.
            with contextlib.suppress(NotFound, InvalidWeights):
                blob = self._store.get(layout.blob_key(digest)).data
                tensors.update(one.sha256 for one in describe(blob).tensors)
        plan = {"versions": sorted(versions), "tensors": sorted(tensors)}
        self._store.put(layout.erasure_plan_key(tenant), json.dumps(plan).encode(), Overwrite())
        return Leaving(
            tenant,
            head.last_entry.link,
            tuple(sorted(versions)),
            tuple(sorted(tensors)),
            tuple(sorted(blobs)),
        )

    def finish(self, leaving: Leaving) -> None:
        """Delete the plan: all of it is done, and the record of the erasure is written."""
        # What was still being written meanwhile.
        self._store.purge_all(layout.used_prefix(leaving.tenant))
        self._store.purge_all(layout.pins_prefix(leaving.tenant))
        self._store.purge_all(layout.open_tasks_prefix(leaving.tenant))
        self._store.purge_all(layout.tasks_prefix(leaving.tenant))
        self._store.purge_all(layout.task_inputs_prefix(leaving.tenant))
        self._store.purge(layout.erasure_plan_key(leaving.tenant))

    def _plan(self, tenant: TenantId) -> dict[str, list[Any]]:
        try:
            found = json.loads(self._store.get(layout.erasure_plan_key(tenant)).data)
            return {"versions": list(found["versions"]), "tensors": list(found["tensors"])}
        except NotFound:
            return {"versions": [], "tensors": []}
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"the plan of the erasure of {tenant} can't be read") from error

    def remove(
        self, leaving: Leaving, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> StoreErasure:
        """Remove what the tenant alone has.

        Parameters
        ----------
        progress
            Called with steps done and steps in all.
        """
        tenant = leaving.tenant
        versions_checked = self._store.shows_versions(layout.head_key(tenant))  # the tombstone is there
        others = NamedBlobs(self._store, but=tenant)
        removal = BlobRemoval(self._store, layout.erasure_held_prefix(tenant), others)
        removal.restore()
        named = others.now()
        kept = [digest for digest in leaving.blobs if digest in named]
        going = [digest for digest in leaving.blobs if digest not in named]
        objects, steps = 0, len(going) + 1
        for done, digest in enumerate(going, start=1):
            objects += removal.take(digest)
            progress(done, steps)
        # A tenant that registered the same weights meanwhile gets them back; only then do the copies go.
        for digest in removal.settle(going):
            going.remove(digest)
            kept.append(digest)
        for prefix in (
            layout.used_prefix(tenant), layout.pins_prefix(tenant), layout.versions_prefix(tenant),
            layout.open_tasks_prefix(tenant), layout.tasks_prefix(tenant), layout.task_inputs_prefix(tenant),
        ):  # fmt: skip
            objects += self._store.purge_all(prefix)
        # Earlier states of the head named keys, aliases and notes.
        objects += self._store.purge(layout.head_key(tenant), keep_latest=True)
        progress(steps, steps)
        return StoreErasure(tuple(going), tuple(sorted(kept)), objects, versions_checked)

    def unnamed_tensors(self, tenant: TenantId, tensors: Collection[str]) -> set[str]:
        """Those of the given tensors that no other tenant's version has: nobody has a reason to keep them.

        Reads every version record of every other tenant, until all are accounted for.
        """
        left = set(tensors)
        for meta in self._store.list(layout.TENANTS):
            found = layout.version_of(meta.key)
            if not left:
                break
            if found is not None and found[0] != tenant:
                with contextlib.suppress(NotFound, Corrupt):
                    record = VersionRecord.decode(self._store.get(meta.key).data, meta.key)
                    left -= {one.sha256 for one in record.tensors}
        return left
