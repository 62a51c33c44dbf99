"""Shares of a device: what a tenant may hold at most, and what others can't evict of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from flatshare.cache.lease import Resident
from flatshare.cache.tiers import ModelKey
from flatshare.errors import ResidentOverQuota

__all__ = ["NO_SHARE", "Share", "ShareOf", "own_victims", "spare_floors"]


@dataclass(frozen=True, slots=True)
class Share:
    """A tenant's share of a device, in bytes of its models, each counted whole.

    Attributes
    ----------
    cap_bytes
        Most that it may hold; None for no bound.
    floor_bytes
        What other tenants can't evict.
    """

    cap_bytes: int | None = None
    floor_bytes: int = 0


NO_SHARE: Final = Share()

ShareOf = Callable[[str], Share]
"""A tenant's share now."""


def spare_floors(
    keys: Iterable[ModelKey], residents: Mapping[ModelKey, Resident], share_of: ShareOf, tenant: str
) -> list[ModelKey]:
    """Those of these that may go, together, for a model of ``tenant``: no other falls below its floor."""
    shares: dict[str, Share] = {}
    left: dict[str, int] = {}
    allowed: list[ModelKey] = []
    for key in keys:
        if key.tenant not in shares:
            shares[key.tenant] = share_of(key.tenant)
        floor = 0 if key.tenant == tenant else shares[key.tenant].floor_bytes
        if floor:
            if key.tenant not in left:
                left[key.tenant] = _held(residents.values(), key.tenant)
            rest = left[key.tenant] - residents[key].size_bytes
            if rest < floor:
                continue
            left[key.tenant] = rest
        allowed.append(key)
    return allowed


def own_victims(
    tenant: str,
    size_bytes: int,
    cap_bytes: int | None,
    keys: Iterable[ModelKey],
    residents: Mapping[ModelKey, Resident],
    leaving: Iterable[Resident],
) -> list[ModelKey]:
    """A tenant's own models that must go before it may hold so many bytes more.

    Parameters
    ----------
    keys
        What may be evicted, the first to go first.
    leaving
        What still takes memory although it is no longer resident.

    Raises
    ------
    ResidentOverQuota
        All that it may hold is in use, or one model is more than that.
    """
    if cap_bytes is None:
        return []
    over = _held(residents.values(), tenant) + _held(leaving, tenant) + size_bytes - cap_bytes
    chosen: list[ModelKey] = []
    for key in keys:
        if over <= 0:
            break
        if key.tenant == tenant:
            chosen.append(key)
            over -= residents[key].size_bytes
    if over > 0:
        raise ResidentOverQuota(
            f"tenant {tenant} may keep {cap_bytes} bytes of models on a device, and they are in use"
            if size_bytes <= cap_bytes
            else f"the model takes {size_bytes} bytes; tenant {tenant} may keep {cap_bytes} on a device"
        )
    return chosen


def _held(residents: Iterable[Resident], tenant: str) -> int:
    return sum(one.size_bytes for one in residents if one.record.tenant == tenant)
