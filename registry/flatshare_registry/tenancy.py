"""Who may use a tenant, and how much: API keys, plan and quotas, suspension; one swap of the head each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from flatshare_registry.errors import AlreadyExists, InvalidInput, NotFound
from flatshare_registry.heads import HeadStore
from flatshare_registry.ids import TenantId
from flatshare_registry.keys import NewKey, new_key
from flatshare_registry.records import (
    DEFAULT_PLAN,
    Action,
    ApiKey,
    Quotas,
    Scope,
    TenantHead,
    TenantState,
)

__all__ = ["EMPTY", "MAX_KEYS", "Tenancy"]

MAX_KEYS: Final = 20
"""Most keys of one tenant: all are in its head, which every replica reads again and again."""

MAX_LIFETIME_S: Final = 10 * 366 * 86_400.0

EMPTY: Final[Mapping[str, Any]] = {
    "versions": {},
    "aliases": {},
    "keys": {},
    "plan": DEFAULT_PLAN,
    "quotas": Quotas(),
}
"""What a head holds of a tenant that has nothing."""


class Tenancy:
    """Keys, quotas and suspension of tenants; :attr:`flatshare_registry.Registry.tenancy`.

    Every method raises ``NotFound`` when there is no such tenant, and ``Unavailable`` when the store does
    not answer. A replica sees a change within its view's TTL, or at once when the control plane tells it.
    """

    def __init__(self, heads: HeadStore) -> None:
        self._heads = heads

    # -- keys

    def create_key(
        self,
        tenant: TenantId,
        scopes: Collection[Scope] = (Scope.PREDICT,),
        *,
        label: str = "",
        lifetime_s: float | None = None,
        once: str | None = None,
    ) -> NewKey:
        """Make a key. Its text is in the answer and nowhere else.

        Parameters
        ----------
        once
            Identifies the request: while the key that it made exists, it makes no second one.

        Raises
        ------
        AlreadyExists
            This request has made a key already; names it. Its secret can't be told again.
        InvalidInput
            No scope, a label or lifetime that can't be, or ``MAX_KEYS`` keys already.
        """
        if not scopes:
            raise InvalidInput("a key needs a scope: predict, manage or both")
        if len(label) > 100 or not label.isprintable():
            raise InvalidInput("a key's label has at most 100 printable characters")
        if lifetime_s is not None and not 0 < lifetime_s <= MAX_LIFETIME_S:
            raise InvalidInput("a key's lifetime is more than 0 s and at most 10 years")
        made = new_key(tenant, once=None if once is None else f"create {once}")
        self._add(tenant, made, tuple(sorted(set(scopes))), label, lifetime_s)
        return made

    def rotate_key(self, tenant: TenantId, key_id: str, *, grace_s: float, once: str | None = None) -> NewKey:
        """Make a new key like an old one, which stays valid for ``grace_s`` seconds; this is one change.

        The new key gets the lifetime that the old one was made with.

        Parameters
        ----------
        once
            As in :meth:`create_key`.

        Raises
        ------
        AlreadyExists
            This request has made a key already.
        NotFound
            No such key.
        InvalidInput
            It has expired, or there are ``MAX_KEYS`` keys already.
        """
        if not 0 <= grace_s <= MAX_LIFETIME_S:
            raise InvalidInput("the grace is at least 0 s and at most 10 years")
        made = new_key(tenant, once=None if once is None else f"rotate {key_id} {once}")

        def rotate(head: TenantHead) -> TenantHead:
            old = self._key(head, key_id)
            now = self._heads.now()
            if old.expires_at is not None and old.expires_at <= now:
                raise InvalidInput(f"key {key_id} has expired; make a new one")
            end = now + timedelta(seconds=grace_s)
            if old.expires_at is None or old.expires_at > end:
                head = _with_key(head, old.model_copy(update={"expires_at": end}))
            lifetime = None if old.expires_at is None else old.expires_at - old.created_at
            return self._added(
                head,
                ApiKey(
                    id=made.id, sha256=made.sha256, scopes=old.scopes, label=old.label, created_at=now,
                    created_by=self._heads.actor, expires_at=None if lifetime is None else now + lifetime,
                ),
            )  # fmt: skip

        told = {"key": key_id, "by": made.id}
        self._heads.change(tenant, Action.KEY_ROTATED, rotate, tell=lambda old, new: told)
        return made

    def revoke_key(self, tenant: TenantId, key_id: str) -> None:
        """Take a key away.

        Raises
        ------
        NotFound
            No such key.
        """

        def revoke(head: TenantHead) -> TenantHead:
            self._key(head, key_id)
            kept = {one: key for one, key in head.keys.items() if one != key_id}
            return head.model_copy(update={"keys": kept})

        self._heads.change(tenant, Action.KEY_REVOKED, revoke, tell=lambda old, new: {"key": key_id})

    def last_used(self, tenant: TenantId) -> dict[str, datetime]:
        """When each key was used last, to the hour; keys that never were are not there."""
        return self._heads.last_used(tenant)

    # -- quotas

    def set_quotas(self, tenant: TenantId, quotas: Quotas, *, plan: str | None = None) -> TenantHead:
        """Replace all the limits that differ from the plan; also set the plan, if one is named.

        Raises
        ------
        InvalidInput
            A floor above the cap.
        """
        return self.edit_quotas(tenant, lambda quotas_now: quotas, plan=plan)

    def edit_quotas(
        self, tenant: TenantId, edit: Callable[[Quotas], Quotas], *, plan: str | None = None
    ) -> TenantHead:
        """Change the limits that differ from the plan; also set the plan, if one is named.

        Parameters
        ----------
        edit
            Gets the limits that differ now, and returns those that should. It is called again if another
            change came first, so two simultaneous changes of different limits both stand.

        Raises
        ------
        InvalidInput
            A floor above the cap.
        """

        def change(head: TenantHead) -> TenantHead:
            quotas = edit(head.quotas)
            cap, floor = quotas.resident_bytes, quotas.resident_floor_bytes
            if cap is not None and floor is not None and floor > cap:
                raise InvalidInput(f"resident_floor_bytes {floor} is more than resident_bytes {cap}")
            return head.model_copy(update={"quotas": quotas, "plan": plan if plan is not None else head.plan})

        def tell(old: TenantHead, new: TenantHead) -> dict[str, str]:
            return {"from": _shown(old), "to": _shown(new)}

        return self._heads.change(tenant, Action.QUOTAS_SET, change, tell=tell)

    # -- suspension

    def suspend(self, tenant: TenantId) -> TenantHead:
        """Refuse the tenant's requests from now on; nothing is deleted."""
        return self._to(tenant, TenantState.SUSPENDED, Action.TENANT_SUSPENDED)

    def resume(self, tenant: TenantId) -> TenantHead:
        """Answer a suspended tenant's requests again."""
        return self._to(tenant, TenantState.ACTIVE, Action.TENANT_RESUMED)

    # -- how it is done

    def _to(self, tenant: TenantId, state: TenantState, action: Action) -> TenantHead:
        return self._heads.change(tenant, action, lambda head: head.model_copy(update={"state": state}))

    def _add(
        self, tenant: TenantId, made: NewKey, scopes: tuple[Scope, ...], label: str, lifetime_s: float | None
    ) -> None:
        def add(head: TenantHead) -> TenantHead:
            now = self._heads.now()
            key = ApiKey(
                id=made.id,
                sha256=made.sha256,
                scopes=scopes,
                label=label,
                created_at=now,
                created_by=self._heads.actor,
                expires_at=None if lifetime_s is None else now + timedelta(seconds=lifetime_s),
            )
            return self._added(head, key)

        told = {"key": made.id, "scopes": " ".join(scopes), "label": label}
        self._heads.change(tenant, Action.KEY_CREATED, add, tell=lambda old, new: told)

    def _added(self, head: TenantHead, key: ApiKey) -> TenantHead:
        """A head with one more key; expired keys are of no use any more, and make room."""
        if key.id in head.keys:
            raise AlreadyExists(
                f"this request has made key {key.id} already, and its secret is stored nowhere; if that is "
                "lost, revoke the key and make another with a new idempotency key"
            )
        now = self._heads.now()
        kept = {
            key_id: one for key_id, one in head.keys.items() if one.expires_at is None or one.expires_at > now
        }
        if len(kept) >= MAX_KEYS:
            raise InvalidInput(f"tenant {head.tenant} has {MAX_KEYS} keys, the limit; revoke some first")
        return _with_key(head.model_copy(update={"keys": kept}), key)

    @staticmethod
    def _key(head: TenantHead, key_id: str) -> ApiKey:
        key = head.keys.get(key_id)
        if key is None:
            raise NotFound(f"tenant {head.tenant} has no key {key_id[:80]!a}")
        return key


def _with_key(head: TenantHead, key: ApiKey) -> TenantHead:
    return head.model_copy(update={"keys": {**head.keys, key.id: key}})


def _shown(head: TenantHead) -> str:
    """Plan and quotas, for an audit entry."""
    return f"{head.plan} {head.quotas.model_dump_json(exclude_none=True)}"
