"""Words of the cache: tiers, keys, and what is known of a resident model.

No torch in here: these values go to the control plane, which has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from flatshare_registry.records import VersionRecord

__all__ = ["FailedLoad", "LeaseTag", "ModelKey", "Part", "ResidentInfo", "State", "SwapInfo", "Tier"]


class Tier(StrEnum):
    """Where a request found its model."""

    DEVICE = "device"
    """It was resident."""
    HOST = "host"
    """It was loaded from files that the node's replicas share."""
    PEER = "peer"
    """It was fetched from another node's files."""
    STORE = "store"
    """It was fetched from the registry's store."""


class State(StrEnum):
    """Why a model is held."""

    RESIDENT = "resident"
    """It can be leased."""
    DRAINING = "draining"
    """It takes no new lease and goes when its last lease ends; its bytes count until then."""
    QUARANTINED = "quarantined"
    """Its slot failed an isolation check: nobody gets it again, and it stays for an operator to see."""


class Part(NamedTuple):
    """A tensor as the device holds it, whoever's it is: equal parts are held once.

    The digest alone would not do: equal bytes may have another shape or element type.
    """

    digest: str
    dtype: str
    shape: tuple[int, ...]


class ModelKey(NamedTuple):
    """A version, as the cache names it. Never a digest alone: equal weights of two tenants are two models."""

    tenant: str
    version: int

    @classmethod
    def of(cls, record: VersionRecord) -> ModelKey:
        """The key of a version."""
        return cls(record.tenant, record.version)

    def __str__(self) -> str:
        return f"{self.tenant}@{self.version}"


@dataclass(frozen=True, slots=True)
class LeaseTag:
    """What a slot held at one moment; equal before and after a forward pass, or the request fails.

    Attributes
    ----------
    generation
        Counts the loads of this replica, so a slot that was freed and filled again differs.
    """

    tenant: str
    version: int
    digest: str
    generation: int


@dataclass(frozen=True, slots=True)
class ResidentInfo:
    """One resident model, for people and the control plane.

    Attributes
    ----------
    size_bytes, own_bytes
        Of all its tensors; of those that no other model here shares.
    tier
        Where it was loaded from.
    pinned
        Never evicted.
    leases
        Requests that hold it now.
    last_used_at, loaded_at
        POSIX seconds.
    """

    tenant: str
    version: int
    digest: str
    architecture: str
    size_bytes: int
    own_bytes: int
    tier: Tier
    state: State
    pinned: bool
    generation: int
    hits: int
    leases: int
    last_used_at: float
    loaded_at: float


@dataclass(frozen=True, slots=True)
class FailedLoad:
    """A version whose last load on this replica failed.

    Attributes
    ----------
    kind, error
        Class of the error, and what it says.
    at
        POSIX seconds.
    """

    tenant: str
    version: int
    kind: str
    error: str
    at: float


@dataclass(frozen=True, slots=True)
class SwapInfo:
    """An alias that is not yet where it was moved to, on this replica.

    Attributes
    ----------
    error
        Why the last try failed; empty while it loads.
    """

    tenant: str
    alias: str
    from_version: int
    to_version: int
    error: str
