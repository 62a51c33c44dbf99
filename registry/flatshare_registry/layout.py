"""Object layout: the only module that knows where things are in the store.

::

    tenants/<tenant>/head.json                  TenantHead, changed only by compare-and-swap
    tenants/<tenant>/versions/<00000007>.json   VersionRecord, immutable, created if absent
    tenants/<tenant>/log/<ulid>.json            AuditEntry, immutable, created if absent
    tenants/<tenant>/used/<key id>.json         when a key was used last, to the hour
    pins/<tenant>/<ref>.json                    empty: every replica keeps this ref resident
    erasures/<tenant>/<ulid>.json               what was erased of a tenant, signed
    erasures/<tenant>/plan.json                 what is to be erased, while that is under way
    erasures/<tenant>/held/<digest>.safetensors weights that an erasure removes, until nobody can name them
    changes/<ulid>.<tenant>.<revision>          empty: this tenant's head is about to get this revision
    clock/<ulid>                                empty, for a moment: what time it is by the store's clock
    tasks/<tenant>/<ulid>/record.json           a task taken from a tenant, changed only by compare-and-swap
    tasks/<tenant>/<ulid>/input                 what was sent
    tasks/<tenant>/<ulid>/answer-<ulid>         what a run answered
    tasks/<tenant>/once-<sha256>                the task that an idempotency key made
    task-inputs/<tenant>/<name>                 what was put there for tasks to come
    open-tasks/<tenant>/<ulid>                  empty: this task has not ended
    blobs/sha256/<ab>/<digest>.safetensors      weights, named by content, shared by equal versions
    held/<digest>.safetensors                   weights that are being removed, until nobody can name them
    usage/<yyyy-mm-ddThh>/<writer>.json         what tenants used of one replica in one hour
    checks/<ulid>                               for a moment: whether conditional writes are honoured
    store.json                                  the store's identity
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from flatshare_registry.errors import Corrupt
from flatshare_registry.ids import ModelRef, TenantId

IDENTITY: Final = "store.json"
TENANTS: Final = "tenants/"
BLOBS: Final = "blobs/sha256/"
PINS: Final = "pins/"
HELD: Final = "held/"
CHANGES: Final = "changes/"
TASKS: Final = "tasks/"
OPEN_TASKS: Final = "open-tasks/"
USAGE: Final = "usage/"

_HEAD: Final = re.compile(r"tenants/([^/]+)/head\.json")
_VERSION: Final = re.compile(r"tenants/([^/]+)/versions/([0-9]{8})\.json")
_BLOB: Final = re.compile(r"blobs/sha256/[0-9a-f]{2}/([0-9a-f]{64})\.safetensors")
_CHANGE: Final = re.compile(r"changes/([0-9A-Z]{26})\.([^/.]+)\.([0-9]{1,15})", re.ASCII)
_OPEN_TASK: Final = re.compile(r"open-tasks/([^/.]+)/([0-9A-Z]{26})", re.ASCII)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def head_key(tenant: TenantId) -> str:
    """Key of a tenant's head."""
    return f"{TENANTS}{tenant}/head.json"


def versions_prefix(tenant: TenantId) -> str:
    """Prefix of a tenant's version records."""
    return f"{TENANTS}{tenant}/versions/"


def version_key(tenant: TenantId, version: int) -> str:
    """Key of one version record."""
    return f"{versions_prefix(tenant)}{version:08d}.json"


def log_prefix(tenant: TenantId) -> str:
    """Prefix of a tenant's audit log."""
    return f"{TENANTS}{tenant}/log/"


def log_key(tenant: TenantId, entry_id: str) -> str:
    """Key of one audit entry."""
    return f"{log_prefix(tenant)}{entry_id}.json"


def used_prefix(tenant: TenantId) -> str:
    """Prefix of the notes on when keys were used."""
    return f"{TENANTS}{tenant}/used/"


def used_key(tenant: TenantId, key_id: str) -> str:
    """Key of the note on when one API key was used."""
    return f"{used_prefix(tenant)}{key_id}.json"


def pins_prefix(tenant: TenantId) -> str:
    """Prefix of a tenant's pins."""
    return f"{PINS}{tenant}/"


def pin_key(ref: ModelRef) -> str:
    """Key of one pin."""
    return f"{pins_prefix(ref.tenant)}{ref}.json"


def ref_of_pin(key: str) -> str:
    """Text of the ref in a pin's key."""
    return key.rpartition("/")[2].removesuffix(".json")


def erasures_prefix(tenant: TenantId) -> str:
    """Prefix of a tenant's erasure records."""
    return f"erasures/{tenant}/"


def erasure_plan_key(tenant: TenantId) -> str:
    """Key of what is still to be erased of a tenant, while an erasure is under way."""
    return f"{erasures_prefix(tenant)}plan.json"


def erasure_held_prefix(tenant: TenantId) -> str:
    """Prefix of weights that are being removed, until it is sure that nobody else came to name them."""
    return f"{erasures_prefix(tenant)}held/"


def erasure_key(tenant: TenantId, record_id: str) -> str:
    """Key of one erasure record."""
    return f"{erasures_prefix(tenant)}{record_id}.json"


def clock_key(ulid: str) -> str:
    """Key of an object that is written to see the time by the store's clock."""
    return f"clock/{ulid}"


def change_key(ulid: str, tenant: TenantId, revision: int) -> str:
    """Key of the announcement that a tenant's head is about to get a revision."""
    return f"{CHANGES}{ulid}.{tenant}.{revision}"


def tasks_prefix(tenant: TenantId) -> str:
    """Prefix of a tenant's tasks."""
    return f"{TASKS}{tenant}/"


def task_prefix(tenant: TenantId, ulid: str) -> str:
    """Prefix of one task."""
    return f"{tasks_prefix(tenant)}{ulid}/"


def task_key(tenant: TenantId, ulid: str, name: str) -> str:
    """Key of a task's record, input or answer."""
    return f"{task_prefix(tenant, ulid)}{name}"


def task_once_key(tenant: TenantId, digest: str) -> str:
    """Key of the note that says which task an idempotency key has made."""
    return f"{tasks_prefix(tenant)}once-{digest}"


def is_task_once(key: str) -> bool:
    """Whether a key below ``tasks/`` is of such a note."""
    return key.count("/") == 2 and key.rpartition("/")[2].startswith("once-")


def usage_hour(moment: datetime) -> str:
    """How the hour of a moment is named, in UTC; names sort as hours do."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H")


def usage_key(moment: datetime, writer: str) -> str:
    """Key of what one process counted in the hour of a moment."""
    return f"{USAGE}{usage_hour(moment)}/{writer}.json"


def task_inputs_prefix(tenant: TenantId) -> str:
    """Prefix of inputs that were put there for a tenant's tasks."""
    return f"task-inputs/{tenant}/"


def open_tasks_prefix(tenant: TenantId) -> str:
    """Prefix of the notes on a tenant's tasks that have not ended."""
    return f"{OPEN_TASKS}{tenant}/"


def open_task_key(tenant: TenantId, ulid: str) -> str:
    """Key of the note that a task has not ended."""
    return f"{open_tasks_prefix(tenant)}{ulid}"


def open_task_of(key: str) -> tuple[str, str] | None:
    """Tenant text and id of a note that a task has not ended; None for any other key."""
    match = _OPEN_TASK.fullmatch(key)
    return (match[1], match[2]) if match else None


def blob_key(digest: str) -> str:
    """Key of the weights with this sha256 (64 lower-case hex digits).

    Raises
    ------
    Corrupt
        When the digest is not one: a record was tampered with, and the text must not become a path.
    """
    if _DIGEST.fullmatch(digest) is None:
        raise Corrupt("a version record names a digest that is not a sha256")
    return f"{BLOBS}{digest[:2]}/{digest}.safetensors"


def tenant_of_head(key: str) -> str | None:
    """Tenant text of a head's key; None for any other key."""
    match = _HEAD.fullmatch(key)
    return match[1] if match else None


def version_of(key: str) -> tuple[str, int] | None:
    """Tenant text and number of a version record's key; None for any other key."""
    match = _VERSION.fullmatch(key)
    return (match[1], int(match[2])) if match else None


def change_of(key: str) -> tuple[str, str, int] | None:
    """Id, tenant text and revision of an announcement's key; None for any other key."""
    match = _CHANGE.fullmatch(key)
    return (match[1], match[2], int(match[3])) if match else None


def digest_of(key: str) -> str | None:
    """Digest of a blob's key; None for any other key."""
    match = _BLOB.fullmatch(key)
    return match[1] if match else None
