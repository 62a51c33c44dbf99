"""A tenant as a folder: all that the registry has of it, byte for byte, from one store into another.

<folder>/head.json  versions/00000001.json ...  log/<ulid>.json ...  blobs/<sha256>.safetensors ...
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

from flatshare_registry import layout
from flatshare_registry.errors import AlreadyExists, Corrupt, InvalidInput, NotFound
from flatshare_registry.heads import chain_problems
from flatshare_registry.ids import TenantId
from flatshare_registry.records import AuditEntry, TenantHead, VersionRecord
from flatshare_registry.stores.base import BlobStore, Create

__all__ = ["Transferred", "export_tenant", "import_tenant", "read_head"]

Transferred = dict[str, int]
"""Counts: versions, entries of the log, blobs, and bytes of blobs."""

Progress = Callable[[int, int], None]


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
    store: BlobStore, folder: Path, progress: Progress = lambda done, total: None
) -> Transferred:
    """Bring an exported tenant into a store; visible in one step, at the end. Run again, it finishes.

    Raises
    ------
    InvalidInput
        The folder is not a whole export: nothing was written.
    AlreadyExists
        The store has, or had, another tenant of this id; or came to have one while this ran.
    """
    head = _checked(folder)
    tenant = TenantId(head.tenant)
    raw = (folder / "head.json").read_bytes()
    with contextlib.suppress(NotFound):
        there = store.get(layout.head_key(tenant)).data
        if there != raw:
            raise AlreadyExists(f"there is, or was, a tenant {tenant} in this store")
    size = 0
    digests = sorted(set(head.versions.values()))  # what was checked, and nothing else that lies there
    for index, digest in enumerate(digests):
        data = (folder / "blobs" / f"{digest}.safetensors").read_bytes()
        size += len(data)
        with contextlib.suppress(AlreadyExists):
            store.put(layout.blob_key(digest), data, Create())
        progress(index + 1, len(digests))
    for number in sorted(head.versions):
        key = layout.version_key(tenant, number)
        _put(store, key, (folder / "versions" / key.rpartition("/")[2]).read_bytes())
    for path in sorted((folder / "log").glob("*.json")):
        _put(store, f"{layout.log_prefix(tenant)}{path.name}", path.read_bytes())
    _put(store, layout.head_key(tenant), raw)
    return _counts(folder, size)


def read_head(folder: Path) -> TenantHead:
    """The head in an exported folder.

    Raises
    ------
    InvalidInput
        There is none that can be read.
    """
    try:
        return TenantHead.decode((folder / "head.json").read_bytes(), "head.json")
    except (OSError, Corrupt) as error:
        raise InvalidInput(f"{folder} is not an export") from error


def _checked(folder: Path) -> TenantHead:
    """The head of an export in which nothing is missing, and nothing is another's.

    Raises
    ------
    InvalidInput
        It is not that.
    """
    log: list[AuditEntry] = []
    try:
        head = TenantHead.decode((folder / "head.json").read_bytes(), "head.json")
        tenant = TenantId(head.tenant)
        for number, digest in head.versions.items():
            name = layout.version_key(tenant, number).rpartition("/")[2]
            record = VersionRecord.decode((folder / "versions" / name).read_bytes(), name)
            if (record.tenant, record.version, record.digest) != (tenant, number, digest):
                raise InvalidInput(f"{folder}: versions/{name} is not what head.json says")
            _check(digest, (folder / "blobs" / f"{digest}.safetensors").read_bytes())
        for path in (folder / "log").glob("*.json"):
            entry = AuditEntry.decode(path.read_bytes(), path.name)
            if entry.tenant != tenant or path.stem != entry.id:
                raise InvalidInput(f"{folder}: log/{path.name} is another's")
            log.append(entry)
        problems = chain_problems(head, log, head.revision)
        if problems:
            raise InvalidInput(f"{folder}: its audit log is not whole: {problems[0]}")
    except (OSError, Corrupt) as error:
        why = error.message if isinstance(error, Corrupt) else f"{error.filename}: {error.strerror}"
        raise InvalidInput(f"{folder} is not a whole export: {why}") from error
    return head


def _put(store: BlobStore, key: str, data: bytes) -> None:
    try:
        store.put(key, data, Create())
    except AlreadyExists:
        if store.get(key).data != data:
            raise AlreadyExists(f"the store has another {key}") from None


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
