"""What a replica tells the control plane about itself: plain values that pickle."""

from __future__ import annotations

from dataclasses import dataclass

from flatshare.cache.stats import CacheStats
from flatshare.cache.tiers import ResidentInfo

__all__ = ["ReplicaSnapshot"]


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """One replica at one moment.

    Attributes
    ----------
    slots, slots_used
        Models that fit; models that are held, being loaded or being freed.
    ongoing, queued, refused
        Requests worked on now, waiting now, and refused since the start.
    advertised
        Refs that Ray's routers are told are here.
    models
        Most recently used first.
    """

    replica: str
    node: str
    node_id: str
    pid: int
    device: str
    slots: int
    slots_used: int
    started_at: float
    ongoing: int
    queued: int
    refused: int
    advertised: list[str]
    models: list[ResidentInfo]
    stats: CacheStats
