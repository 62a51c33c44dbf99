"""Erases a tenant without a trace, in every replica, on every node and in the store; signs a record of it.

The steps are in this order. Every step can be repeated, so after any crash a rerun finishes:

1. fence: replicas no longer answer for the tenant, not even requests under way;
2. tombstone: nothing resolves it any more, not even a replica that starts later;
3. replicas end its leases and loads, free and overwrite its memory, and give receipts; a replica that does
   not answer is asked again, and one that can't be reached because it updates or stops is waited for;
4. nodes overwrite and remove its files;
5. the store's objects go, with all versions that a bucket has kept;
6. nodes once more, for what a fetch that was under way left behind; then the record is signed and stored.

With many tenants this takes longer than a request may, because every head is read. So an erasure is a job,
and a caller who asks for it again waits for the one that runs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from flatshare.control.erasure_record import Record, Signer
from flatshare.control.fleet import Fleet
from flatshare.errors import FleetUnavailable
from flatshare.replica.receipt import EraseReceipt, HostReceipt
from flatshare_registry import layout
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import TenantId
from flatshare_registry.records import new_ulid
from flatshare_registry.stores.base import Create

__all__ = ["Erasing", "Erasure", "Erasures"]

REPLICAS_TIMEOUT_S: Final = 45.0
"""Seconds that replicas have to give their receipts: leases end within the request's time-out."""

HOSTS_TIMEOUT_S: Final = 20.0
"""The same for the nodes."""

KEPT_TRIES: Final = 2
"""How often a node that keeps a mapped file is asked again; after that the file is another tenant's too."""

ASK_AGAIN_S: Final = 0.25

ERASE_WAIT_S: Final = 20.0
"""Seconds that one request waits for an erasure's end, well within what an edge or proxy allows."""


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

    Attributes
    ----------
    step
        What it does now, in words.
    """

    def __init__(self, registry: Registry, fleet: Fleet, signer: Signer) -> None:
        self._registry = registry
        self._fleet = fleet
        self._signer = signer
        self.step = "asking the replicas to refuse it"

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
        self.step = "waiting for the replicas' receipts"
        receipts = await self._receipts(tenant)
        self.step = "waiting for the nodes' receipts"
        tensors, wanted = list(leaving.tensors), {one.node_id for one in receipts.values()}
        nodes = await self._host_receipts(tensors, wanted)
        self.step = "looking which of its blobs other tenants have, and removing the others"
        gone = await asyncio.to_thread(self._registry.eraser.remove, leaving, self._removing)
        self.step = "waiting for the nodes' second receipts"
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
                "versions_checked": gone.versions_checked,
            },
            "replicas": [
                {
                    "replica": one.replica,
                    "node_id": one.node_id,
                    "device": one.device,
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

    def _removing(self, done: int, steps: int) -> None:
        self.step = f"removing from the store: {done} of {steps}"

    async def _check_kept(self, tenant: TenantId, nodes: Collection[HostReceipt]) -> None:
        """Check that files which nodes keep are other tenants' too, and not just held on to by a replica."""
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
        """A receipt of every node; asks again while one is missing, or keeps a file just being released."""
        receipts: dict[str, HostReceipt] = {}
        deadline = time.monotonic() + HOSTS_TIMEOUT_S
        for tries in itertools.count():
            try:
                found, unreached = await self._fleet.erase_host(tensors), ""
            except FleetUnavailable as error:
                found, unreached = [], error.message
            for one in found:
                known = receipts.get(one.node_id)
                receipts[one.node_id] = one if known is None else _both(known, one)
            missing = wanted - receipts.keys()
            why = unreached or (f"no receipt from node {', '.join(sorted(missing))}" if missing else "")
            if not why and (tries >= KEPT_TRIES or not any(one.kept for one in receipts.values())):
                return receipts
            if why and time.monotonic() > deadline:
                raise FleetUnavailable(
                    f"{why}; the tenant is not resolved any more, run the erasure again to finish"
                )
            await asyncio.sleep(ASK_AGAIN_S)  # a replica that starts or stops can't be awaited
        raise AssertionError("unreachable: it counts for ever")

    async def _receipts(self, tenant: TenantId) -> dict[str, EraseReceipt]:
        """A receipt of every replica that may answer; each is asked until it says that nothing is left.

        The broadcast does not reach a replica that updates or stops: it is waited for until it runs or is
        gone. A replica that is only starting finds the tombstone.
        """
        receipts: dict[str, EraseReceipt] = {}
        deadline = time.monotonic() + REPLICAS_TIMEOUT_S
        while True:
            for one in await self._fleet.erase(tenant):
                receipts[one.replica] = one
            existing = await self._fleet.may_answer()
            missing = {name for name in existing if not (name in receipts and receipts[name].clean)}
            if not missing:
                return receipts
            if time.monotonic() > deadline:
                raise FleetUnavailable(
                    f"no receipt from {', '.join(sorted(missing))}; the tenant is not resolved any more, "
                    "run the erasure again to finish"
                )
            await asyncio.sleep(ASK_AGAIN_S)  # a replica that starts or stops can't be awaited


@dataclass(frozen=True, slots=True)
class Erasing:
    """An erasure that has not ended yet: since when (POSIX seconds), and what it does now."""

    since: float
    step: str


class Erasures:
    """Erasures under way in this process, one a tenant. Call it on one event loop.

    Parameters
    ----------
    wait_s
        Seconds for which a caller waits for the end.
    """

    def __init__(self, wait_s: float = ERASE_WAIT_S) -> None:
        self.wait_s = wait_s
        self._jobs: dict[TenantId, _Job] = {}

    async def run(self, tenant: TenantId, erasure: Erasure, asked_by: str) -> Record | Erasing:
        """Begin the erasure of a tenant, or join the one under way.

        The erasure goes on when the caller goes away. Its result is given once, to the next caller; after
        that, asking begins another erasure.

        Parameters
        ----------
        erasure
            Run, unless one runs for this tenant.

        Returns
        -------
        dict or Erasing
            The signed record; or how far it is, when it took longer than ``wait_s`` seconds.

        Raises
        ------
        NotFound, FleetUnavailable
            As :meth:`Erasure.run`.
        """
        job = self._jobs.get(tenant)
        if job is None:
            task = asyncio.create_task(erasure.run(tenant, asked_by))
            job = self._jobs[tenant] = _Job(time.time(), erasure, task)
        await asyncio.wait([job.task], timeout=self.wait_s)
        if not job.task.done():
            return Erasing(job.since, job.erasure.step)
        if self._jobs.get(tenant) is job:
            del self._jobs[tenant]
        return job.task.result()


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    since: float
    erasure: Erasure
    task: asyncio.Task[Record]


def _both(known: HostReceipt, one: HostReceipt) -> HostReceipt:
    """Merge two receipts of one node: its replicas share the files, so one of them removed each file."""
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
