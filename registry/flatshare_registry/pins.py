"""Pins: refs that every replica keeps resident, also one that starts later. One empty object a ref."""

from __future__ import annotations

import contextlib
from typing import Final

from flatshare_registry import layout
from flatshare_registry.errors import InvalidRef, NotFound
from flatshare_registry.heads import HeadStore, select
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.stores.base import BlobStore, Overwrite

__all__ = ["Pins"]

_BODY: Final = b"{}"


class Pins:
    """The pins in one store. All methods are blocking, and may be called again."""

    def __init__(self, store: BlobStore, heads: HeadStore) -> None:
        self._store = store
        self._heads = heads

    def add(self, ref: ModelRef) -> None:
        """Make starting replicas keep the version that a ref names resident, wherever its alias moves.

        Raises
        ------
        NotFound
            No such tenant, alias or version.
        """
        select(self._heads.read(ref.tenant), ref)
        self._store.put(layout.pin_key(ref), _BODY, Overwrite())

    def remove(self, ref: ModelRef) -> None:
        """Forget every pin of the version that a ref means, by whatever ref. Raises as :meth:`add`."""
        head = self._heads.read(ref.tenant)
        version = select(head, ref)
        for pinned in self.refs(ref.tenant):
            with contextlib.suppress(NotFound):  # a pin of what is gone by now
                if select(head, pinned) == version:
                    self._store.delete(layout.pin_key(pinned))

    def refs(self, tenant: TenantId | None = None) -> list[ModelRef]:
        """All pinned refs, or a tenant's, in order of their texts; what is no ref is left out."""
        found: list[ModelRef] = []
        for meta in self._store.list(layout.PINS if tenant is None else layout.pins_prefix(tenant)):
            with contextlib.suppress(InvalidRef):
                found.append(ModelRef.parse(layout.ref_of_pin(meta.key)))
        return sorted(found, key=str)
