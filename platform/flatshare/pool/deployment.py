"""The pool: one Serve deployment. Each replica is a process with a device; this is its composition root."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, cast

import numpy as np
import ray
import torch
from ray import serve
from ray.serve.config import RequestRouterConfig

from flatshare.api.app import create_app
from flatshare.api.decoding import INLINE_BYTES, DecodeRoom
from flatshare.api.hot import HotRoutes
from flatshare.api.identity import LOCAL_OPERATOR, Identities, OperatorKeys
from flatshare.api.tokens import token_verifier
from flatshare.codecs.payload import READY, decode_array
from flatshare.door.listener import Door
from flatshare.engine.admission import Admission
from flatshare.engine.inference import Inference
from flatshare.engine.quotas import BytesLimit, QuotaKeeper
from flatshare.errors import BadInput
from flatshare.models.architecture import Architecture
from flatshare.pool.details import DoorAddress
from flatshare.pool.handle import POOL_DEPLOYMENT
from flatshare.pool.multiplex import NEVER_EVICT, Advertiser
from flatshare.pool.router import HomeReplicaRouter
from flatshare.replica.key_use import KeyUse
from flatshare.replica.pins import restore_pins
from flatshare.replica.receipt import EraseReceipt, HostReceipt
from flatshare.replica.request import InferenceService, Rows
from flatshare.replica.snapshot import ReplicaSnapshot
from flatshare.residency.ledger import Ledger
from flatshare.residency.model_cache import LOCAL_CONCURRENCY, ModelCache
from flatshare.residency.policy import POLICIES
from flatshare.resolution.heads import RegistryView
from flatshare.resolution.swaps import Promotions
from flatshare.resolution.trust import TrustedHeads
from flatshare.settings import Settings
from flatshare.weights.device import device_budget, open_device
from flatshare.weights.device_loader import DeviceLoader
from flatshare.weights.fetch import TensorSource
from flatshare.weights.host_place import open_host_tier
from flatshare.weights.host_tier import Scrubbed
from flatshare.weights.threads import in_thread
from flatshare.weights.tiers import ModelKey
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import InvalidRef, Unavailable
from flatshare_registry.heads import decode_head
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.records import TenantHead

__all__ = ["pool_application"]

logger = logging.getLogger("flatshare.pool")

VIEW_THREADS: Final = 4
"""Registry reads at a time in one replica: small objects, and most are answered from memory."""

SWAP_WAIT_S: Final = 8.0
"""Seconds that ``refresh`` waits for a promotion's swap: less than the control plane waits for replicas."""

FENCE_S: Final = 60.0
"""Seconds that a fence stands: longer than it takes to write a tombstone."""

ERASE_WAIT_S: Final = 8.0
"""Seconds that one ``erase`` waits for leases and loads to end; the control plane asks again."""

DOOR_HOST: Final = "127.0.0.1"
"""Where replicas listen: the edge is on the same machine."""

DOOR_STOP_S: Final = 6.0
"""Seconds that a stopping replica waits for its door's requests to end."""

DRAIN_S: Final = 5.0
"""Seconds that a stopping replica waits for leases to end."""


class ClassifierPool:
    """One replica.

    Parameters
    ----------
    settings
        All settings, already validated, without operators' keys.
    operators
        Digests of these; None when authentication is off.
    """

    def __init__(self, settings: Settings, operators: OperatorKeys | None) -> None:
        context = serve.get_replica_context()
        self._settings = settings
        self.replica = context.replica_id.unique_id
        self._started_at = time.time()
        device = open_device(settings.device)
        set_threads = functools.partial(torch.set_num_threads, settings.torch_threads or 1)
        self._threads = [
            ThreadPoolExecutor(count, thread_name_prefix=name, initializer=set_threads)
            for name, count in (
                ("load", settings.load_concurrency),
                ("load-local", LOCAL_CONCURRENCY),
                ("load-part", settings.fetch_concurrency),
                ("registry", VIEW_THREADS),
                ("key-use", 1),
            )
        ]
        load_threads, local_threads, part_threads, view_threads, key_threads = self._threads
        store = settings.open_store()
        self._decoding = DecodeRoom()
        self._quotas = QuotaKeeper(
            settings.plans,
            concurrent_requests=settings.default_quotas.concurrent_requests,
            bytes_limit=bytes_limit(settings),
        )
        self._advertiser = Advertiser(self, self.load_model, self._held_ids)
        registry = Registry(store)
        self._view = RegistryView(
            registry, view_threads, ttl_s=settings.view_ttl_s, on_change=self._head_changed
        )
        self._host_tier = open_host_tier(settings.host_dir, settings.host_bytes)
        self._cache = ModelCache(
            ledger=Ledger(
                settings.slots,
                device_budget(
                    device,
                    settings.device_bytes,
                    settings.device_headroom_bytes,
                    settings.gpus_per_replica or 1.0,
                ),
            ),
            loader=DeviceLoader(
                TensorSource(store, self._host_tier, part_threads), device, load_threads, local_threads
            ),
            load_concurrency=settings.load_concurrency,
            room_timeout_s=settings.request_timeout_s,
            fetch_timeout_s=settings.fetch_timeout_s,
            policy=POLICIES[settings.eviction](),
            share_of=lambda tenant: self._quotas.share(self._view.last_head(TenantId(tenant))),
            on_change=self._advertiser.changed,
        )
        self._promotions = Promotions(
            self._cache,
            self._view.record,
            timeout_s=settings.request_timeout_s,
            on_change=self._advertiser.changed,
        )
        self._device = device
        self._inference = Inference(
            device.torch_device,
            settings.torch_threads,
            settings.max_batch_rows,
            pass_limit_s=settings.request_timeout_s,
        )
        self._service = InferenceService(
            view=self._view,
            cache=self._cache,
            promotions=self._promotions,
            inference=self._inference,
            admission=Admission(settings.max_ongoing_requests, settings.max_queued_requests),
            cold=cold_places(settings.max_queued_requests),
            quotas=self._quotas,
            timeout_s=settings.request_timeout_s,
        )
        self._key_use = KeyUse(store, key_threads)
        self._identities = Identities(
            TrustedHeads(self._view, settings.key_trust_s),
            operators,
            token_verifier(settings),
            used=self._key_use,
        )
        self._data_plane = create_app(
            self._service,
            self._identities,
            replica=self.replica,
            max_body_bytes=settings.max_body_bytes,
            max_rows=settings.max_rows,
            room=self._decoding,
        )
        self._door = Door(self._data_plane, DOOR_HOST)
        self._door_open = asyncio.get_running_loop().create_task(self._door.start(), name="open the door")
        self._restoring = asyncio.get_running_loop().create_task(
            restore_pins(
                lambda: in_thread(view_threads, registry.pins.refs),
                lambda ref: self.preload(ref, pin=True),
                self.unpin,
            ),
            name="restore pins",
        )
        logger.info("replica %s on %s with %d slots", self.replica, device.name, settings.slots)

    def __serve_build_asgi_app__(self) -> HotRoutes:
        """Called by Serve after the constructor: the same data plane, for what comes by Serve's own ways."""
        return self._data_plane

    async def door(self) -> DoorAddress:
        """Where this replica listens itself, once it does."""
        await self._door_open
        return DoorAddress(self.replica, self._door.host, self._door.port)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve's autoscaler: it does not see the requests that come through the door."""
        admission = self._service.admission
        return {"ongoing": float(admission.ongoing), "queued": float(admission.queued)}

    # -- handles

    async def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The handle form: ``handle.options(multiplexed_model_id="acme").predict.remote(batch)``.

        Parameters
        ----------
        batch
            ``{"image": array}``, shapes as over HTTP. With ``"values": "model-ready"`` whole numbers of 0 to
            255 are taken as they are, and not refused as raw pixels.

        Returns
        -------
        dict
            The batch and ``predicted_label``, int64 ``(N,)``.
        """
        model_ref = serve.get_multiplexed_model_id()
        if not model_ref:
            raise BadInput("name the model: handle.options(multiplexed_model_id='acme')")

        if not isinstance(cast("object", batch), dict):  # a handle passes on whatever it was given
            raise BadInput("the batch must be a dict")

        ref = ModelRef.parse(model_ref)

        def decode(network: Architecture) -> Rows | Awaitable[Rows]:
            if network.input.name not in batch:
                raise BadInput(f'the batch must be a dict with the key "{network.input.name}"')
            values = batch[network.input.name]
            size = values.nbytes if isinstance(values, np.ndarray) else INLINE_BYTES + 1
            return self._decoding.here_or_there(
                ref.tenant,
                size,
                lambda: decode_array(
                    values, network.input, self._settings.max_rows, ready=batch.get("values") == READY
                ),
            )

        # Who has a handle is inside the cluster, which is one trust domain: the operator's.
        with await self._service.enter(LOCAL_OPERATOR, ref) as ticket:
            prediction = await self._service.predict(ticket, decode)
        return {**batch, "predicted_label": prediction.labels}

    @serve.multiplexed(max_num_models_per_replica=NEVER_EVICT)  # type: ignore[untyped-decorator]  # Ray gives it no types
    async def load_model(self, model_id: str) -> str:
        """Ray's door: called (by the advertiser) with each ref whose version became resident."""
        return model_id

    # -- control plane, by broadcast

    async def snapshot(self) -> ReplicaSnapshot:
        """All that this replica holds and has counted."""
        return ReplicaSnapshot(
            replica=self.replica,
            node=os.uname().nodename,
            node_id=self._node_id(),
            pid=os.getpid(),
            device=str(self._inference.device),
            slots=self._cache.slots,
            slots_used=self._cache.occupied,
            budget_bytes=self._cache.ledger.budget_bytes,
            held_bytes=self._cache.ledger.held_bytes,
            reserved_bytes=self._cache.ledger.reserved_bytes,
            device_memory=self._device.memory(),
            host=await asyncio.to_thread(self._host_tier.usage) if self._host_tier is not None else None,
            loading=[str(key) for key in self._cache.loading],
            swaps=self._promotions.snapshot(),
            passes=self._inference.passes,
            rows=self._inference.rows,
            started_at=self._started_at,
            ongoing=self._service.admission.ongoing,
            queued=self._service.admission.queued,
            refused=self._service.admission.refused,
            advertised=sorted(self._advertiser.advertised()),
            models=self._cache.snapshot(),
            stats=dataclasses.replace(self._cache.stats),
        )

    async def refresh(self, tenant: str, told: str | None = None) -> str:
        """Read a tenant anew and try its failed versions again; returns this replica's name.

        Parameters
        ----------
        told
            The tenant's head (JSON) as the control plane has just read it: a replica that can't reach the
            store believes that, and refuses a key that was revoked.
        """
        parsed = TenantId(tenant)
        self._cache.forget_failures(parsed)
        given = decode_head(parsed, told.encode()) if told is not None else None
        if given is not None:
            self._view.learn(given)
        try:
            head = await self._view.refresh(parsed)
        except Unavailable:
            if given is None:
                raise
            head = given if given.state.exists else None
        for record in self._cache.resident_records():
            if record.tenant == parsed and (head is None or record.version not in head.versions):
                self._cache.unload(ModelKey.of(record))
        for key in self._cache.loading:
            if key.tenant == parsed and (head is None or key.version not in head.versions):
                self._cache.withdraw(key)
        # A promotion is told as done when this replica has swapped, or can't.
        await self._promotions.settled(tenant, SWAP_WAIT_S)
        self._advertiser.changed()
        return self.replica

    async def preload(self, model_ref: str, pin: bool = False) -> str:
        """Make what a ref means resident here, and keep it if ``pin``; returns this replica's name."""
        timeout_s = self._settings.request_timeout_s
        ref = ModelRef.parse(model_ref)
        record = await self._view.resolve(ref, timeout_s)
        self._service.check_fence(ref)
        await self._cache.preload(record, timeout_s, pin=pin)
        return self.replica

    async def unpin(self, model_ref: str) -> bool:
        """Let what a ref means here be evicted again; whether it was pinned."""
        return sum(self._cache.unpin(key) for key in await self._meant(model_ref)) > 0

    async def unload(self, model_ref: str) -> bool:
        """Free what a ref means here, once its leases have ended; whether it was resident."""
        return sum(self._cache.unload(key) for key in await self._meant(model_ref)) > 0

    async def _meant(self, model_ref: str) -> list[ModelKey]:
        ref = ModelRef.parse(model_ref)
        return self._promotions.meant(ref, await self._view.resolve(ref, self._settings.request_timeout_s))

    async def check_health(self) -> None:
        """Called by Serve: a replica whose pass never ends is replaced, since nothing can end its thread."""
        self._inference.check_alive()

    async def fence(self, tenant: str) -> str:
        """Answer nothing for a tenant that is being erased, for a while; returns this replica's name."""
        self._service.fence(TenantId(tenant), FENCE_S)
        return self.replica

    async def erase(self, tenant: str) -> EraseReceipt:
        """End, free and overwrite all of a tenant, whose tombstone stands; asked again until it is clean."""
        parsed = TenantId(tenant)
        self._service.fence(parsed, FENCE_S)
        self._view.forget(parsed)
        told = self._cache.erase(parsed)
        deadline = time.monotonic() + ERASE_WAIT_S
        clean = await self._cache.erased(parsed, ERASE_WAIT_S)
        clean = await self._key_use.stop(parsed, deadline - time.monotonic()) and clean
        self._advertiser.changed()
        return EraseReceipt(
            self.replica, self._node_id(), told.models, told.overwritten_bytes, clean, time.time()
        )

    async def erase_host(self, digests: list[str]) -> HostReceipt:
        """Overwrite and remove tensors of this node's files, but for what is mapped."""
        found = Scrubbed()
        if self._host_tier is not None:
            found = await asyncio.to_thread(self._host_tier.scrub, digests)
        return HostReceipt(
            self.replica, self._node_id(), os.uname().nodename,
            found.removed, found.kept, found.overwritten_bytes, time.time(),
        )  # fmt: skip

    async def __del__(self) -> None:
        """Serve calls this when the replica stops."""
        if not hasattr(self, "_inference"):
            return  # the constructor failed
        self._restoring.cancel()
        await self._door.stop(DOOR_STOP_S)
        self._promotions.close()
        await self._cache.close(DRAIN_S)
        await asyncio.to_thread(self._inference.close)
        self._service.deadlines.close()
        self._decoding.close()
        for threads in self._threads:
            threads.shutdown(wait=False, cancel_futures=True)

    def _node_id(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def _head_changed(self, old: TenantHead | None, new: TenantHead | None) -> None:
        self._promotions.moved(old, new)
        self._advertiser.changed()

    def _held_ids(self) -> set[str]:
        """Every ref that can be answered from a resident: versions by number, and aliases that mean them."""
        held: set[str] = set()
        for record in self._cache.resident_records():
            tenant = TenantId(record.tenant)
            held.add(record.name)
            head = self._view.last_head(tenant)
            if head is not None:
                for alias, number in head.aliases.items():
                    try:
                        ref = ModelRef.parse(f"{tenant}:{alias}")
                    except InvalidRef:  # one damaged head must not stop the others' ids
                        continue
                    serving = self._promotions.serving(ref)
                    if (serving.version if serving is not None else number) == record.version:
                        held.add(str(ref))
        return held


def bytes_limit(settings: Settings) -> BytesLimit:
    """What bodies may take in a replica; one largest body and its rows of every tenant always may."""
    tenant = int(settings.body_memory_bytes * settings.tenant_share)
    return BytesLimit(settings.body_memory_bytes, max(tenant, 2 * settings.max_body_bytes))


def cold_places(max_queued_requests: int) -> Admission:
    """Places for requests that wait for the registry or for a load: half at once, and half in turns of
    tenants.
    """
    half = max_queued_requests // 2 + 1
    return Admission(half, half)


def pool_application(
    settings: Settings, operators: OperatorKeys | None, environment: dict[str, str]
) -> serve.Application:
    """The pool as a Serve application.

    Parameters
    ----------
    environment
        Variables that Ray reads in the replicas (``pool.environment``).
    """
    variables = dict(environment)
    if settings.gpus_per_replica == 0 and settings.device != "cuda":
        # Without this a replica on a GPU host sees all GPUs, although it reserved none.
        variables["CUDA_VISIBLE_DEVICES"] = ""
    # serve.deployment is typed for use as a decorator only.
    deployment = cast("Any", serve.deployment)(
        serve.ingress()(ClassifierPool),
        name=POOL_DEPLOYMENT,
        num_replicas=settings.replicas,
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
            "runtime_env": {"env_vars": variables},
        },
        # Our own admission answers in our own form; Serve's limits stand just behind it.
        max_ongoing_requests=settings.max_ongoing_requests + settings.max_queued_requests + 16,
        max_queued_requests=settings.max_queued_requests,
        request_router_config=RequestRouterConfig(
            request_router_class=cast("Any", HomeReplicaRouter),  # mis-typed as a dict in 2.60
        ),
        # One line a request cost 6 % of the throughput (1,290 to 1,370 requests/s without); the edge can log.
        # Below WARNING Serve makes the line's record, and only then finds that nobody wants it.
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=20,
    )
    application: serve.Application = deployment.bind(settings, operators)
    return application
