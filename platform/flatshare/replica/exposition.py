"""A replica's numbers for Prometheus: at its own door, and with all other replicas' at the control plane.

Replicas count in plain numbers; this module turns them into samples at each scrape. So the hot path
counts and no more; a scrape holds the event loop for about a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from flatshare.replica.snapshot import ReplicaSnapshot
from flatshare.residency.stats import Durations
from flatshare.weights.tiers import Tier

__all__ = ["CONTENT_TYPE", "REPLICA_FAMILIES", "Family", "Sample", "exposition", "samples_of"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

LOAD_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histogram of loads: from a warm tensor to a store that hardly answers."""


REQUEST_BUCKETS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
"""OpenTelemetry's buckets of ``http.server.request.duration``, and two smaller ones: a hot request takes a
millisecond.
"""

Sample = tuple[str, tuple[object, ...], float | None]
"""A metric's name, its labels' values, and its value; None for one that is absent."""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric, without its samples."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


_OF: Final = ("replica",)

REPLICA_FAMILIES: Final = (
    Family(
        "flatshare_replica_info", "gauge", "1 for each replica that answers, with where it is.",
        ("replica", "place", "node", "node_id", "device"),
    ),
    Family("flatshare_replica_start_time_seconds", "gauge", "When a replica started, in POSIX seconds.", _OF),
    Family(
        "flatshare_leases", "counter", "Requests that got a model, by the tier that it came from.",
        ("replica", "tier"),
    ),
    Family(
        "flatshare_requests", "counter", "Requests that a replica answered over HTTP, and for tasks, by status.",
        ("replica", "status"),
    ),
    Family(
        "flatshare_request_errors", "counter", "Of these, those that were refused or failed, by the code in the answer.",
        ("replica", "code"),
    ),
    Family(
        "flatshare_request_seconds", "histogram",
        "Seconds of an answered request, from when its body was here until its answer was made.",
        ("replica", "tier"),
    ),
    Family("flatshare_refused_requests", "counter", "Requests and loads that a replica refused for want of room, or of a turn in time.", _OF),
    Family("flatshare_requests_ongoing", "gauge", "Requests that a replica works on now.", _OF),
    Family("flatshare_requests_queued", "gauge", "Requests that wait in a replica now.", _OF),
    Family("flatshare_passes", "counter", "Forward passes.", _OF),
    Family("flatshare_pass_seconds", "counter", "Seconds in which the device was busy with passes.", _OF),
    Family("flatshare_rows", "counter", "Images in these passes.", _OF),
    Family("flatshare_loads", "counter", "Loads of models that ended, by how.", ("replica", "result")),
    Family("flatshare_probes_failed", "counter", "Models that did not answer their probe as when they were registered.", _OF),
    Family("flatshare_load_seconds", "histogram", "Seconds of a load: fetch, check and place.", _OF),
    Family("flatshare_load_wait_seconds", "gauge", "Seconds that one more load would wait for its turn.", _OF),
    Family("flatshare_loading_models", "gauge", "Models that are being loaded now.", _OF),
    Family("flatshare_evictions", "counter", "Models that were removed to make room.", _OF),
    Family("flatshare_swaps", "counter", "Promotions whose new version took over from a resident one.", _OF),
    Family("flatshare_swaps_pending", "gauge", "Promotions whose new version does not answer yet.", _OF),
    Family("flatshare_swaps_failing", "gauge", "Of these, those whose last load failed.", _OF),
    Family("flatshare_quarantined_slots", "counter", "Slots taken out of use by an isolation check.", _OF),
    Family("flatshare_slots", "gauge", "Models that fit into a replica.", _OF),
    Family("flatshare_slots_used", "gauge", "Models that are held, loaded or freed.", _OF),
    Family("flatshare_pinned_models", "gauge", "Models that are never evicted.", _OF),
    Family("flatshare_device_budget_bytes", "gauge", "What models may take of the device; absent without a bound.", _OF),
    Family("flatshare_device_held_bytes", "gauge", "What models take of it; shared tensors count once.", _OF),
    Family("flatshare_device_reserved_bytes", "gauge", "What loads under way have set aside.", _OF),
    Family("flatshare_host_tier_budget_bytes", "gauge", "What a node's host tier may take.", ("node", "node_id")),
    Family("flatshare_host_tier_bytes", "gauge", "What a node's host tier takes.", ("node", "node_id")),
    Family("flatshare_host_tier_bypassed", "counter", "Tensors that a replica kept itself for want of room there.", _OF),
    Family("flatshare_host_tier_scrubbed", "counter", "Files that a replica hashed again.", _OF),
    Family("flatshare_host_tier_damaged", "counter", "Of these, files that were not what they had been.", _OF),
    Family("flatshare_store_requests", "counter", "Calls of the store, by this replica.", _OF),
    Family("flatshare_store_errors", "counter", "Of these, calls that it did not answer, or not in time.", _OF),
    Family("flatshare_change_feed_age_seconds", "gauge", "Seconds since the registry's change feed was read. It is read for requests: without any it grows.", _OF),
    Family("flatshare_event_loop_lag_seconds", "gauge", "The latest that the event loop came to what was due, of the last half minute.", _OF),
    Family("flatshare_settings_revision", "gauge", "Of the settings that a replica goes by.", _OF),
)  # fmt: skip
"""What one replica says, in the order of an exposition."""


def exposition(
    families: Iterable[Family], samples: Iterable[Sample], snapshots: Sequence[ReplicaSnapshot]
) -> bytes:
    """Prometheus' text format.

    Parameters
    ----------
    samples
        Samples of the families that are not histograms.
    snapshots
        Replicas whose histograms are added.
    """
    registry = CollectorRegistry()
    registry.register(_Collected(families, samples, snapshots))
    return generate_latest(registry)


def samples_of(one: ReplicaSnapshot, *, with_host: bool = True) -> Iterator[Sample]:
    """The samples of one replica, but for its histograms.

    Parameters
    ----------
    with_host
        With the node's host tier, which all replicas of a node see.
    """
    where = (one.replica, one.place, one.node, one.node_id, one.device)
    yield "flatshare_replica_info", where, 1
    for tier in Tier:
        yield "flatshare_leases", (one.replica, tier.value), one.stats.hits[tier]
    yield "flatshare_loads", (one.replica, "ok"), one.stats.loads
    yield "flatshare_loads", (one.replica, "failed"), one.stats.load_failures
    for status, count in sorted(one.requests.statuses.items()):
        yield "flatshare_requests", (one.replica, status), count
    for code, count in sorted(one.requests.errors.items()):
        yield "flatshare_request_errors", (one.replica, code), count
    for name, value in _numbers(one).items():
        yield name, (one.replica,), value
    if one.host is not None and with_host:
        node = (one.node, one.node_id)
        yield "flatshare_host_tier_budget_bytes", node, one.host.budget_bytes
        yield "flatshare_host_tier_bytes", node, one.host.used_bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Collected(Collector):
    families: Iterable[Family]
    samples: Iterable[Sample]
    snapshots: Sequence[ReplicaSnapshot]

    def collect(self) -> Iterable[Metric]:
        """Called at a scrape."""
        found = {family.name: _new(family) for family in self.families}
        for name, labels, value in self.samples:
            if value is not None:
                found[name].add_metric([str(label) for label in labels], value)
        for one in self.snapshots:
            times = one.stats.load_times
            found["flatshare_load_seconds"].add_metric(
                [one.replica], _buckets(times, LOAD_BUCKETS_S), sum_value=times.seconds
            )
            for tier, took in one.requests.durations.items():
                found["flatshare_request_seconds"].add_metric(
                    [one.replica, tier.value], _buckets(took, REQUEST_BUCKETS_S), sum_value=took.seconds
                )
        return [metric for metric in found.values() if metric.samples]


def _numbers(one: ReplicaSnapshot) -> Mapping[str, float | None]:
    """The metrics of which each replica has one value."""
    stats, host = one.stats, one.host
    return {
        "flatshare_replica_start_time_seconds": one.started_at,
        "flatshare_refused_requests": one.refused,
        "flatshare_requests_ongoing": one.ongoing,
        "flatshare_requests_queued": one.queued,
        "flatshare_passes": one.passes,
        "flatshare_rows": one.rows,
        "flatshare_pass_seconds": one.pass_s,
        "flatshare_probes_failed": stats.probes_failed,
        "flatshare_store_requests": one.store.requests,
        "flatshare_store_errors": one.store.errors,
        "flatshare_change_feed_age_seconds": one.feed_age_s,
        "flatshare_event_loop_lag_seconds": one.lag_s,
        "flatshare_load_wait_seconds": one.load_wait_s,
        "flatshare_loading_models": len(one.loading),
        "flatshare_evictions": stats.evictions,
        "flatshare_swaps": stats.swaps,
        "flatshare_swaps_pending": len(one.swaps),
        "flatshare_swaps_failing": sum(bool(swap.error) for swap in one.swaps),
        "flatshare_quarantined_slots": stats.quarantined,
        "flatshare_slots": one.slots,
        "flatshare_slots_used": one.slots_used,
        "flatshare_pinned_models": sum(model.pinned for model in one.models),
        "flatshare_device_budget_bytes": one.budget_bytes,
        "flatshare_device_held_bytes": one.held_bytes,
        "flatshare_device_reserved_bytes": one.reserved_bytes,
        "flatshare_host_tier_bypassed": host.bypassed if host else None,
        "flatshare_host_tier_scrubbed": host.scrubbed if host else None,
        "flatshare_host_tier_damaged": host.damaged if host else None,
        "flatshare_settings_revision": one.settings_revision,
    }


def _buckets(times: Durations, bounds: tuple[float, ...]) -> list[tuple[str, float]]:
    """Cumulative counts, as Prometheus has them."""
    return [
        *((f"{bound:g}", float(times.within(bound))) for bound in bounds),
        ("+Inf", float(sum(times.counts))),
    ]


def _new(family: Family) -> Any:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[family.kind](family.name, family.help, labels=family.labels)
