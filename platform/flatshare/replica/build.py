"""One replica without a serving framework: its parts, wired once, and the calls that a shell may make on it.

Ray Serve is one shell (``pool/deployment.py``); a test or a benchmark is another. :meth:`Replica.build` does
all the wiring; ``request.py`` serves requests. This module is long so that the parts, and all that the
control plane may ask of them, can be read in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import torch

from flatshare.device.memory import DeviceMemory
from flatshare.device.opening import device_budget, open_device
from flatshare.device.protocol import Device
from flatshare.engine.inference import Inference
from flatshare.engine.quotas import BytesLimit, QuotaKeeper
from flatshare.engine.stacked import Stacks
from flatshare.live_settings import with_live
from flatshare.models.architecture import architecture
from flatshare.replica.holdings import Holdings
from flatshare.replica.identity import ReplicaIdentity
from flatshare.replica.key_use import KeyUse
from flatshare.replica.load import LoadMeter, Reading
from flatshare.replica.pins import restore_pins
from flatshare.replica.receipt import EraseReceipt, HostReceipt
from flatshare.replica.request import InferenceService
from flatshare.replica.snapshot import ReplicaSnapshot
from flatshare.replica.usage import UsageCounter
from flatshare.replica.warm_up import warm_up
from flatshare.residency.fair_semaphore import FairSemaphore
from flatshare.residency.ledger import Ledger
from flatshare.residency.loads import LOCAL_CONCURRENCY
from flatshare.residency.model_cache import ModelCache
from flatshare.residency.policy import POLICIES
from flatshare.resolution.heads import TenantHeads
from flatshare.resolution.resolver import Resolver
from flatshare.resolution.swaps import Swaps
from flatshare.settings import Settings
from flatshare.threads import ThreadWork, in_thread
from flatshare.weights.device_loader import DeviceLoader
from flatshare.weights.fetch import TensorSource
from flatshare.weights.host_place import open_host_tier
from flatshare.weights.host_tier import HostTier, Scrubbed
from flatshare.weights.peers import PeerTiers
from flatshare.weights.scrubber import HostScrubber
from flatshare.weights.tiers import ModelKey
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import Unavailable
from flatshare_registry.heads import decode_head
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.records import TenantHead, VersionRecord, new_ulid
from flatshare_registry.stores.base import BlobStore
from flatshare_registry.stores.wrapped import CountedStore

__all__ = ["Replica"]

logger = logging.getLogger("flatshare.replica")

VIEW_THREADS: Final = 4
"""Registry reads at a time in one replica: small objects, and most are answered from memory."""

SWAP_WAIT_S: Final = 8.0
"""Seconds that ``refresh`` waits for a promotion's swap: less than the control plane waits for replicas."""

FENCE_S: Final = 60.0
"""Seconds that a fence stands: longer than it takes to write a tombstone."""

ERASE_WAIT_S: Final = 8.0
"""Seconds that one ``erase`` waits for leases and loads to end; the control plane asks again."""

DRAIN_S: Final = 5.0
"""Seconds that a stopping replica waits for leases to end."""


@dataclass(slots=True, eq=False)
class Replica:
    """One replica's parts. All methods must be called on one event loop.

    Attributes
    ----------
    service
        Serves requests.
    key_use
        Notes which keys were used.
    meter
        How busy it was lately.
    thread_work
        The work that threads do on each tenant's weights; an erasure waits for it to end.
    usage
        Counts requests, and writes what tenants used.
    settings_revision
        Revision of the settings that it uses: how many times they had been changed by then.
    """

    identity: ReplicaIdentity
    settings: Settings
    device: Device
    registry: Registry
    host_tier: HostTier | None
    heads: TenantHeads
    cache: ModelCache
    swaps: Swaps
    resolver: Resolver
    inference: Inference
    service: InferenceService
    key_use: KeyUse
    meter: LoadMeter
    thread_work: ThreadWork
    usage: UsageCounter
    _store: CountedStore
    _on_change: Callable[[], None]
    _threads: list[ThreadPoolExecutor]
    _view_threads: ThreadPoolExecutor
    _started_at: float
    _restoring: asyncio.Task[None] | None = None
    settings_revision: int = 0
    _scrubber: HostScrubber | None = None
    _reloads: set[asyncio.Task[str]] = field(default_factory=set)

    @classmethod
    def build(
        cls,
        settings: Settings,
        store: BlobStore,
        *,
        identity: ReplicaIdentity | None = None,
        device: Device | None = None,
        on_change: Callable[[], None] = lambda: None,
        keeps: Callable[[VersionRecord], bool] = lambda record: True,
        peers: PeerTiers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Replica:
        """Build a replica. Nothing is read yet, and the only thread that runs is the one for passes.

        Parameters
        ----------
        settings
            All settings, already validated.
        store
            Where the registry is.
        device
            Where models run; None for the device that the settings name.
        on_change
            Called when :meth:`held_ids` may have changed; must be quick.
        keeps
            Whether a version's fetched tensors are worth keeping in the node's tier (:class:`TensorSource`).
        peers
            Other nodes' tiers, asked before the store; None to do without.
        clock
            Monotonic seconds, of quotas, heads and fences.

        Raises
        ------
        SettingsError
            The device that the settings name is not there.
        """
        store = CountedStore(store)
        device = device or open_device(settings.device, settings.gpus_per_replica)
        set_threads = functools.partial(torch.set_num_threads, settings.torch_threads or 1)
        threads = [
            ThreadPoolExecutor(count, thread_name_prefix=name, initializer=set_threads)
            for name, count in (
                ("load", settings.load_concurrency),
                ("load-local", LOCAL_CONCURRENCY),
                ("load-range", settings.fetch_concurrency),
                ("registry", VIEW_THREADS),
                ("key-use", 1),
                ("usage", 1),
            )
        ]
        load_threads, local_threads, range_threads, view_threads, key_threads, usage_threads = threads
        identity = identity or ReplicaIdentity()
        usage = UsageCounter(
            store, f"{identity.replica}-{new_ulid()}", usage_threads, settings.usage_interval_s
        )
        quotas = QuotaKeeper(
            settings.plans,
            clock,
            concurrent_requests=settings.default_quotas.concurrent_requests,
            bytes_limit=bytes_limit(settings),
        )
        registry = Registry(store)
        host_tier = open_host_tier(settings.host_dir, settings.host_bytes)

        source = TensorSource(store, host_tier, range_threads, keeps=keeps, peers=peers)

        def head_changed(old: TenantHead | None, new: TenantHead | None) -> None:
            swaps.moved(old, new)
            if (head := new or old) is not None:
                cache.hide_failed(head.tenant, new.versions if new is not None else ())
            on_change()

        heads = TenantHeads(
            registry, view_threads, ttl_s=settings.view_ttl_s, on_change=head_changed, clock=clock
        )
        cache = ModelCache(
            ledger=Ledger(
                settings.slots,
                device_budget(
                    device,
                    settings.device_bytes,
                    settings.device_headroom_bytes,
                    settings.gpus_per_replica or 1.0,
                ),
            ),
            loader=DeviceLoader(source, device, load_threads, local_threads, clock=clock),
            load_concurrency=settings.load_concurrency,
            room_timeout_s=settings.request_timeout_s,
            fetch_timeout_s=settings.fetch_timeout_s,
            policy=POLICIES[settings.eviction](),
            bounds_of=lambda tenant: quotas.bounds(heads.last_head(TenantId(tenant))),
            on_change=on_change,
        )
        swaps = Swaps(cache, heads.record, timeout_s=settings.request_timeout_s, on_change=on_change)
        resolver = Resolver(heads, swaps)
        inference = Inference(
            device,
            settings.torch_threads,
            settings.max_batch_rows,
            stacks=Stacks(architecture, device.padded) if settings.stack_models else None,
            warm_up=lambda: warm_up(device, settings.max_batch_rows),
            pass_limit_s=settings.request_timeout_s,
        )
        service = InferenceService(
            resolver=resolver,
            cache=cache,
            inference=inference,
            admission=FairSemaphore(settings.max_ongoing_requests, settings.max_queued_requests),
            cold=cold_places(settings.max_queued_requests),
            quotas=quotas,
            usage=usage,
            timeout_s=settings.request_timeout_s,
            clock=clock,
        )

        def reading() -> Reading:
            admission, cold = service.admission, service.cold
            return Reading(
                admission.ongoing + admission.queued,
                cold.ongoing + cold.queued,
                cache.stats.requests + admission.refused + cold.refused,
                cache.leases(),
            )

        return cls(
            identity=identity,
            settings=settings,
            device=device,
            registry=registry,
            host_tier=host_tier,
            heads=heads,
            cache=cache,
            swaps=swaps,
            resolver=resolver,
            inference=inference,
            service=service,
            key_use=KeyUse(store, key_threads),
            meter=LoadMeter(reading, clock),
            thread_work=source.work,
            usage=usage,
            _store=store,
            _on_change=on_change,
            _threads=threads,
            _view_threads=view_threads,
            _started_at=time.time(),
        )

    @property
    def name(self) -> str:
        """This replica's own name."""
        return self.identity.replica

    # -- its life

    def start(self) -> None:
        """Start the background work: restore the fleet's pins, and hash the node's files.

        Blocks until the device is warm; no request is served before that.

        Raises
        ------
        DeviceBroken, Wedged
            The device does not run anything, or does not return from what it runs.
        """
        self.inference.ready()
        loop = asyncio.get_running_loop()
        if self.host_tier is not None:

            def damaged(digest: str) -> None:
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                    loop.call_soon_threadsafe(self.distrust, digest)

            self._scrubber = HostScrubber(self.host_tier, damaged)
            self._scrubber.start()
        self.meter.start()
        self.usage.start()
        self._restoring = loop.create_task(
            restore_pins(
                lambda: in_thread(self._view_threads, self.registry.pins.refs),
                lambda ref: self.preload(ref, pin=True),
                self.unpin,
            ),
            name="restore pins",
        )

    def check_health(self) -> None:
        """Return if this replica can go on.

        Raises
        ------
        Wedged
            A pass, or a copy, never ends, and nothing can end its thread: the process must be replaced.
        DeviceBroken
            The device can't be used by this process any more: likewise.
        """
        self.inference.check_alive()

    async def close(self) -> None:
        """Stop it: give leases some time, let running passes end, end the threads. It is unusable then."""
        self.meter.close()
        if self._scrubber is not None:
            self._scrubber.close()
        for task in (self._restoring, *self._reloads):
            if task is not None:
                task.cancel()
        self.swaps.close()
        await self.cache.close(DRAIN_S)
        await asyncio.to_thread(self.inference.close)
        await self.usage.close()
        self.device.close()
        self.service.deadlines.close()
        for threads in self._threads:
            threads.shutdown(wait=False, cancel_futures=True)

    def take_settings(self, latest: Settings, revision: int) -> None:
        """Use other plans and limits from now on; requests under way keep those that they began with.

        Parameters
        ----------
        latest
            Only the settings that can change in place (``live_settings``) are taken from these.
        revision
            How many times settings were changed; one that is not newer than the known one changes nothing.
        """
        if revision <= self.settings_revision:
            return
        self.settings, self.settings_revision = with_live(self.settings, latest), revision
        self.service.quotas.change(
            self.settings.plans,
            concurrent_requests=self.settings.default_quotas.concurrent_requests,
            bytes_limit=bytes_limit(self.settings),
        )
        logger.warning("replica %s goes by settings %d", self.name, revision)

    # -- what it holds

    def distrust(self, digest: str) -> None:
        """A tensor's file on this node was damaged: drop the models that hold it, reload the pinned ones."""
        for record, pinned in self.cache.distrust(digest):
            logger.error("%s holds a tensor whose file was damaged: it is loaded anew", record.name)
            if pinned:
                task = asyncio.get_running_loop().create_task(self.preload(record.name, pin=True))
                self._reloads.add(task)
                task.add_done_callback(self._reloaded)

    def _reloaded(self, task: asyncio.Task[str]) -> None:
        self._reloads.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a pinned model was not loaded anew: %s", task.exception())

    def held_ids(self) -> set[str]:
        """Every ref that a resident model answers: versions by number, and the aliases that name them."""
        return {ref for record in self.cache.resident_records() for ref in self.resolver.refs_of(record)}

    @property
    def holdings(self) -> Holdings:
        """What placement needs from this replica: its load, what it holds, and loading models in advance."""
        return Holdings(self.name, self.cache, self.resolver, self.meter, self.preload)

    async def _device_memory(self) -> DeviceMemory:
        """Read in a thread, since it may wait for a lock of the driver. A broken device gives zeros."""
        try:
            return await asyncio.to_thread(self.device.memory)
        except RuntimeError:
            return DeviceMemory()

    async def snapshot(self, advertised: set[str], place: int = 0) -> ReplicaSnapshot:
        """All that this replica holds and has counted.

        Parameters
        ----------
        advertised
            Ids that the shell has told others of.
        place
            Its number on the ring.
        """
        return ReplicaSnapshot(
            replica=self.name,
            place=place,
            node=self.identity.node,
            node_id=self.identity.node_id,
            pid=os.getpid(),
            device=str(self.device.torch_device),
            slots=self.cache.slots,
            slots_used=self.cache.occupied,
            budget_bytes=self.cache.ledger.budget_bytes,
            held_bytes=self.cache.ledger.held_bytes,
            reserved_bytes=self.cache.ledger.reserved_bytes,
            device_memory=await self._device_memory(),
            host=await asyncio.to_thread(self.host_tier.usage) if self.host_tier is not None else None,
            loading=[str(key) for key in self.cache.loading],
            load_wait_s=round(self.cache.wait_s, 3),
            failed=self.cache.failed,
            swaps=self.swaps.snapshot(),
            passes=self.inference.passes,
            rows=self.inference.rows,
            pass_s=self.inference.busy_s,
            lag_s=self.meter.lag_s,
            feed_age_s=self.heads.feed_age_s,
            store=self._store.counts,
            started_at=self._started_at,
            settings_revision=self.settings_revision,
            ongoing=self.service.admission.ongoing,
            queued=self.service.admission.queued,
            refused=self.service.admission.refused + self.service.cold.refused + self.cache.refused,
            advertised=sorted(advertised),
            models=self.cache.snapshot(),
            stats=dataclasses.replace(self.cache.stats),
            requests=self.usage.stats,
        )

    # -- what the control plane may ask

    async def refresh(self, tenant: str, told: str | None = None) -> str:
        """Read a tenant anew and try its failed versions again; returns this replica's name.

        Parameters
        ----------
        told
            The tenant's head (JSON) as the control plane has just read it: a replica that can't reach the
            store believes that, and refuses a key that was revoked.
        """
        parsed = TenantId(tenant)
        self.cache.forget_failures(parsed)
        given = decode_head(parsed, told.encode()) if told is not None else None
        if given is not None:
            self.heads.learn(given)
        try:
            head = await self.heads.refresh(parsed)
        except Unavailable:
            if given is None:
                raise
            head = given if given.state.exists else None
        for record in self.cache.resident_records():
            if record.tenant == parsed and (head is None or record.version not in head.versions):
                self.cache.unload(ModelKey.of(record))
        for key in self.cache.loading:
            if key.tenant == parsed and (head is None or key.version not in head.versions):
                self.cache.withdraw(key)
        # A promotion is reported as done once this replica has swapped, or can't.
        await self.swaps.settled(tenant, SWAP_WAIT_S)
        self._on_change()
        return self.name

    async def preload(self, model_ref: str, pin: bool = False) -> str:
        """Make the version that a ref names resident here, pinned if ``pin``; returns this replica's name."""
        timeout_s = self.settings.request_timeout_s
        ref = ModelRef.parse(model_ref)
        record = await self.resolver.said(ref, timeout_s)
        self.service.check_fence(ref)
        await self.cache.preload(record, timeout_s, pin=pin)
        return self.name

    async def unpin(self, model_ref: str) -> bool:
        """Unpin what a ref names here, so that it may be evicted again; returns whether it was pinned."""
        return sum(self.cache.unpin(key) for key in await self._meant(model_ref)) > 0

    async def unload(self, model_ref: str) -> bool:
        """Free what a ref names here, once its leases have ended; returns whether it was resident."""
        return sum(self.cache.unload(key) for key in await self._meant(model_ref)) > 0

    def fence(self, tenant: str) -> str:
        """Refuse a tenant that is being erased, for a while; returns this replica's name."""
        self.service.fence(TenantId(tenant), FENCE_S)
        return self.name

    async def erase(self, tenant: str) -> EraseReceipt:
        """End, free and overwrite everything of a tenant whose tombstone is written; repeated until clean."""
        parsed = TenantId(tenant)
        self.service.fence(parsed, FENCE_S)
        self.heads.forget(parsed)
        told = self.cache.erase(parsed)
        deadline = time.monotonic() + ERASE_WAIT_S
        clean = await self.cache.erased(parsed, ERASE_WAIT_S)
        clean = await self.key_use.stop(parsed, deadline - time.monotonic()) and clean
        self._on_change()
        return EraseReceipt(
            self.name, self.identity.node_id, self.device.name, told.models, told.overwritten_bytes,
            clean, time.time(),
        )  # fmt: skip

    async def erase_host(self, digests: list[str]) -> HostReceipt:
        """Overwrite and remove these tensors' files on this node, except files that are mapped."""
        found = Scrubbed()
        if self.host_tier is not None:
            found = await asyncio.to_thread(self.host_tier.scrub, digests)
        return HostReceipt(
            self.name, self.identity.node_id, self.identity.node,
            found.removed, found.kept, found.overwritten_bytes, time.time(),
        )  # fmt: skip

    async def _meant(self, model_ref: str) -> list[ModelKey]:
        ref = ModelRef.parse(model_ref)
        return await self.resolver.meant(ref, self.settings.request_timeout_s)


def bytes_limit(settings: Settings) -> BytesLimit:
    """Memory that bodies may take in a replica. Each tenant may always hold one largest body and its rows."""
    tenant = int(settings.body_memory_bytes * settings.tenant_share)
    largest = settings.max_body_bytes if settings.tasks == "off" else settings.tasks_max_body_bytes
    return BytesLimit(settings.body_memory_bytes, max(tenant, 2 * largest))


def cold_places(max_queued_requests: int) -> FairSemaphore:
    """Places for requests that wait for the registry or for a load: half are given at once, and tenants take
    turns for the other half.
    """
    half = max_queued_requests // 2 + 1
    return FairSemaphore(half, half)
