"""The fleet's body, as the control plane's OpenAPI shows it."""

from __future__ import annotations

from pydantic import BaseModel, Field

from flatshare.control.decided import Placement
from flatshare.control.fleet import FleetView
from flatshare.placement.balance import homes_of
from flatshare.placement.ring import ring_of
from flatshare.replica.snapshot import ReplicaSnapshot
from flatshare.residency.stats import CacheStats
from flatshare.weights.tiers import State, Tier

__all__ = ["FleetReply"]


class ModelReply(BaseModel):
    """A model that a replica holds."""

    tenant: str
    version: int
    digest: str
    architecture: str
    size_bytes: int = Field(description="Of all its tensors.")
    own_bytes: int = Field(description="Of those that no other model of this replica shares.")
    tier: Tier = Field(description="Where it was loaded from.")
    state: State = Field(description="Why it is held.")
    pinned: bool = Field(description="Never evicted.")
    generation: int = Field(description="Number of the load, counted since the replica started.")
    hits: int
    leases: int = Field(description="Requests that hold it now.")
    last_used_at: float = Field(description="POSIX seconds.")
    loaded_at: float = Field(description="POSIX seconds.")


class HostReply(BaseModel):
    """A node's host tier, as one of its replicas sees it."""

    folder: str
    budget_bytes: int
    used_bytes: int
    bypassed: int = Field(description="Tensors that this replica kept in its own memory for want of room.")
    scrubbed: int = Field(description="Files that this replica hashed again since it started.")
    damaged: int = Field(description="Those that were not what they had been; they are fetched anew.")


class FailedReply(BaseModel):
    """A version whose last load on this replica failed."""

    tenant: str
    version: int
    kind: str = Field(description="Class of the error.")
    error: str = Field(description="What it says.")
    at: float = Field(description="POSIX seconds.")


class SwapReply(BaseModel):
    """An alias that is not yet where it was moved to, on this replica."""

    tenant: str
    alias: str
    from_version: int = Field(description="Still answers.")
    to_version: int
    error: str = Field(description="Why the last try to load it failed; empty while it loads.")


class ReplicaReply(BaseModel):
    """One replica."""

    replica: str
    place: int = Field(description="Its number on the ring of homes; a replacement takes it over.")
    state: str = Field(description="Serve's word: STARTING, RUNNING, STOPPING ...")
    node: str
    node_id: str
    pid: int
    device: str
    slots: int
    slots_used: int
    budget_bytes: int | None = Field(description="What models may take on the device; null for no bound.")
    held_bytes: int = Field(description="What they take; shared tensors count once.")
    reserved_bytes: int = Field(description="Set aside by loads under way.")
    host: HostReply | None = Field(description="The node's host tier; null without one.")
    loading: list[str] = Field(description="Versions that are being loaded.")
    load_wait_s: float = Field(
        description="Seconds that another load from the store would wait for its turn, at the present rate; "
        "a request with less time is refused at once (503 `would_be_late`)."
    )
    failed: list[FailedReply] = Field(description="The latest first; at most 100.")
    swaps: list[SwapReply]
    passes: int = Field(description="Forward passes since the start.")
    rows: int = Field(description="Images in them.")
    started_at: float
    settings_revision: int = Field(
        description="Of the settings that it goes by; less than the fleet's until it has taken over a change."
    )
    ongoing: int = Field(description="Requests worked on now.")
    queued: int = Field(description="Requests waiting now.")
    refused: int = Field(description="Requests refused since the start.")
    advertised: list[str] = Field(description="Refs that Ray's routers are told are here.")
    models: list[ModelReply] = Field(description="Most recently used first.")

    @classmethod
    def of(cls, snapshot: ReplicaSnapshot, state: str) -> ReplicaReply:
        """From the replica's snapshot and Serve's word."""
        # Not ``asdict``: it would copy the histograms, which nobody wants here.
        told = {name: getattr(snapshot, name) for name in cls.model_fields if name != "state"}
        return cls.model_validate({**told, "state": state}, from_attributes=True)


class TotalsReply(BaseModel):
    """Sums over the fleet, since each replica started."""

    requests: int
    hit_rate: dict[Tier, float] = Field(description="Share of requests, by where the model was found.")
    hits: dict[Tier, int]
    loads: int
    load_failures: int
    evictions: int
    quarantined: int = Field(description="Slots taken out of use by an isolation check.")
    swaps: int = Field(description="Swaps that took over from a resident version.")
    load_ms_p50: float | None = Field(description="Fetch, check and place; null before the first load.")
    load_ms_p99: float | None

    @classmethod
    def of(cls, stats: CacheStats) -> TotalsReply:
        """From summed counters."""
        p50, p99 = (stats.load_times.quantile_s(share) for share in (0.5, 0.99))
        return cls(
            requests=stats.requests,
            hit_rate={tier: stats.hits[tier] / max(stats.requests, 1) for tier in Tier},
            hits=stats.hits,
            loads=stats.loads,
            load_failures=stats.load_failures,
            evictions=stats.evictions,
            quarantined=stats.quarantined,
            swaps=stats.swaps,
            load_ms_p50=None if p50 is None else p50 * 1000,
            load_ms_p99=None if p99 is None else p99 * 1000,
        )


class PendingReplica(BaseModel):
    """A replica that can't tell about itself yet, or any more."""

    replica: str
    state: str
    node_ip: str


class PlacementReply(BaseModel):
    """How well the fleet is one cache."""

    duplicate_factor: float | None = Field(
        description="Models held, over distinct ones: 1 when each is in one replica; null when none is held."
    )
    effective_slots: float | None = Field(
        description="Slots of all replicas, over the duplicate factor: distinct models that fit."
    )
    at_home: float | None = Field(
        description="Share of requests, of models held now, that reached a home of theirs, or a copy."
    )
    load_imbalance: float | None = Field(
        description="Requests a second of the busiest replica, over the mean; null while nothing comes."
    )
    moved: dict[str, str] = Field(
        description="Models that were moved to another home than the ring's, to even out the load, and where."
    )
    copies: dict[str, list[str]] = Field(description="Models that more than one replica serves, and which.")

    @classmethod
    def of(cls, view: FleetView, placement: Placement | None) -> PlacementReply:
        """From what replicas hold and what was decided."""
        held = [(one.place, model) for one in view.snapshots for model in one.models]
        distinct = len({(model.tenant, model.version) for _, model in held})
        factor = len(held) / distinct if distinct else None
        names = {one.place: one.replica for one in view.snapshots}
        copies = dict(placement.copies) if placement is not None else {}
        moved = dict(placement.moved) if placement is not None else {}
        ring = ring_of(names)
        hits = at_home = 0
        for place, model in held:
            refs = (model.tenant, f"{model.tenant}@{model.version}")
            homes = {home for ref in refs for home in (*homes_of(ring, moved, ref, 1), *copies.get(ref, ()))}
            hits += model.hits
            at_home += model.hits if place in homes else 0
        return cls(
            duplicate_factor=factor,
            effective_slots=sum(one.slots for one in view.snapshots) / factor if factor else None,
            at_home=at_home / hits if hits else None,
            load_imbalance=placement.imbalance if placement is not None else None,
            moved={ref: names[place] for ref, place in moved.items() if place in names},
            copies={
                ref: [names[place] for place in places if place in names] for ref, places in copies.items()
            },
        )


class FleetReply(BaseModel):
    """The fleet."""

    replicas: list[ReplicaReply]
    not_answering: list[PendingReplica]
    totals: TotalsReply
    placement: PlacementReply
    settings_revision: int = Field(description="How often settings were changed in place since the start.")

    @classmethod
    def of(
        cls, view: FleetView, placement: Placement | None = None, settings_revision: int = 0
    ) -> FleetReply:
        """From what everybody said, and what was decided."""
        answered = {one.replica for one in view.snapshots}
        return cls(
            replicas=[
                ReplicaReply.of(
                    one, view.states[one.replica].state if one.replica in view.states else "UNKNOWN"
                )
                for one in view.snapshots
            ],
            not_answering=[
                PendingReplica(replica=one.replica, state=one.state, node_ip=one.node_ip)
                for one in view.states.values()
                if one.replica not in answered
            ],
            totals=TotalsReply.of(view.totals),
            placement=PlacementReply.of(view, placement),
            settings_revision=settings_revision,
        )
