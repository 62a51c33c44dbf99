"""A task's record, and what may become of it. Pure values; the store is ``store.py``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flatshare_registry.errors import Corrupt, InvalidInput
from flatshare_registry.ids import TenantId
from flatshare_registry.records import new_ulid

__all__ = [
    "Answered", "Callback", "CallbackState", "StoredInput", "TaskId", "TaskInput", "TaskRecord", "TaskState",
]  # fmt: skip

_ID: Final = re.compile(r"([^.]{1,63})\.([0-9A-HJKMNP-TV-Z]{26})", re.ASCII)


@dataclass(frozen=True, slots=True)
class TaskId:
    """``<tenant>.<ulid>``: sorts by time within a tenant, and says whose it is."""

    tenant: TenantId
    ulid: str

    @classmethod
    def new(cls, tenant: TenantId) -> TaskId:
        """One that nobody has."""
        return cls(tenant, new_ulid())

    @classmethod
    def parse(cls, text: str) -> TaskId:
        """From its text.

        Raises
        ------
        InvalidInput
            It is not a task id.
        """
        match = _ID.fullmatch(text)
        if match is None:
            raise InvalidInput(f"{text[:100]!a} is no task id")
        return cls(TenantId(match[1]), match[2])

    def __str__(self) -> str:
        return f"{self.tenant}.{self.ulid}"


class TaskState(StrEnum):
    """Where a task is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    """Refused for good: another try would be refused, too."""
    DEAD = "dead"
    """Given up after its tries; can be looked into, and replayed."""
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether its state no longer changes by itself."""
        return self not in (TaskState.QUEUED, TaskState.RUNNING)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredInput(_Frozen):
    """An object of the store that somebody put there for tasks; as it was when the task was taken."""

    name: str
    etag: str


class TaskInput(_Frozen):
    """The request that was taken; its body is an object of its own."""

    path: str = Field(description="/predict, /classify or /pipelines/<name>.")
    ref: str = Field(description="The model that it names; its version is resolved when it runs.")
    headers: dict[str, str] = Field(description="Those that say how to read the body.")
    sha256: str | None = Field(None, description="Of the body; None where it is a stored input.")
    size_bytes: int
    stored: StoredInput | None = Field(None, description="The body is this object of the store.")


class Answered(_Frozen):
    """How it was answered; the body is an object of its own."""

    status: int
    content_type: str
    version: int | None = None
    digest: str | None = None
    fence: str = Field(description="The run whose answer it is.")


class CallbackState(StrEnum):
    """Where the message of a task's end is."""

    OWED = "owed"
    """The task has not ended, or nobody has taken the message yet."""
    DELIVERED = "delivered"
    FAILED = "failed"
    """Given up; the task itself is as it was."""


class Callback(_Frozen):
    """Who is told of a task's end."""

    url: str
    state: CallbackState = CallbackState.OWED
    attempts: int = 0
    """Messages that were sent, or tried to be."""
    error: str | None = None
    """Why the last one was not taken."""
    ended_at: datetime | None = None
    """Since when the message is owed."""


class TaskRecord(_Frozen):
    """One task.

    Attributes
    ----------
    owner_since
        When the tenant was created: a tenant that gets the same id later is another one.
    pinned
        The version that answers, whatever the ref means when it runs; None: what the ref means then.
    caller, key_id
        Who sent it; the tenant's key that must still be good when it runs, None for an operator's.
    attempts
        Runs that were begun, including those that a crash ended.
    failures
        Those of them that failed, or are under way; a run that found no room does not count.
    busy_since
        Since when its runs have found no room.
    fence
        Of the run that may end it now: the answer of any other run is dropped.
    error
        Why the last run did not answer it, or why it was refused.
    callback
        Who is told of its end; None: nobody.
    traceparent
        Of the request that sent it, if that was sampled: its runs are part of that trace.
    """

    schema_version: int = 1
    id: str
    tenant: str
    state: TaskState
    input: TaskInput
    owner_since: datetime | None = None
    pinned: str | None = None
    caller: str
    key_id: str | None = None
    created_at: datetime
    updated_at: datetime
    expires_at: datetime
    attempts: int = 0
    failures: int = 0
    busy_since: datetime | None = None
    fence: str | None = None
    error: str | None = None
    code: str | None = None
    answer: Answered | None = None
    callback: Callback | None = None
    traceparent: str | None = None

    @property
    def open(self) -> bool:
        """Whether something is still to be done for it: it has not ended, or nobody was told yet."""
        return not self.state.ended or self.owes_callback

    @property
    def owes_callback(self) -> bool:
        """Whether its sender must be told of its end; not if it was cancelled: whoever cancels it knows."""
        return (
            self.state.ended
            and self.state is not TaskState.CANCELLED
            and self.callback is not None
            and self.callback.state is CallbackState.OWED
        )

    @property
    def tries(self) -> int:
        """How often the next thing to do, a run or the callback, has been tried."""
        return self.callback.attempts if self.owes_callback and self.callback else self.attempts

    def encode(self) -> bytes:
        """As it is stored."""
        return self.model_dump_json(exclude_none=True).encode()

    @classmethod
    def decode(cls, data: bytes, key: str) -> TaskRecord:
        """From stored bytes.

        Raises
        ------
        Corrupt
            They are not a task's record.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise Corrupt(f"{key} is no task's record") from error

    def now(self, state: TaskState, at: float, **changes: object) -> TaskRecord:
        """The same in another state."""
        when = datetime.fromtimestamp(at, UTC)
        return self.model_copy(update={"state": state, "updated_at": when, **changes})
