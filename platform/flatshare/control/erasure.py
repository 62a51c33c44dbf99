"""A tenant leaves without a trace: in every replica, on every node, in the store; and a signed record of it.

In this order, and every step can be done again, so whatever crashes, a rerun finishes:

1. fence: replicas answer for the tenant no more, also requests that are under way;
2. tombstone: nobody resolves it, also a replica that starts later;
3. replicas end its leases and loads, free and overwrite its memory, and give receipts; who does not
   answer is asked again;
4. nodes overwrite and remove its files;
5. the store's objects go, with all versions that a bucket has kept;
6. nodes once more, for what a fetch that was under way left behind; then the record is signed and stored.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from flatshare.control.fleet import Fleet
from flatshare.errors import FleetUnavailable, ServeError
from flatshare.pool.receipt import EraseReceipt, HostReceipt
from flatshare_registry import layout
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Corrupt, NotFound
from flatshare_registry.ids import TenantId
from flatshare_registry.records import Action, new_ulid
from flatshare_registry.stores.base import BlobStore, Create

__all__ = ["Erasure", "Signer", "erasure_problems", "read_records", "verify_record"]

REPLICAS_TIMEOUT_S: Final = 45.0
"""Seconds that replicas have to give their receipts: leases end within the request's time-out."""

HOSTS_TIMEOUT_S: Final = 20.0
"""The same for the nodes."""

KEPT_TRIES: Final = 2
"""How often a node is asked again that keeps a file because it is mapped: then it is another tenant's too."""

ASK_AGAIN_S: Final = 0.25

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


class Erasure:
    """Erases tenants of one platform.

    Parameters
    ----------
    registry
        Acting as whoever asked for it.
    fleet
        All replicas.
    signer
        For the record.
    """

    def __init__(self, registry: Registry, fleet: Fleet, signer: Signer) -> None:
        self._registry = registry
        self._fleet = fleet
        self._signer = signer

    async def run(self, tenant: TenantId, asked_by: str) -> Record:
        """Erase a tenant; returns the signed record.

        Raises
        ------
        NotFound
            There has never been such a tenant.
        FleetUnavailable
            Not every replica gave its receipt; the tombstone stands, run it again.
        """
        begun = time.time()
        await asyncio.to_thread(self._registry.last_entry, tenant)  # there must have been one
        await self._fleet.fence(tenant)
        leaving = await asyncio.to_thread(self._registry.eraser.begin, tenant)
        receipts = await self._receipts(tenant)
        tensors, wanted = list(leaving.tensors), {one.node_id for one in receipts.values()}
        nodes = await self._host_receipts(tensors, wanted)
        gone = await asyncio.to_thread(self._registry.eraser.remove, leaving)
        for node_id, one in (await self._host_receipts(tensors, wanted)).items():
            nodes[node_id] = _both(nodes[node_id], one) if node_id in nodes else one
        await self._check_kept(tenant, nodes.values())
        record: Record = {
            "kind": "flatshare.erasure",
            "schema_version": 1,
            "id": new_ulid(),
            "tenant": str(tenant),
            "asked_by": asked_by,
            "begun_at": begun,
            "finished_at": time.time(),
            "tombstone_link": leaving.link,
            "versions": [{"version": number, "digest": digest} for number, digest in leaving.versions],
            "store": {
                "url": self._registry.store.url,
                "removed_blobs": list(gone.removed_blobs),
                "kept_blobs": [
                    {"digest": one, "why": "another tenant has registered the same weights"}
                    for one in gone.kept_blobs
                ],
                "objects": gone.objects,
            },
            "replicas": [
                {
                    "replica": one.replica,
                    "node_id": one.node_id,
                    "models": one.models,
                    "overwritten_bytes": one.overwritten_bytes,
                    "at": one.at,
                }
                for one in sorted(receipts.values(), key=lambda one: one.replica)
            ],
            "nodes": [_node(one) for _, one in sorted(nodes.items())],
        }
        signed = self._signer.sign(record)
        key = layout.erasure_key(tenant, record["id"])
        await asyncio.to_thread(
            self._registry.store.put, key, json.dumps(signed, indent=1).encode(), Create()
        )
        await asyncio.to_thread(self._registry.eraser.finish, leaving)
        return signed

    async def _check_kept(self, tenant: TenantId, nodes: Collection[HostReceipt]) -> None:
        """A file that a node keeps must be another tenant's too, and not a replica's that won't let go."""
        kept = {digest for one in nodes for digest in one.kept}
        if kept:
            unnamed = await asyncio.to_thread(self._registry.eraser.unnamed_tensors, tenant, kept)
            if unnamed:
                where = ", ".join(sorted(one.node for one in nodes if unnamed & {*one.kept}))
                raise FleetUnavailable(
                    f"{len(unnamed)} tensors of {tenant} alone are still mapped on {where}; the tenant is "
                    "not resolved any more, run the erasure again to finish"
                )

    async def _host_receipts(self, tensors: list[str], wanted: set[str]) -> dict[str, HostReceipt]:
        """A receipt of every node; asked again while one is missing, or keeps what is let go of just now."""
        receipts: dict[str, HostReceipt] = {}
        deadline = time.monotonic() + HOSTS_TIMEOUT_S
        for tries in itertools.count():
            for one in await self._fleet.erase_host(tensors):
                known = receipts.get(one.node_id)
                receipts[one.node_id] = one if known is None else _both(known, one)
            missing = wanted - receipts.keys()
            if not missing and (tries >= KEPT_TRIES or not any(one.kept for one in receipts.values())):
                return receipts
            if missing and time.monotonic() > deadline:
                raise FleetUnavailable(
                    f"no receipt from node {', '.join(sorted(missing))}; the tenant is not resolved any "
                    "more, run the erasure again to finish"
                )
            await asyncio.sleep(ASK_AGAIN_S)  # a replica that starts or stops can't be awaited
        raise AssertionError("unreachable: it counts for ever")

    async def _receipts(self, tenant: TenantId) -> dict[str, EraseReceipt]:
        """A receipt of every replica that runs, asked again until it says that nothing is left."""
        receipts: dict[str, EraseReceipt] = {}
        deadline = time.monotonic() + REPLICAS_TIMEOUT_S
        while True:
            for one in await self._fleet.erase(tenant):
                receipts[one.replica] = one
            running = await self._fleet.running()
            missing = {name for name in running if not (name in receipts and receipts[name].clean)}
            if not missing:
                return receipts
            if time.monotonic() > deadline:
                raise FleetUnavailable(
                    f"no receipt from {', '.join(sorted(missing))}; the tenant is not resolved any more, "
                    "run the erasure again to finish"
                )
            await asyncio.sleep(ASK_AGAIN_S)  # a replica that starts or stops can't be awaited


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
    for meta in store.list(layout.erasures_prefix(tenant)):
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
    """What speaks against a tenant's erasure, and notes; looks at records, tombstone, and what the store has.

    Parameters
    ----------
    public_key
        Whose signature it must be, in hex; None: whoever the records name.

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
        layout.versions_prefix(tenant), layout.used_prefix(tenant), layout.erasure_held_prefix(tenant)
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
    notes = [
        f"blob {digest[:12]} is in the store again: another tenant registered it since"
        for digest in sorted(removed & there & named)
    ]
    problems += [f"blob {digest[:12]} is still in the store" for digest in sorted((removed & there) - named)]
    return problems, notes


def _misplaced(record: Mapping[str, Any], tenant: TenantId) -> str | None:
    """Why a record whose signature is good is none of this tenant's erasure; None when it is."""
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


def _both(known: HostReceipt, one: HostReceipt) -> HostReceipt:
    """Two of one node: its replicas share the files, so each file was removed by one of them."""
    removed = {*known.removed, *one.removed}
    return HostReceipt(
        known.replica, known.node_id, known.node,
        tuple(sorted(removed)), tuple(sorted({*one.kept} - removed)),
        known.overwritten_bytes + one.overwritten_bytes, max(known.at, one.at),
    )  # fmt: skip


def _node(one: HostReceipt) -> Record:
    return {
        "node": one.node,
        "node_id": one.node_id,
        "removed_tensors": list(one.removed),
        "kept_tensors": list(one.kept),
        "overwritten_bytes": one.overwritten_bytes,
        "at": one.at,
    }
