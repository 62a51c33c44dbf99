"""Bodies of the control plane: what goes in, what comes out, as its OpenAPI shows them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field

from flatshare.control.fleet import Told
from flatshare_registry.ids import MAX_VERSION
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
    "RollbackRequest",
    "RotateRequest",
    "TenantReply",
    "Unloaded",
    "Unpinned",
    "VersionNumber",
    "VersionReply",
    "told",
]


VersionNumber = Annotated[int, Field(ge=1, le=MAX_VERSION)]


class NewTenant(BaseModel):
    """A tenant to create."""

    id: str = Field(
        description="1 to 63 of a-z, 0-9 and '-', not starting or ending with '-'.", examples=["acme"]
    )


class AliasChange(BaseModel):
    """Where an alias should point."""

    version: VersionNumber = Field(strict=True, description="One of the tenant's versions.", examples=[7])


class RollbackRequest(BaseModel):
    """What is rolled back from."""

    expected: VersionNumber | None = Field(
        default=None,
        description="The version that the alias names now. If it names another, 409; if its last move was "
        "the rollback from this one, nothing is changed: so a request can be sent again. Without it each "
        "request is one more move.",
        examples=[8],
    )


class ModelRequest(BaseModel):
    """A model, by ref."""

    model: str = Field(examples=["acme:canary"])


class PreloadRequest(ModelRequest):
    """A model to make resident."""

    pin: bool = Field(
        default=False,
        description="Also keep it, on replicas that start later too, until it is unpinned or unloaded.",
    )


class Unpinned(BaseModel):
    """What became of a pin."""

    unpinned: int = Field(description="On how many replicas the model was pinned.")


class Unloaded(BaseModel):
    """What became of a model."""

    unloaded: int = Field(description="On how many replicas the model was resident.")


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
    """Who changed what: a page of the log."""

    entries: list[AuditEntry] = Field(description="Oldest first.")
    next: str | None = Field(description="`before` of the page of older entries; null when there are none.")


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
    missed: list[str] | None = Field(
        description="Replicas that exist and were not reached: they start, update, stop, or did not answer "
        "in time. Null when Serve could not say which exist."
    )

    @classmethod
    def of(cls, now: Told) -> Self:
        """From whom the fleet reached."""
        return cls(**told(now))


def told(now: Told) -> dict[str, Any]:
    """The fields of :class:`Refreshed`, for bodies that have more."""
    return {"refreshed": list(now.reached), "missed": None if now.missed is None else list(now.missed)}


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
