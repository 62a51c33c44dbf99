"""Stored records: frozen, strict, versioned. JSON in the store, these types everywhere else."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flatshare_registry.errors import Corrupt

__all__ = ["Action", "AuditEntry", "TenantHead", "TenantState", "TensorRecord", "VersionRecord", "new_ulid"]

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


def next_ulid_time(time_chars: str) -> str:
    """The time part of a ULID one millisecond later."""
    value = sum(_CROCKFORD.index(char) << 5 * place for place, char in enumerate(reversed(time_chars))) + 1
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
    TENANT_DELETED = "tenant.deleted"
    VERSION_REGISTERED = "version.registered"
    VERSION_DELETED = "version.deleted"
    ALIAS_SET = "alias.set"
    ALIAS_ROLLED_BACK = "alias.rolled-back"
    ALIAS_REMOVED = "alias.removed"


class AuditEntry(_Record):
    """Who changed what, when, from which version to which.

    ``revision`` is the head's revision that the change made: entries of a tenant are totally
    ordered by it, whatever the writers' clocks say.
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


class TenantState(StrEnum):
    """Whether a tenant can be resolved."""

    ACTIVE = "active"
    DELETED = "deleted"


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
    created_at: datetime
    last_entry: AuditEntry


def utc(now_s: float) -> datetime:
    """Timezone-aware datetime of a POSIX time in seconds."""
    return datetime.fromtimestamp(now_s, UTC)
