"""Stored records: frozen, strict, versioned. JSON in the store, these types everywhere else."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flatshare_registry.errors import Corrupt

__all__ = [
    "DEFAULT_PLAN",
    "Action",
    "ApiKey",
    "AuditEntry",
    "Quotas",
    "Scope",
    "TenantHead",
    "TenantState",
    "TensorRecord",
    "VersionRecord",
    "new_ulid",
]

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A sha256 in lower-case hex."""

_CROCKFORD: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_ulid(now_s: float | None = None) -> str:
    """A ULID: 48 bits of milliseconds, then 80 random bits; sorts by time (github.com/ulid/spec)."""
    milliseconds = int((time.time() if now_s is None else now_s) * 1000)
    value = (milliseconds << 80) | int.from_bytes(os.urandom(10))
    return "".join(_CROCKFORD[(value >> shift) & 31] for shift in range(125, -1, -5))


ULID_TIME_CHARS: Final = 10
"""Characters of a ULID that are its time, in milliseconds; the other 16 are random."""


def ulid_time_ms(ulid: str) -> int:
    """When a ULID was made, in POSIX milliseconds, from it or its time part."""
    time_chars = reversed(ulid[:ULID_TIME_CHARS])
    return sum(_CROCKFORD.index(char) << 5 * place for place, char in enumerate(time_chars))


def next_ulid_time(time_chars: str) -> str:
    """The time part of a ULID one millisecond later."""
    value = ulid_time_ms(time_chars) + 1
    return "".join(_CROCKFORD[(value >> shift) & 31] for shift in range(45, -1, -5))


class _Record(BaseModel):
    """What all stored records share: frozen, no unknown fields, one schema version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1

    def encode(self) -> bytes:
        """Stable JSON: the same record is the same bytes."""
        return self.model_dump_json().encode()

    @classmethod
    def decode(cls, data: bytes, key: str) -> Self:
        """Parse what the store holds under ``key``.

        Raises
        ------
        Corrupt
            When it does not parse: written by something newer, or damaged.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise Corrupt(
                f"{key} is not a {cls.__name__} that this release reads ({error.error_count()} problems); "
                "it was damaged, or written by a newer flatshare"
            ) from error


class TensorRecord(BaseModel):
    """One tensor of a version.

    Attributes
    ----------
    start, end
        Byte range in the blob, counted from the file's first byte; ``end`` is exclusive.
    sha256
        Of exactly those bytes: equal tensors of two versions have equal digests.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    sha256: Digest

    @property
    def size_bytes(self) -> int:
        """Length of the tensor's data."""
        return self.end - self.start


class VersionRecord(_Record):
    """An immutable set of weights of one tenant.

    Attributes
    ----------
    probe_logits
        What the model said to its architecture's probe input when it was registered, so that a replica
        can tell that it loaded what was meant; None from a client without torch.
    """

    tenant: str
    version: int
    architecture: str
    digest: Digest
    size_bytes: int
    tensors: tuple[TensorRecord, ...]
    created_at: datetime
    created_by: str
    metadata: dict[str, str] = Field(default_factory=dict)
    probe_logits: tuple[float, ...] | None = Field(default=None, max_length=100_000)

    @property
    def name(self) -> str:
        """The ref that always means this version: ``acme@7``."""
        return f"{self.tenant}@{self.version}"

    def same_weights(self, other: VersionRecord) -> bool:
        """Whether both are the same weights in the same architecture."""
        return (self.digest, self.architecture) == (other.digest, other.architecture)


class Action(StrEnum):
    """What an audit entry records."""

    TENANT_CREATED = "tenant.created"
    TENANT_IMPORTED = "tenant.imported"
    TENANT_DELETED = "tenant.deleted"
    VERSION_REGISTERED = "version.registered"
    VERSION_DELETED = "version.deleted"
    ALIAS_SET = "alias.set"
    ALIAS_ROLLED_BACK = "alias.rolled-back"
    ALIAS_REMOVED = "alias.removed"
    KEY_CREATED = "key.created"
    KEY_ROTATED = "key.rotated"
    KEY_REVOKED = "key.revoked"
    QUOTAS_SET = "quotas.set"
    TENANT_SUSPENDED = "tenant.suspended"
    TENANT_RESUMED = "tenant.resumed"
    TENANT_ERASED = "tenant.erased"
    FLEET_PRELOAD = "fleet.preload"
    FLEET_UNPIN = "fleet.unpin"
    FLEET_UNLOAD = "fleet.unload"
    BATCH_RUN = "batch.run"


class AuditEntry(_Record):
    """Who changed what, when, from what to what.

    Attributes
    ----------
    revision
        The head's revision that the change made: entries of a tenant are totally ordered by it, whatever
        the writers' clocks say.
    actor
        Who: ``cli:<user>``, ``operator:<key id>``, ``key:<key id>``.
    request_id
        Of the control plane's request that made the change.
    detail
        What a version number does not say, as short strings; never a secret.
    previous
        :attr:`link` of the tenant's entry before this one; None for the first. So the entries are a chain.
    """

    id: str
    tenant: str
    revision: int
    at: datetime
    actor: str
    action: Action
    alias: str | None = None
    from_version: int | None = None
    to_version: int | None = None
    request_id: str | None = None
    detail: dict[str, str] = Field(default_factory=dict)
    previous: Digest | None = None

    @property
    def link(self) -> str:
        """sha256 of all that the entry says. Fields at their default don't count, so that one which a later
        release adds leaves the links of older entries as they are.
        """
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()


class Scope(StrEnum):
    """What an API key may do, within its tenant."""

    PREDICT = "predict"
    MANAGE = "manage"


class ApiKey(BaseModel):
    """A key of a tenant, without its secret.

    Attributes
    ----------
    id
        Public part of the key; names it in logs and audit entries.
    sha256
        Of the secret part.
    expires_at
        From then on it is refused; None for never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    sha256: Digest
    scopes: tuple[Scope, ...]
    label: str = Field(default="", max_length=100)
    created_at: datetime
    created_by: str
    expires_at: datetime | None = None


class Quotas(BaseModel):
    """A tenant's limits. In a tenant's, None means the plan's limit; in a plan, None means no limit of its
    own.

    Rates and counts hold for each replica: a tenant's traffic goes to one home, and to another only when
    that one is busy.

    Attributes
    ----------
    requests_per_s, burst
        A token bucket: the rate that it refills at, and what it holds (at least one second's worth).
    concurrent_requests
        Requests under way at a time, waiting included.
    rows_per_request, body_bytes
        Size of one request.
    cold_loads_per_min
        Loads of models that were not on the device.
    resident_bytes
        What its models may take on one device, each counted whole: beyond it the tenant evicts its own.
    resident_floor_bytes
        What other tenants can't evict of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_s: float | None = Field(default=None, gt=0, le=1e9, allow_inf_nan=False)
    burst: int | None = Field(default=None, ge=1, le=10**9)
    concurrent_requests: int | None = Field(default=None, ge=1, le=10**9)
    rows_per_request: int | None = Field(default=None, ge=1, le=10**9)
    body_bytes: int | None = Field(default=None, ge=1, le=2**50)
    cold_loads_per_min: float | None = Field(default=None, gt=0, le=1e9, allow_inf_nan=False)
    resident_bytes: int | None = Field(default=None, ge=1, le=2**50)
    resident_floor_bytes: int | None = Field(default=None, ge=0, le=2**50)

    def over(self, plan: Quotas) -> Quotas:
        """These where they are set, else the plan's."""
        return plan.model_copy(update=self.model_dump(exclude_none=True))


DEFAULT_PLAN: Final = "default"


class TenantState(StrEnum):
    """What may be done with a tenant.

    A deleted id can be created again, and goes on counting versions; an erased one never comes back.
    """

    ACTIVE = "active"
    SUSPENDED = "suspended"
    DELETED = "deleted"
    ERASED = "erased"

    @property
    def exists(self) -> bool:
        """Whether there is such a tenant, for readers."""
        return self in (TenantState.ACTIVE, TenantState.SUSPENDED)


class TenantHead(_Record):
    """The one mutable object of a tenant; every change is one compare-and-swap of it.

    Attributes
    ----------
    revision
        Grows by one with each change, so no two states of a head are byte-equal and an ETag
        never comes back.
    next_version
        Lower bound of the next version's number. Numbers are never used twice, also not after
        the tenant was deleted and created again.
    versions
        Committed versions and their digests. A version record that is not named here does not
        exist for readers: that makes a registration visible in one step.
    plan, quotas
        Name of a plan in the platform's settings, and the limits that differ from it for this tenant.
    keys
        API keys by id.
    past_digests
        Blobs that the tenant once named: those that are left in the store go with its erasure.
    last_entry
        The audit entry of the change that made this revision. It travels inside the swap, so a
        change and its entry are one step; the log object is written after, and again by whoever
        changes the head next.
    """

    tenant: str
    state: TenantState = TenantState.ACTIVE
    revision: int = 1
    next_version: int = 1
    versions: dict[int, Digest] = Field(default_factory=dict)
    aliases: dict[str, int] = Field(default_factory=dict)
    plan: str = DEFAULT_PLAN
    quotas: Quotas = Quotas()
    keys: dict[str, ApiKey] = Field(default_factory=dict)
    past_digests: tuple[Digest, ...] = ()
    created_at: datetime
    last_entry: AuditEntry


def with_past(head: TenantHead, digests: Iterable[str]) -> TenantHead:
    """A head that remembers having named these blobs."""
    return head.model_copy(update={"past_digests": tuple(sorted({*head.past_digests, *digests}))})


def utc(now_s: float) -> datetime:
    """Timezone-aware datetime of a POSIX time in seconds."""
    return datetime.fromtimestamp(now_s, UTC)
