"""Whether a store honours conditional writes: asked once, with a key of its own.

Every change of the registry rests on two conditions: *only if there is nothing* (``Create``) and *only if it
is still what I read* (``UpdateIf``). A store, or a gateway before one, that ignores either answers success,
and a tenant's head, its keys or its versions are gone.
"""

from __future__ import annotations

import contextlib

from flatshare_registry.errors import AlreadyExists, Conflict, RegistryError, UnfitStore
from flatshare_registry.records import new_ulid
from flatshare_registry.stores.base import BlobStore, Create, UpdateIf

__all__ = ["CHECK_PREFIX", "check_conditions"]

CHECK_PREFIX = "checks/"


def check_conditions(store: BlobStore) -> None:
    """Return if a store honours both conditions; four small writes and a delete.

    Raises
    ------
    UnfitStore
        It ignores one, or refuses a condition that holds.
    Unavailable
        It does not answer.
    """
    key = f"{CHECK_PREFIX}{new_ulid()}"
    meta = store.put(key, b"1", Create())
    try:
        try:
            store.put(key, b"2", Create())
        except (AlreadyExists, Conflict):
            pass
        else:
            raise _unfit(store, "ignores If-None-Match: an object that is there is overwritten")
        try:
            store.put(key, b"3", UpdateIf('"00000000000000000000000000000000"'))
        except Conflict:
            pass
        else:
            raise _unfit(store, "ignores If-Match: somebody else's change is overwritten")
        try:
            store.put(key, b"4", UpdateIf(meta.etag))
        except Conflict:
            raise _unfit(store, "refuses If-Match with the ETag that it gave itself") from None
    finally:
        with contextlib.suppress(RegistryError):  # an empty object that nobody names harms nobody
            store.delete(key)


def _unfit(store: BlobStore, why: str) -> UnfitStore:
    return UnfitStore(
        f"{store.url} can't be used: it {why}. A registry needs a store with conditional writes "
        "(Amazon S3, MinIO, Ceph, R2), and no gateway before it that drops these headers"
    )
