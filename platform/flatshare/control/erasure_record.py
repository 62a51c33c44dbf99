"""Signed records of erasures: made, read back, and checked against what the store has."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from flatshare.errors import ServeError
from flatshare_registry import layout
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Corrupt, NotFound
from flatshare_registry.ids import TenantId
from flatshare_registry.records import Action
from flatshare_registry.stores.base import BlobStore

__all__ = ["Record", "Signer", "erasure_problems", "read_records", "verify_record"]

Record = dict[str, Any]


class Signer:
    """Signs erasure records with an Ed25519 key in a file that only this user can read.

    Raises
    ------
    ServeError
        The file is there and is no such key.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            _write_new_key(path)
        if path.stat().st_mode & 0o077:
            raise ServeError(
                f"{path} can be read by others: chmod 600 it, or remove it to have a new one made"
            )
        try:
            self._key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip()))
        except (OSError, ValueError) as error:
            raise ServeError(f"{path} does not hold a key for erasure records") from error

    @property
    def public_key(self) -> str:
        """In hex; tell it to whoever has to verify records."""
        return self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def sign(self, record: Record) -> Record:
        """The record with its signature."""
        signature = base64.b64encode(self._key.sign(_canonical(record))).decode()
        return {
            **record,
            "signature": {"algorithm": "ed25519", "public_key": self.public_key, "value": signature},
        }


def read_records(store: BlobStore, tenant: TenantId) -> list[Record]:
    """All erasure records of a tenant, oldest first.

    Raises
    ------
    NotFound
        There is none.
    Corrupt
        One can't be read.
    """
    records: list[Record] = []
    held = layout.erasure_held_prefix(tenant)
    for meta in sorted(store.list(layout.erasures_prefix(tenant)), key=lambda meta: meta.key):
        if meta.key == layout.erasure_plan_key(tenant) or meta.key.startswith(held):
            continue
        try:
            found = json.loads(store.get(meta.key).data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Corrupt(f"{meta.key} is not an erasure record")
        records.append(found)
    if not records:
        raise NotFound(f"there is no erasure record of {tenant}")
    return records


def erasure_problems(
    registry: Registry, tenant: TenantId, records: list[Record], public_key: str | None
) -> tuple[list[str], list[str]]:
    """Problems with a tenant's erasure, and notes; checks the records, the tombstone and the store.

    Parameters
    ----------
    public_key
        Public key of the signature, in hex; None: whichever the records name.

    Raises
    ------
    NotFound
        There has never been such a tenant.
    """
    store = registry.store
    problems = [
        f"record {record.get('id')}: {why}"
        for record in records
        if (why := verify_record(record, public_key) or _misplaced(record, tenant)) is not None
    ]
    tombstone = registry.last_entry(tenant)
    if tombstone.action is not Action.TENANT_ERASED:
        problems.append(f"tenant {tenant} has no tombstone: its last change is {tombstone.action.value}")
    elif not any(record.get("tombstone_link") == tombstone.link for record in records):
        problems.append("no record is of the tombstone that stands")
    for prefix in (
        layout.versions_prefix(tenant), layout.used_prefix(tenant), layout.pins_prefix(tenant),
        layout.erasure_held_prefix(tenant),
    ):  # fmt: skip
        problems += [
            f"{key} is still in the store, or an earlier version of it" for key in store.history(prefix)
        ]
    if problems:
        return problems, []  # what such records say of blobs proves nothing
    kept = {one["digest"] for record in records for one in record["store"]["kept_blobs"]}
    removed = {digest for record in records for digest in record["store"]["removed_blobs"]} - kept
    there = {
        digest
        for start in {digest[:2] for digest in removed}
        for key in store.history(f"{layout.BLOBS}{start}/")
        if (digest := layout.digest_of(key)) is not None
    }
    named = {digest for head in registry.list_tenants() for digest in head.versions.values()}
    notes = []
    blind = [str(record.get("id")) for record in records if record["store"].get("versions_checked") is False]
    if blind:
        notes.append(
            f"record {', '.join(blind)}: the store could not list versions, so none was looked for then"
        )
    if not store.shows_versions(layout.head_key(tenant)):
        notes.append("the store can't list versions: only what it lists now was looked at")
    notes += [
        f"blob {digest[:12]} is in the store again: another tenant registered it since"
        for digest in sorted(removed & there & named)
    ]
    problems += [f"blob {digest[:12]} is still in the store" for digest in sorted((removed & there) - named)]
    return problems, notes


def _misplaced(record: Mapping[str, Any], tenant: TenantId) -> str | None:
    """Why a record with a good signature is not of this tenant's erasure; None when it is."""
    if record.get("kind") != "flatshare.erasure" or record.get("schema_version") != 1:
        return "it is no erasure record of a form that is known here"
    if record.get("tenant") != tenant:
        return "it is another tenant's"
    store = record.get("store")
    if not isinstance(store, dict) or not {"removed_blobs", "kept_blobs"} <= store.keys():
        return "it does not say what went from the store"
    return None


def verify_record(record: Mapping[str, Any], public_key: str | None = None) -> str | None:
    """What is wrong with a record; None when its signature is good.

    Parameters
    ----------
    public_key
        Whose signature it must be, in hex; None: whoever the record names.
    """
    signature = record.get("signature")
    if not isinstance(signature, dict) or signature.get("algorithm") != "ed25519":
        return "it is not signed"
    named = str(signature.get("public_key", ""))
    if public_key is not None and named != public_key:
        return "it is signed with another key"
    body = {name: value for name, value in record.items() if name != "signature"}
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(named))
        key.verify(base64.b64decode(str(signature.get("value", "")), validate=True), _canonical(body))
    except (InvalidSignature, ValueError):
        return "its signature does not fit: it was altered"
    return None


def _canonical(record: Mapping[str, Any]) -> bytes:
    """The bytes that are signed."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return b"flatshare erasure record\n" + hashlib.sha256(text.encode()).digest()


def _write_new_key(path: Path) -> None:
    """Make a key file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret = Ed25519PrivateKey.generate().private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    draft = path.with_suffix(f".{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secret.hex() + "\n")
        with contextlib.suppress(FileExistsError):  # somebody was faster: that key counts
            os.link(draft, path)
    finally:
        draft.unlink()
