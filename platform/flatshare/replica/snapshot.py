"""What a replica tells the control plane about itself: plain values that pickle."""

from __future__ import annotations

from dataclasses import dataclass

from flatshare.device.memory import DeviceMemory
from flatshare.replica.usage import RequestStats
from flatshare.residency.stats import CacheStats
from flatshare.weights.host_tier import HostUsage
from flatshare.weights.tiers import FailedLoad, ResidentInfo, SwapInfo
from flatshare_registry.stores.wrapped import StoreCounts

__all__ = ["ReplicaSnapshot"]


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """One replica at one moment.

    Attributes
    ----------
    place
        Its number on the ring of homes.
    slots, slots_used
        Models that fit; models that are held, being loaded or being freed.
    budget_bytes, held_bytes, reserved_bytes
        Of the device: what models may take (None for no bound), what they take, and what loads under way
        have set aside. Shared tensors count once.
    device_memory
        The device's own accounts.
    host
        The node's host tier; None without one.
    loading
        Versions that are being loaded.
    load_wait_s
        Seconds that another load from the store would wait for its turn, at the present rate.
    failed
        Versions whose last load failed, the latest first.
    swaps
        Aliases that are not yet where they were moved to.
    passes, rows
        Forward passes since the start, and the rows in them.
    settings_revision
        Revision of the settings that it uses: how many times they had been changed by then.
    pass_s
        Seconds that the device was busy with passes.
    lag_s
        The latest that the event loop came to what was due, of the last half minute.
    feed_age_s
        Seconds since the registry's change feed was read; None if it was not yet. It is read for requests.
    store
        Calls of the store.
    ongoing, queued, refused
        Requests worked on now, waiting now, and refused since the start.
    advertised
        Refs that Ray's routers are told are here.
    models
        Most recently used first.
    requests
        How they ended.
    """

    replica: str
    place: int
    node: str
    node_id: str
    pid: int
    device: str
    slots: int
    slots_used: int
    budget_bytes: int | None
    held_bytes: int
    reserved_bytes: int
    device_memory: DeviceMemory
    host: HostUsage | None
    loading: list[str]
    load_wait_s: float
    failed: list[FailedLoad]
    swaps: list[SwapInfo]
    passes: int
    rows: int
    pass_s: float
    lag_s: float
    feed_age_s: float | None
    store: StoreCounts
    started_at: float
    settings_revision: int
    ongoing: int
    queued: int
    refused: int
    advertised: list[str]
    models: list[ResidentInfo]
    stats: CacheStats
    requests: RequestStats
