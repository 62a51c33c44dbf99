"""A tenant as a folder: all that the registry has of it, from one store into another.

<folder>/head.json  versions/00000001.json ...  log/<ulid>.json ...  blobs/<sha256>.safetensors ...

A folder may come from anybody, so an import trusts nothing that it can check: records must say what the
weights hold, names and numbers must be valid, and the new operator decides what a tenant may use. The import
itself is an entry of the tenant's log, which goes on where the other store's log ended.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flatshare_registry import layout
from flatshare_registry.blobs import put_if_gone, put_shared
from flatshare_registry.errors import (
    AlreadyExists,
    Corrupt,
    InvalidInput,
    InvalidRef,
    InvalidWeights,
    NotFound,
)
from flatshare_registry.heads import HeadStore, chain_problems
from flatshare_registry.ids import MAX_VERSION, AliasName, TenantId
from flatshare_registry.records import (
    DEFAULT_PLAN,
    Action,
    AuditEntry,
    Quotas,
    TenantHead,
    VersionRecord,
)
from flatshare_registry.stores.base import BlobStore, Create
from flatshare_registry.weights import describe

__all__ = ["Transferred", "export_tenant", "import_tenant", "read_head"]

Transferred = dict[str, int]
"""Counts: versions, entries of the log, blobs, and bytes of blobs."""

Progress = Callable[[int, int], None]

MAX_RECORD_BYTES = 16 * 1024**2
"""Longest head, record or entry that is read."""


def export_tenant(
    store: BlobStore, tenant: TenantId, folder: Path, progress: Progress = lambda done, total: None
) -> Transferred:
    """Write a tenant into a new folder. Weights are checked on the way.

    Raises
    ------
    NotFound
        No such tenant.
    InvalidInput
        The folder is there already, and not empty.
    Corrupt
        What the store holds is not what its records say; the folder is then not whole.
    """
    key = layout.head_key(tenant)
    try:
        raw = store.get(key).data
    except NotFound:
        raise NotFound(f"there is no tenant {tenant}") from None
    head = TenantHead.decode(raw, key)
    if not head.state.exists:
        raise NotFound(f"there is no tenant {tenant}")
    if folder.exists() and any(folder.iterdir()):
        raise InvalidInput(f"{folder} is not empty")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)  # it holds weights, and hashes of keys
    for name in ("versions", "log", "blobs"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "log" / f"{head.last_entry.id}.json").write_bytes(head.last_entry.encode())
    for meta in store.list(layout.log_prefix(tenant)):
        entry = store.get(meta.key).data
        if AuditEntry.decode(entry, meta.key).revision <= head.revision:  # not of a change since we looked
            (folder / "log" / meta.key.rpartition("/")[2]).write_bytes(entry)
    size = 0
    numbers = sorted(head.versions)
    for index, number in enumerate(numbers):
        key = layout.version_key(tenant, number)
        record = store.get(key).data
        digest = VersionRecord.decode(record, key).digest
        target = folder / "blobs" / f"{digest}.safetensors"
        if not target.exists():
            data = store.get(layout.blob_key(digest)).data
            _check(digest, data)
            target.write_bytes(data)
            size += len(data)
        (folder / "versions" / key.rpartition("/")[2]).write_bytes(record)
        progress(index + 1, len(numbers))
    (folder / "head.json").write_bytes(raw)  # last: a folder without it is not whole
    return _counts(folder, size)


def import_tenant(
    store: BlobStore,
    folder: Path,
    progress: Progress = lambda done, total: None,
    *,
    actor: str = "unknown",
    clock: Callable[[], float] = time.time,
    with_quotas: bool = False,
) -> Transferred:
    """Bring an exported tenant into a store; visible in one step, near the end. Run again, it finishes.

    Parameters
    ----------
    actor, clock
        Who does it and when, for the tenant's log.
    with_quotas
        Also take its plan and limits over. Else it begins with the default plan.

    Raises
    ------
    InvalidInput
        The folder is not a whole export, or holds what can't be: nothing was written.
    AlreadyExists
        The store has, or had, another tenant of this id; or came to have one while this ran.
    """
    export = _checked(folder)
    head = export.head
    _check_free(store, head)
    size = 0
    for index, (digest, path) in enumerate(export.blobs.items()):
        data = _read(path, export.sizes[digest])
        size += len(data)
        put_shared(store, layout.blob_key(digest), data)
        progress(index + 1, len(export.blobs))
    for key, data in export.records.items():
        put_shared(store, key, data)
        if store.get(key).data != data:
            raise AlreadyExists(f"the store has another {key}")
    for key, data in export.entries.items():
        try:
            store.put(key, data, Create())
        except AlreadyExists:
            if store.get(key).data != data:
                raise AlreadyExists(f"the store has another {key}") from None
    heads = HeadStore(store, actor, clock)
    told = {"link": head.last_entry.link, "quotas": "kept" if with_quotas else "default"}
    entry = heads.entry_after(head, Action.TENANT_IMPORTED, told)
    limits = {} if with_quotas else {"plan": DEFAULT_PLAN, "quotas": Quotas()}
    imported = head.model_copy(update={**limits, "revision": entry.revision, "last_entry": entry})
    try:
        heads.swap(imported, Create())
        heads.write_log(entry)
    except AlreadyExists:
        _check_free(store, head)  # an import that was cut short, or whose answer was lost, is this one
    # gc, or somebody's erasure of the same weights, may have taken what was not named until now.
    for digest, path in export.blobs.items():
        put_if_gone(store, layout.blob_key(digest), _read(path, export.sizes[digest]))
    for key, data in export.records.items():
        put_if_gone(store, key, data)
    return _counts(folder, size)


def read_head(folder: Path) -> TenantHead:
    """The head in an exported folder.

    Raises
    ------
    InvalidInput
        There is none that can be read.
    """
    try:
        return TenantHead.decode(_read(folder / "head.json"), "head.json")
    except (OSError, Corrupt) as error:
        raise InvalidInput(f"{folder} is not an export") from error


@dataclass(frozen=True, slots=True)
class _Export:
    """A folder that was found to be whole: what is to be written, by key; and where the weights are."""

    head: TenantHead
    records: dict[str, bytes]
    entries: dict[str, bytes]
    blobs: dict[str, Path]
    sizes: dict[str, int]


def _checked(folder: Path) -> _Export:
    """An export in which nothing is missing, nothing is another's, and nothing is impossible.

    Raises
    ------
    InvalidInput
        It is not that.
    """
    log: list[AuditEntry] = []
    makers: dict[int, str] = {}
    try:
        head = TenantHead.decode(_read(folder / "head.json"), "head.json")
        tenant = TenantId(head.tenant)
        _check_head(head, folder)
        export = _Export(head, {}, {}, {}, {})
        for number, digest in head.versions.items():
            key = layout.version_key(tenant, number)
            name = key.rpartition("/")[2]
            raw = _read(folder / "versions" / name)
            record = VersionRecord.decode(raw, name)
            if (record.tenant, record.version, record.digest) != (tenant, number, digest):
                raise InvalidInput(f"{folder}: versions/{name} is not what head.json says")
            blob = folder / "blobs" / f"{digest}.safetensors"
            data = _read(blob, record.size_bytes)
            _check(digest, data)
            described = describe(data)
            if (described.tensors, described.size_bytes) != (record.tensors, record.size_bytes):
                raise InvalidInput(f"{folder}: versions/{name} does not say what its weights hold")
            export.records[key] = raw
            makers[number] = record.created_by
            export.blobs[digest], export.sizes[digest] = blob, record.size_bytes
        for path in sorted((folder / "log").glob("*.json")):
            raw = _read(path)
            entry = AuditEntry.decode(raw, path.name)
            if entry.tenant != tenant or path.stem != entry.id:
                raise InvalidInput(f"{folder}: log/{path.name} is another's")
            log.append(entry)
            export.entries[layout.log_key(tenant, entry.id)] = raw
        problems = chain_problems(head, log, head.revision)
        if problems:
            raise InvalidInput(f"{folder}: its audit log is not whole: {problems[0]}")
        _check_makers(makers, log, folder)
    except (OSError, Corrupt, InvalidWeights) as error:
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error.message
        raise InvalidInput(f"{folder} is not a whole export: {why}") from error
    return export


def _check_makers(makers: Mapping[int, str], log: Iterable[AuditEntry], folder: Path) -> None:
    """Return if each version was made by the actor that the log names, as far as the log names one.

    Raises
    ------
    InvalidInput
        A record names somebody else.
    """
    for entry in log:
        if entry.action is not Action.VERSION_REGISTERED or entry.to_version is None:
            continue
        if makers.get(entry.to_version, entry.actor) != entry.actor:
            raise InvalidInput(f"{folder}: the record of version {entry.to_version} names another maker")


def _check_head(head: TenantHead, folder: Path) -> None:
    """Return if a head says nothing that a registry would not have written.

    Raises
    ------
    InvalidInput
        It does.
    """
    if not head.state.exists:
        raise InvalidInput(f"{folder}: its tenant was deleted or erased")
    for number in head.versions:
        if not 1 <= number <= MAX_VERSION or number >= head.next_version:
            raise InvalidInput(f"{folder}: head.json names version {number}, which can't be")
    for alias, number in head.aliases.items():
        try:
            AliasName(alias)
        except InvalidRef as error:
            raise InvalidInput(f"{folder}: head.json: {error.message}") from None
        if number not in head.versions:
            raise InvalidInput(f"{folder}: head.json: {alias} names version {number}, which is not there")
    for key_id in head.keys:
        if not key_id.startswith(f"{head.tenant}."):
            raise InvalidInput(f"{folder}: head.json has a key of somebody else")


def _check_free(store: BlobStore, head: TenantHead) -> None:
    """Return if there is no tenant of this id, or just what an import of the same folder made.

    Raises
    ------
    AlreadyExists
        There is, or was, another.
    """
    with contextlib.suppress(NotFound):
        there = TenantHead.decode(store.get(layout.head_key(TenantId(head.tenant))).data, "head.json")
        last = there.last_entry
        same = last.action is Action.TENANT_IMPORTED and last.previous == head.last_entry.link
        if not same:
            raise AlreadyExists(f"there is, or was, a tenant {head.tenant} in this store")


def _read(path: Path, size: int | None = None) -> bytes:
    """The bytes of a regular file: no link, no pipe, no device, and not longer than it may be.

    Raises
    ------
    OSError
        It is not that.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > MAX_RECORD_BYTES and size is None:
            raise OSError(errno.EFBIG, "longer than a record can be", str(path))
        if size is not None and status.st_size != size:
            raise OSError(errno.EINVAL, f"{status.st_size} bytes, not the {size} of its record", str(path))
        return file.read()


def _check(digest: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != digest:
        raise Corrupt(f"the weights {digest[:12]} do not have their sha256")


def _counts(folder: Path, size: int) -> Transferred:
    return {
        "versions": len(list((folder / "versions").glob("*.json"))),
        "log": len(list((folder / "log").glob("*.json"))),
        "blobs": len(list((folder / "blobs").glob("*.safetensors"))),
        "blob_bytes": size,
    }
