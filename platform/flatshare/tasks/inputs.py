"""Inputs that lie in the store for tasks which name them, so that no request carries them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from flatshare.tasks.records import StoredInput
from flatshare_registry import layout
from flatshare_registry.errors import InvalidInput, NotFound
from flatshare_registry.ids import TenantId
from flatshare_registry.stores.base import BlobStore, Overwrite

__all__ = ["StoredBody", "TaskInputs"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)


@dataclass(frozen=True, slots=True)
class StoredBody:
    """A body that is in the store already."""

    input: StoredInput
    size_bytes: int


class TaskInputs:
    """Each tenant's own inputs, by name. Methods block, and raise ``InvalidInput`` for what is no name."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def put(self, tenant: TenantId, name: str, data: bytes) -> str:
        """Store an input; its key. One of that name is replaced, and tasks that were taken with it fail."""
        key = _key(tenant, name)
        self._store.put(key, data, Overwrite())
        return key

    def find(self, tenant: TenantId, name: str, most_bytes: int) -> StoredBody:
        """Find an input, as it is now.

        Raises
        ------
        InvalidInput
            There is none, or it is too long.
        """
        key = _key(tenant, name)
        try:
            found = self._store.head(key)
        except NotFound:
            raise InvalidInput(f"there is no stored input {name}: put it to {key} of the store") from None
        if found.size_bytes > most_bytes:
            raise InvalidInput(f"stored input {name} has {found.size_bytes} bytes; {most_bytes} are allowed")
        return StoredBody(StoredInput(name=name, etag=found.etag), found.size_bytes)

    def read(self, tenant: TenantId, stored: StoredInput) -> bytes:
        """Its bytes, as they were when it was found.

        Raises
        ------
        InvalidInput
            It was removed or changed since.
        """
        key, changed = (
            _key(tenant, stored.name),
            f"stored input {stored.name} was changed since the task was taken",
        )
        try:
            if self._store.head(key).etag != stored.etag:  # before it is read: it may be of any size by now
                raise InvalidInput(changed)
            found = self._store.get(key)
        except NotFound:
            raise InvalidInput(f"stored input {stored.name} was removed") from None
        if found.meta.etag != stored.etag:
            raise InvalidInput(changed)
        return found.data


def _key(tenant: TenantId, name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise InvalidInput("the name of a stored input is 1 to 200 of letters, digits and . _ -")
    return f"{layout.task_inputs_prefix(tenant)}{name}"
