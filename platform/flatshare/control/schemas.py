"""Bodies of the control plane: what goes in, what comes out, as its OpenAPI shows them."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime

from pydantic import BaseModel, Field

from flatshare.cache.stats import CacheStats
from flatshare.cache.tiers import State, Tier
from flatshare.control.fleet import FleetView
from flatshare.pool.snapshot import ReplicaSnapshot
from flatshare_registry.records import (
    ApiKey,
    AuditEntry,
    Quotas,
    Scope,
    TenantHead,
    TenantState,
    VersionRecord,
)

__all__ = [
    "AliasChange",
    "AliasChanged",
    "AuditReply",
    "AuditVerified",
    "FleetReply",
    "KeyReply",
    "ModelRequest",
    "NewKeyReply",
    "NewKeyRequest",
    "NewTenant",
    "PlansReply",
    "PreloadRequest",
    "QuotasReply",
    "QuotasRequest",
    "Refreshed",
    "RotateRequest",
    "TenantReply",
    "VersionReply",
]


class NewTenant(BaseModel):
    """A tenant to create."""

    id: str = Field(
        description="1 to 63 of a-z, 0-9 and '-', not starting or ending with '-'.", examples=["acme"]
    )


class AliasChange(BaseModel):
    """Where an alias should point."""

    version: int = Field(strict=True, description="One of the tenant's versions.", examples=[7])


class ModelRequest(BaseModel):
    """A model, by ref."""

    model: str = Field(examples=["acme:canary"])


class PreloadRequest(ModelRequest):
    """A model to make resident."""

    pin: bool = Field(
        default=False,
        description="Also keep it, on replicas that start later too, until it is unpinned or unloaded.",
    )


class ErasingReply(BaseModel):
    """An erasure that goes on."""

    since: float = Field(description="POSIX seconds.")
    step: str = Field(description="What it does now.")


class TenantReply(BaseModel):
    """A tenant."""

    id: str
    state: TenantState
    plan: str
    production: int | None = Field(description="What a bare id means; null before the first version.")
    aliases: dict[str, int]
    versions: list[int]
    created_at: datetime

    @classmethod
    def of(cls, head: TenantHead) -> TenantReply:
        """From the stored head."""
        return cls(
            id=head.tenant,
            state=head.state,
            plan=head.plan,
            production=head.aliases.get("production"),
            aliases=head.aliases,
            versions=sorted(head.versions),
            created_at=head.created_at,
        )


class VersionReply(BaseModel):
    """A version, without its list of tensors."""

    tenant: str
    version: int
    architecture: str
    digest: str = Field(description="sha256 of the safetensors file.")
    size_bytes: int
    tensors: int = Field(description="How many.")
    probed: bool = Field(description="Whether replicas compare its answer to the probe with the stored one.")
    created_at: datetime
    created_by: str
    metadata: dict[str, str]

    @classmethod
    def of(cls, record: VersionRecord) -> VersionReply:
        """From the stored record."""
        return cls(
            tenant=record.tenant,
            version=record.version,
            architecture=record.architecture,
            digest=record.digest,
            size_bytes=record.size_bytes,
            tensors=len(record.tensors),
            probed=record.probe_logits is not None,
            created_at=record.created_at,
            created_by=record.created_by,
            metadata=record.metadata,
        )


class AuditReply(BaseModel):
    """Who changed what, oldest first."""

    entries: list[AuditEntry]


class AuditVerified(BaseModel):
    """What a check of the log's chain found."""

    whole: bool
    problems: list[str] = Field(description="In words; empty when the log is whole.")
    entries: int
    last_link: str = Field(
        description="sha256 of the last entry. Who keeps it elsewhere can tell later that the log only grew."
    )


class KeyReply(BaseModel):
    """An API key, without its secret."""

    id: str
    scopes: list[Scope]
    label: str
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    last_used_at: datetime | None = Field(description="To the hour; null when it was never used.")

    @classmethod
    def of(cls, key: ApiKey, used: datetime | None) -> KeyReply:
        """From the stored key."""
        return cls(**key.model_dump(exclude={"sha256"}), last_used_at=used)


class NewKeyRequest(BaseModel):
    """A key to make."""

    scopes: list[Scope] = Field(default_factory=lambda: [Scope.PREDICT], max_length=8)
    label: str = Field(default="", max_length=100, examples=["checkout service"])
    lifetime_s: float | None = Field(default=None, gt=0, description="Seconds; null for no end.")


class RotateRequest(BaseModel):
    """How long the old key goes on."""

    grace_s: float = Field(default=86_400, ge=0, description="Seconds that the old key goes on being good.")


class QuotasRequest(BaseModel):
    """A tenant's limits."""

    plan: str | None = Field(default=None, description="Null leaves the plan as it is.")
    quotas: Quotas = Field(
        default_factory=Quotas, description="All that is different from the plan; null: as the plan says."
    )


class Refreshed(BaseModel):
    """Which replicas read the tenant anew; the others do within their view's TTL."""

    refreshed: list[str]


class NewKeyReply(Refreshed):
    """A key just made: the only time that its secret is seen."""

    id: str
    key: str = Field(description="Give it to its owner; it can't be shown again.")


class QuotasReply(Refreshed):
    """A tenant's limits."""

    plan: str
    own: Quotas = Field(description="What is different from the plan.")
    effective: Quotas = Field(description="What holds; null: no limit of the tenant's own.")


class PlansReply(BaseModel):
    """The plans that tenants can be on."""

    plans: dict[str, Quotas] = Field(description="Limits by name; null: no limit of the plan's.")


class AliasChanged(Refreshed):
    """The tenant after the change, and which replicas know it already."""

    tenant: TenantReply


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
    swaps: list[SwapReply]
    passes: int = Field(description="Forward passes since the start.")
    rows: int = Field(description="Images in them.")
    started_at: float
    ongoing: int = Field(description="Requests worked on now.")
    queued: int = Field(description="Requests waiting now.")
    refused: int = Field(description="Requests refused since the start.")
    advertised: list[str] = Field(description="Refs that Ray's routers are told are here.")
    models: list[ModelReply] = Field(description="Most recently used first.")

    @classmethod
    def of(cls, snapshot: ReplicaSnapshot, state: str) -> ReplicaReply:
        """From the replica's snapshot and Serve's word."""
        return cls.model_validate({**asdict(snapshot), "state": state})


class TotalsReply(BaseModel):
    """Sums over the fleet, since each replica started."""

    requests: int
    hit_rate: dict[Tier, float] = Field(description="Share of requests, by where the model was found.")
    hits: dict[Tier, int]
    loads: int
    load_failures: int
    evictions: int
    quarantined: int = Field(description="Slots taken out of use by an isolation check.")
    swaps: int = Field(description="Promotions that took over from a resident version.")
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


class FleetReply(BaseModel):
    """The fleet."""

    replicas: list[ReplicaReply]
    not_answering: list[PendingReplica]
    totals: TotalsReply

    @classmethod
    def of(cls, view: FleetView) -> FleetReply:
        """From what everybody said."""
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
        )
