"""A replica's snapshot with a number in every field."""

from __future__ import annotations

from flatshare.device.memory import DeviceMemory
from flatshare.replica.snapshot import ReplicaSnapshot
from flatshare.replica.usage import RequestStats
from flatshare.residency.stats import CacheStats
from flatshare.weights.host_tier import HostUsage
from flatshare.weights.tiers import ResidentInfo, State, SwapInfo, Tier
from flatshare_registry.stores.wrapped import StoreCounts
from flatshare_registry.usage import OTHERS


def replica(name: str) -> ReplicaSnapshot:
    stats = CacheStats(loads=2, load_failures=1, evictions=3, swaps=4, quarantined=5, probes_failed=6)
    stats.hits[Tier.DEVICE], stats.hits[Tier.STORE] = 6, 2
    requests = RequestStats(
        {200: 8, 429: 3}, {"over_quota": 3}, busiest=[("acme", 2.0), ("globex", 0.5), (OTHERS, 0.25)]
    )
    requests.durations[Tier.DEVICE].add(0.002)
    for seconds in (0.004, 0.2):
        stats.load_times.add(seconds)
    model = ResidentInfo(
        "acme", 1, "d" * 64, "tiny", 16, 8, Tier.STORE, State.RESIDENT, True, 1, 8, 1, 2.0, 1.0
    )
    return ReplicaSnapshot(
        replica=name, place=0, node="host", node_id="n1", pid=1, device="cpu", slots=10, slots_used=7,
        started_at=12.0, settings_revision=9, budget_bytes=1000, held_bytes=16, reserved_bytes=8,
        device_memory=DeviceMemory(), host=HostUsage("/dev/shm/x", 100, 17, 1, 2, 3), loading=["a@1"],
        load_wait_s=0.5, failed=[], passes=50, rows=80, pass_s=3.5, lag_s=0.02, feed_age_s=4.0, store=StoreCounts(9, 1), swaps=[SwapInfo("acme", "canary", 1, 2, "gone")],
        ongoing=11, queued=12, refused=13, advertised=["acme"], models=[model], stats=stats,
        requests=requests,
    )  # fmt: skip
