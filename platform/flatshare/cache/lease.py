"""A slot's content, and a request's hold on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from flatshare.cache.tiers import Receipt, Tier
from flatshare.errors import ServeError
from flatshare_registry.records import VersionRecord

__all__ = ["Lease", "Resident"]


@dataclass(slots=True, eq=False)
class Resident:
    """A slot's content. ``retired`` ones take no new lease and go when the last lease ends."""

    record: VersionRecord
    module: nn.Module | None
    size_bytes: int
    tier: Tier
    receipt: Receipt
    loaded_at: float
    last_used_at: float
    hits: int = 0
    leases: int = 0
    retired: bool = False


class Lease:
    """A request's hold on a resident model: while it lives the model can't be freed.

    A context manager; releasing twice is harmless.

    Attributes
    ----------
    record
        The version that is held.
    tier
        Where this request found it.
    """

    __slots__ = ("_released", "_resident", "receipt", "record", "tier")

    def __init__(self, resident: Resident, tier: Tier, released: Callable[[Resident], None]) -> None:
        self._released = released
        self._resident: Resident | None = resident
        self.record = resident.record
        self.receipt = resident.receipt
        self.tier = tier

    @property
    def module(self) -> nn.Module:
        """The module; only while the lease lives."""
        if self._resident is None or self._resident.module is None:
            raise ServeError("a lease was used after its release")
        return self._resident.module

    def current_receipt(self) -> Receipt | None:
        """What the slot holds now; differs from :attr:`receipt` only if isolation is broken."""
        return self._resident.receipt if self._resident is not None else None

    def release(self) -> None:
        """Give the model back."""
        resident, self._resident = self._resident, None
        if resident is not None:
            self._released(resident)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
