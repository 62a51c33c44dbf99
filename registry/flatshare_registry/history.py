"""What a tenant's audit log tells: a page of it, and where an alias pointed before."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor

from flatshare_registry import layout
from flatshare_registry.errors import AliasMoved, NotFound
from flatshare_registry.ids import AliasName, TenantId
from flatshare_registry.records import Action, AuditEntry, TenantHead
from flatshare_registry.stores.base import BlobStore

__all__ = ["audit_page", "since_created", "version_before"]


def audit_page(
    store: BlobStore, head: TenantHead, limit: int, before: str | None, threads: Executor
) -> tuple[list[AuditEntry], bool]:
    """See :meth:`flatshare_registry.Registry.audit_page`.

    Parameters
    ----------
    head
        The tenant's; its last entry's object may not be written yet.
    threads
        Read the entries.
    """
    last, tenant = head.last_entry, TenantId(head.tenant)
    last_key, end = layout.log_key(tenant, last.id), before and layout.log_key(tenant, before)
    keys = {last_key, *(meta.key for meta in store.list(layout.log_prefix(tenant)))}
    # Ids of one tenant rise with its revisions, so key order is their order.
    older = sorted(key for key in keys if end is None or key < end)

    def read(key: str) -> AuditEntry:
        return last if key == last_key else AuditEntry.decode(store.get(key).data, key)

    return list(threads.map(read, older[max(len(older) - limit, 0) :])), len(older) > limit


def since_created(head: TenantHead, page: tuple[list[AuditEntry], bool]) -> tuple[list[AuditEntry], bool]:
    """A page without the entries of another tenant, who had the same id before it was given out again."""
    entries, more = page
    own = [entry for entry in entries if entry.at >= head.created_at]
    for index in reversed(range(len(own))):
        if own[index].action is Action.TENANT_CREATED:
            return own[index:], False
    return own, more and len(own) == len(entries)


def version_before(
    head: TenantHead, alias: AliasName, newest_first: Iterable[AuditEntry], expected: int | None
) -> int:
    """The version that a rollback of an alias leads to. See :meth:`flatshare_registry.Registry.rollback`.

    Raises
    ------
    NotFound, AliasMoved
        As there.
    """
    current = head.aliases.get(alias)
    if current is None:
        raise NotFound(f"tenant {head.tenant} has no alias {alias}")
    moves = (one for one in newest_first if one.alias == alias)
    if expected not in (None, current):
        last = next(moves, None)
        undone = (Action.ALIAS_ROLLED_BACK, expected, current)
        if last is not None and (last.action, last.from_version, last.to_version) == undone:
            return current  # it is done already
        raise AliasMoved(f"{head.tenant}:{alias} names version {current}, not {expected}")
    for move in moves:
        if move.to_version == current and move.from_version is not None:
            if move.from_version not in head.versions:
                raise NotFound(
                    f"{head.tenant}:{alias} named version {move.from_version} before, which is deleted"
                )
            return move.from_version
    raise NotFound(f"{head.tenant}:{alias} has named no version before {current}")
