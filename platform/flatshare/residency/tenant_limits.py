"""Shares of a device: what a tenant may hold at most, and what others can't evict of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from flatshare.errors import ResidentOverQuota
from flatshare.residency.lease import Resident
from flatshare.weights.tiers import ModelKey

__all__ = ["NO_BOUNDS", "BoundsOf", "TenantBounds", "own_victims", "spare_floors"]


@dataclass(frozen=True, slots=True)
class TenantBounds:
    """A tenant's cap and floor on a device, in bytes of its models, each counted whole.

    Attributes
    ----------
    cap_bytes
        Most that it may hold; None for no bound.
    floor_bytes
        What other tenants can't evict.
    """

    cap_bytes: int | None = None
    floor_bytes: int = 0


NO_BOUNDS: Final = TenantBounds()

BoundsOf = Callable[[str], TenantBounds]
"""A tenant's cap and floor now."""


FLOOR_SLOTS_SHARE: Final = 4
"""A floor protects at most one in this many slots: it promises bytes, and many small models of one tenant
would otherwise take all slots."""


OTHERS_SHARE: Final = 8
"""One in this many of a device's slots, and of its bytes, is protected by no floor."""


def spare_floors(
    keys: Iterable[ModelKey],
    residents: Mapping[ModelKey, Resident],
    bounds_of: BoundsOf,
    tenant: str,
    slots: int,
    budget_bytes: int | None = None,
) -> list[ModelKey]:
    """The keys that may all be evicted for a model of ``tenant``: no other tenant falls below its floor.

    All floors together leave one slot in ``OTHERS_SHARE``, and as large a part of the bytes, to everybody
    else. If more was promised than there is, some promises are not kept, so that new models can be loaded.
    """
    most = max(slots // FLOOR_SLOTS_SHARE, 1)
    slots_left = slots - max(slots // OTHERS_SHARE, 1) if slots > 1 else 1
    bytes_left = (budget_bytes or 0) - (budget_bytes or 0) // OTHERS_SHARE
    models: dict[str, int] = {}
    shares: dict[str, TenantBounds] = {}
    left: dict[str, int] = {}
    allowed: list[ModelKey] = []
    for key in keys:
        if key.tenant not in shares:
            shares[key.tenant] = bounds_of(key.tenant)
        floor = 0 if key.tenant == tenant else shares[key.tenant].floor_bytes
        if floor:
            if key.tenant not in left:
                left[key.tenant] = _held(residents.values(), key.tenant)
                models[key.tenant] = sum(one.tenant == key.tenant for one in residents)
            rest = left[key.tenant] - residents[key].size_bytes
            size = residents[key].size_bytes
            room = slots_left > 0 and (budget_bytes is None or size <= bytes_left)
            if rest < floor and models[key.tenant] <= most and room:
                slots_left -= 1
                bytes_left -= size
                continue
            left[key.tenant] = rest
            models[key.tenant] -= 1
        allowed.append(key)
    return allowed


def own_victims(
    tenant: str,
    size_bytes: int,
    cap_bytes: int | None,
    keys: Iterable[ModelKey],
    residents: Mapping[ModelKey, Resident],
    leaving: Iterable[Resident],
) -> list[ModelKey] | None:
    """A tenant's own models that must go before it may hold so many bytes more; None while they are in use.

    Parameters
    ----------
    keys
        What may be evicted, the first to go first.
    leaving
        What still takes memory although it is no longer resident.

    Raises
    ------
    ResidentOverQuota
        The model alone is larger than all that the tenant may hold.
    """
    if cap_bytes is None:
        return []
    if size_bytes > cap_bytes:
        raise ResidentOverQuota(
            f"the model takes {size_bytes} bytes; tenant {tenant} may keep {cap_bytes} on a device"
        )
    over = _held(residents.values(), tenant) + _held(leaving, tenant) + size_bytes - cap_bytes
    chosen: list[ModelKey] = []
    for key in keys:
        if over <= 0:
            break
        if key.tenant == tenant:
            chosen.append(key)
            over -= residents[key].size_bytes
    return chosen if over <= 0 else None


def _held(residents: Iterable[Resident], tenant: str) -> int:
    return sum(one.size_bytes for one in residents if one.record.tenant == tenant)
