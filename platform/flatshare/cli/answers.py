"""What a platform answers to client commands, and the check that it was one that answered.

The shapes name what the commands read; a newer platform may say more.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NotRequired, TypeVar, cast

import httpx
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from flatshare.cli.web import shown
from flatshare_registry.errors import InvalidInput

__all__ = [
    "About",
    "Drained",
    "Erased",
    "Erasing",
    "Fleet",
    "History",
    "Labels",
    "LiveSettings",
    "Plans",
    "Problem",
    "QuotasShown",
    "Refreshed",
    "Scaling",
    "Task",
    "TaskPage",
    "Tenant",
    "Unloaded",
    "Unpinned",
    "not_ours",
    "parsed",
]

T = TypeVar("T")


class _Problem(TypedDict):
    code: str
    message: str
    request_id: str


class Problem(TypedDict):
    """An error, of both planes and of the edge."""

    error: _Problem


class _Info(TypedDict):
    title: str


class About(TypedDict):
    """The head of an OpenAPI document."""

    info: _Info


class Refreshed(TypedDict):
    """Which replicas took up a change."""

    refreshed: list[str]


class Unpinned(TypedDict):
    """On how many replicas a model was pinned."""

    unpinned: int


class Unloaded(TypedDict):
    """On how many replicas a model was resident."""

    unloaded: int


class Labels(TypedDict):
    """A prediction."""

    predicted_label: list[int]


class Tenant(TypedDict):
    """A tenant, of the list of all."""

    id: str
    production: int | None


class QuotasShown(TypedDict):
    """A tenant's limits."""

    plan: str
    own: dict[str, float | None]
    effective: dict[str, float | None]


class Plans(TypedDict):
    """The plans that a platform knows."""

    plans: dict[str, dict[str, float | None]]


class Erasing(TypedDict):
    """An erasure that goes on."""

    step: str


class _Store(TypedDict):
    removed_blobs: list[Any]
    kept_blobs: list[dict[str, Any]]
    objects: int


class _Signature(TypedDict):
    public_key: str


class Erased(TypedDict):
    """The record of an erasure that has ended."""

    id: str
    versions: list[Any]
    store: _Store
    replicas: list[dict[str, Any]]
    nodes: list[dict[str, Any]]
    signature: _Signature


class _Model(TypedDict):
    tenant: str
    version: int
    digest: str
    size_bytes: int
    own_bytes: int
    tier: str
    state: str
    pinned: bool
    hits: int
    leases: int
    last_used_at: float


class _Host(TypedDict):
    used_bytes: int
    budget_bytes: int


class _Swap(TypedDict):
    tenant: str
    alias: str
    from_version: int
    to_version: int
    error: str


class _Failed(TypedDict):
    tenant: str
    version: int
    kind: str
    error: str
    at: float


class _Replica(TypedDict):
    replica: str
    place: int
    node: str
    device: str
    state: str
    slots: int
    slots_used: int
    settings_revision: int
    ongoing: int
    queued: int
    held_bytes: int
    budget_bytes: int | None
    host: _Host | None
    failed: list[_Failed]
    swaps: list[_Swap]
    models: list[_Model]


class _Pending(TypedDict):
    replica: str
    node_ip: str
    state: str


class _Totals(TypedDict):
    requests: int
    hits: dict[str, int]
    hit_rate: dict[str, float]
    loads: int
    load_failures: int
    load_ms_p50: float | None
    load_ms_p99: float | None
    evictions: int


class _Placement(TypedDict):
    duplicate_factor: float | None
    effective_slots: float | None
    at_home: float | None
    load_imbalance: float | None
    moved: dict[str, str]
    copies: dict[str, list[str]]


class Scaling(TypedDict):
    """How many replicas are wanted, and what is allowed."""

    min_replicas: int
    max_replicas: int
    wanted: int | None
    wish: int | None


class Drained(TypedDict):
    """A replica that was emptied and ended."""

    replica: str
    handed_over: int
    waited_s: float


class DrainedNode(TypedDict):
    """How far a node's drain is."""

    node_id: str
    address: str
    handed_over: int
    left: list[str]
    took_s: float


class Task(TypedDict):
    """A task."""

    id: str
    state: str
    path: str
    model: str
    created_at: str
    attempts: int
    error: NotRequired[str | None]


class TaskPage(TypedDict):
    """A page of tasks."""

    tasks: list[Task]
    next: str | None


class TaskQueue(TypedDict):
    """How much waits, and who runs it."""

    answers: bool
    due: int | None
    under_way: int | None
    oldest_s: float | None
    consumers: int | None
    min_consumers: int
    max_consumers: int


class LiveSettings(TypedDict):
    """Settings that can change in place, and which replicas go by a change."""

    revision: int
    settings: dict[str, Any]
    refreshed: list[str]
    missed: list[str] | None


class Fleet(TypedDict):
    """Every replica, the models in it, and totals."""

    settings_revision: int

    replicas: list[_Replica]
    not_answering: list[_Pending]
    totals: _Totals
    placement: _Placement


class _Point(TypedDict):
    at: float
    requests_per_s: float
    device: float | None
    p50: float | None
    p99: float | None


class _BusyTenant(TypedDict):
    tenant: str
    requests_per_s: float


class History(TypedDict):
    """The last hour of a fleet."""

    points: list[_Point]
    tenants: list[_BusyTenant]


def parsed(reply: httpx.Response, shape: type[T]) -> T:
    """What a reply says.

    Raises
    ------
    InvalidInput
        It is not what a platform answers to this.
    """
    kind: Any = shape
    try:
        _adapter(kind).validate_json(reply.content, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise not_ours(reply, f"{place}: {first['msg']}" if place else "it is not JSON") from None
    return cast("T", reply.json())  # unchanged, with whatever a newer platform adds


def not_ours(reply: httpx.Response, why: str) -> InvalidInput:
    """The error for an answer that did not come from a flatshare platform."""
    url = shown(str(reply.request.url))
    return InvalidInput(
        f"{url} answered {reply.status_code}, and not as a flatshare platform does ({why}): is --url right?"
    )


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
