"""The fleet as Prometheus reads it: what replicas count, what the keeper decides, and the queue of tasks.

A scrape costs one broadcast. Counters begin at zero with each replica's process: take ``rate()`` of each
before a sum, as of anything that restarts. One metric has a tenant label, for the busiest few only: tenants
have no bound. The replicas' own metrics are in ``replica/exposition.py``; each serves them at its door, too.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

from pydantic import BaseModel, Field

from flatshare.control.decided import Placement
from flatshare.control.fleet import FleetView
from flatshare.control.tasks import TaskQueueReply
from flatshare.door.metrics import METRICS_PATH
from flatshare.pool.details import DoorAddress
from flatshare.replica.exposition import REPLICA_FAMILIES, Family, Sample, samples_of
from flatshare.replica.exposition import exposition as written
from flatshare_registry.usage import OTHERS

__all__ = ["FAMILIES", "ScrapeTarget", "exposition"]

FAMILIES: Final = (
    Family("flatshare_replicas", "gauge", "Replicas, by what Serve says of them.", ("state",)),
    *REPLICA_FAMILIES,
    Family(
        "flatshare_tenant_requests_per_second", "gauge",
        "Answered requests a second in the last minute, of the busiest tenants; (others) is the rest of these.",
        ("tenant",),
    ),
    Family("flatshare_replicas_wanted", "gauge", "Replicas that Serve is told to keep; absent until it has said."),
    Family("flatshare_replicas_allowed", "gauge", "Between which numbers that is decided.", ("bound",)),
    Family("flatshare_copied_models", "gauge", "Models that more than one replica serves."),
    Family("flatshare_moved_models", "gauge", "Models that do not live where the ring would have them."),
    Family("flatshare_tasks_due", "gauge", "Tasks that could be run now; absent while the queue does not answer."),
    Family("flatshare_tasks_under_way", "gauge", "Tasks that a consumer has in hand; absent likewise."),
    Family("flatshare_tasks_oldest_seconds", "gauge", "For how long the oldest due task has waited; absent likewise."),
    Family("flatshare_task_consumers", "gauge", "Processes that run tasks; absent until it is known."),
)  # fmt: skip
"""All of them, in the order of an exposition; ``METRICS.md`` is made of this."""


class ScrapeTarget(BaseModel):
    """A replica's own metrics, as Prometheus' HTTP service discovery (``http_sd_configs``) wants to hear of them."""

    targets: list[str] = Field(description="One: `host:port` of the replica's door.")
    labels: dict[str, str] = Field(
        description="The path; which replica it is, as a meta label, since each series says it."
    )

    @classmethod
    def of(cls, door: DoorAddress) -> ScrapeTarget:
        """From where a replica listens."""
        host = f"[{door.host}]" if ":" in door.host else door.host
        return cls(
            targets=[f"{host}:{door.port}"],
            labels={"__metrics_path__": METRICS_PATH, "__meta_flatshare_replica": door.replica},
        )


def exposition(
    view: FleetView, placement: Placement | None, tasks: TaskQueueReply | None, tenants: int = 20
) -> bytes:
    """The fleet at this moment in Prometheus' text format.

    Parameters
    ----------
    tenants
        How many of the busiest are named; 0 for none.
    """
    return written(FAMILIES, _samples(view, placement, tasks, tenants), view.snapshots)


def _samples(
    view: FleetView, placement: Placement | None, tasks: TaskQueueReply | None, tenants: int
) -> Iterator[Sample]:
    states = {"RUNNING": 0}  # a series that goes away when it becomes 0 sets off no alert
    for state in view.states.values():
        states[state.state] = states.get(state.state, 0) + 1
    for name, count in sorted(states.items()):
        yield "flatshare_replicas", (name,), count
    seen: set[str] = set()
    for one in view.snapshots:
        yield from samples_of(one, with_host=one.node_id not in seen)
        if one.host is not None:
            seen.add(one.node_id)
    for tenant, rate in _busiest(view, tenants):
        yield "flatshare_tenant_requests_per_second", (tenant,), rate
    if placement is not None:
        yield "flatshare_replicas_wanted", (), placement.wanted
        yield "flatshare_replicas_allowed", ("min",), placement.bounds.minimum
        yield "flatshare_replicas_allowed", ("max",), placement.bounds.maximum
        yield "flatshare_copied_models", (), len(placement.copies)
        yield "flatshare_moved_models", (), len(placement.moved)
    if tasks is not None:
        yield "flatshare_tasks_due", (), tasks.due
        yield "flatshare_tasks_under_way", (), tasks.under_way
        yield "flatshare_tasks_oldest_seconds", (), tasks.oldest_s
        yield "flatshare_task_consumers", (), tasks.consumers


def _busiest(view: FleetView, most: int) -> Iterator[tuple[str, float]]:
    rates: dict[str, float] = {}
    for one in view.snapshots:
        for tenant, rate in one.requests.busiest:
            rates[tenant] = rates.get(tenant, 0.0) + rate
    rest = rates.pop(OTHERS, 0.0)
    named = heapq.nlargest(most, rates.items(), key=lambda one: one[1])
    yield from named
    rest += sum(rates.values()) - sum(rate for _, rate in named)
    if most and rates:
        yield OTHERS, max(rest, 0.0)
