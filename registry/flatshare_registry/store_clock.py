"""The store's clock: only a store can say how old its objects are."""

from __future__ import annotations

from typing import Final

from flatshare_registry import layout
from flatshare_registry.errors import InvalidInput
from flatshare_registry.records import new_ulid
from flatshare_registry.stores.base import BlobStore, Create

__all__ = ["MAX_SKEW_S", "agreed_now", "store_now"]

MAX_SKEW_S: Final = 300.0
"""Most seconds that this machine's clock and the store's may differ by before something is deleted by age."""


def store_now(store: BlobStore) -> float:
    """POSIX seconds by the store's clock: the time of an empty object that is written now, then removed.

    S3 counts whole seconds, so it may be up to one second behind.
    """
    key = layout.clock_key(new_ulid())
    store.put(key, b"", Create())
    try:
        return store.head(key).modified_s
    finally:
        store.delete(key)


def agreed_now(store: BlobStore, local_s: float) -> float:
    """As :func:`store_now`, but only if this machine's clock says about the same.

    Parameters
    ----------
    local_s
        POSIX seconds by this machine's clock.

    Raises
    ------
    InvalidInput
        They differ by more than :data:`MAX_SKEW_S`: one of them is wrong, and nobody knows which.
    """
    now_s = store_now(store)
    if abs(local_s - now_s) > MAX_SKEW_S:
        ahead = "ahead of" if local_s > now_s else "behind"
        raise InvalidInput(
            f"this machine's clock is {abs(local_s - now_s):.0f} s {ahead} the store's; "
            "set the wrong one first: what is old can't be told"
        )
    return now_s
