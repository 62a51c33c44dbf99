"""The pool: one Serve deployment. This is Ray Serve's shell around one replica."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, Final, cast

import numpy as np
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from flatshare.api.app import create_app
from flatshare.api.decoding import INLINE_BYTES, DecodeRoom
from flatshare.api.hot import HotRoutes
from flatshare.api.identity import LOCAL_OPERATOR, Identities, OperatorKeys
from flatshare.api.tokens import token_verifier
from flatshare.codecs.payload import READY, decode_array
from flatshare.device.host_memory import keep_freed_memory
from flatshare.door.listener import Door
from flatshare.door.metrics import MetricsServer
from flatshare.door.peers import TierServer
from flatshare.errors import BadInput
from flatshare.models.architecture import Architecture
from flatshare.placement.handover import to_load
from flatshare.placement.load import Held, ReplicaLoad
from flatshare.pool.consumer import tasks_of
from flatshare.pool.details import DoorAddress
from flatshare.pool.doors import ask_held
from flatshare.pool.following import SettingsFollower
from flatshare.pool.gpus import allocator_variables, check_visible
from flatshare.pool.handle import POOL_DEPLOYMENT
from flatshare.pool.inside import InsideIdentities, answered
from flatshare.pool.multiplex import NEVER_EVICT, Advertiser
from flatshare.pool.peers import PeerDoors
from flatshare.pool.ray_metrics import tell_ray
from flatshare.pool.router import PLACE, HomeReplicaRouter
from flatshare.pool.steps import Steps
from flatshare.process_log import log_as
from flatshare.replica.build import Replica
from flatshare.replica.identity import ReplicaIdentity
from flatshare.replica.receipt import EraseReceipt, HostReceipt
from flatshare.replica.snapshot import ReplicaSnapshot
from flatshare.replica.ticket import Rows
from flatshare.resolution.trust import TrustedHeads
from flatshare.settings import Settings
from flatshare.tasks.runner import Asked, Reply
from flatshare.telemetry.exporting import export_spans
from flatshare.telemetry.tracing import joined
from flatshare.weights.peers import PeerTiers
from flatshare_registry.ids import ModelRef

__all__ = ["pool_application"]

logger = logging.getLogger("flatshare.pool")

LOOPBACK: Final = "127.0.0.1"
"""Where replicas listen when the edge is on the same machine."""

DOOR_STOP_S: Final = 6.0
"""Seconds that a stopping replica waits for its door's requests to end."""


class ClassifierPool:
    """One replica, as Serve starts it.

    Parameters
    ----------
    settings
        All settings, already validated, without operators' keys.
    operators
        Digests of these; None when authentication is off.
    """

    def __init__(self, settings: Settings, operators: OperatorKeys | None) -> None:
        check_visible(ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        node_id = str(ray.get_runtime_context().get_node_id())
        node = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray gives it no types
        settings = settings.model_copy(update={"host_dir": settings.host_dir.replace("{node}", node)})
        identity = ReplicaIdentity(serve.get_replica_context().replica_id.unique_id, node_id=node_id)
        log_as(settings.log_format, settings.log_level, f"replica {identity.replica}")
        export_spans(settings.traces, "flatshare.replica", identity.replica)
        self._advertiser = Advertiser(self, self.load_model, lambda: self._replica.held_ids())
        keep_freed_memory()
        self._peers = PeerDoors(node) if settings.nodes == "several" and settings.peer_tiers else None
        self._replica = Replica.build(
            settings, settings.open_store(), identity=identity, on_change=self._advertiser.changed,
            peers=PeerTiers(self._peers.key, self._peers.of) if self._peers is not None else None,
        )  # fmt: skip
        self._settings = SettingsFollower(self._replica.take_settings)
        self._decoding = DecodeRoom()
        identities = Identities(
            TrustedHeads(self._replica.heads, settings.key_trust_s),
            operators,
            token_verifier(settings),
            used=self._replica.key_use,
        )
        self._plane = functools.partial(
            create_app,
            self._replica.service,
            replica=self._replica.name,
            room=self._decoding,
            pipelines=Steps(settings.pipelines),
            traced=settings.traces != "off",
        )
        self._data_plane = self._plane(
            identities, max_body_bytes=settings.max_body_bytes, max_rows=settings.max_rows,
            tasks=tasks_of(settings),
        )  # fmt: skip
        self._door = Door(
            self._data_plane, node if settings.nodes == "several" else LOOPBACK,
            tier=self._tier_server(), metrics=MetricsServer(identities, self.snapshot),
        )  # fmt: skip
        self._telling: asyncio.Task[None] | None = None
        self._warm = asyncio.get_running_loop().create_task(self._warm_up(), name="warm up")
        self._door_open = asyncio.get_running_loop().create_task(self._door.start(), name="open the door")
        self._replica.start()
        if settings.ray_metrics:
            self._telling = asyncio.get_running_loop().create_task(
                tell_ray(self.snapshot), name="tell Ray's metrics"
            )
        device = self._replica.device.name
        logger.info("replica %s on %s with %d slots", self._replica.name, device, settings.slots)

    def _tier_server(self) -> TierServer | None:
        """What serves other nodes' replicas; None where there are no other nodes, or no tier."""
        tier = self._replica.host_tier
        if self._peers is None or tier is None:
            return None
        return TierServer(tier, self._replica.thread_work, self._peers.key)

    def __serve_build_asgi_app__(self) -> HotRoutes:
        """Called by Serve after the constructor: the same data plane, for what comes by Serve's own ways."""
        return self._data_plane

    async def door(self) -> DoorAddress:
        """Where this replica listens itself, once it does."""
        await self._door_open
        return DoorAddress(self._replica.name, self._door.host, self._door.port, _place())

    def record_replica_metadata(self) -> dict[str, int]:
        """Called by Serve once, before this replica takes requests: routers learn its place from it."""
        return {PLACE: _place()}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve's autoscaler: it does not see the requests that come through the door."""
        admission = self._replica.service.admission
        return {"ongoing": float(admission.ongoing), "queued": float(admission.queued)}

    async def check_health(self) -> None:
        """Called by Serve: a replica whose pass never ends, or whose device is lost, is replaced.

        The first call waits for :meth:`_warm_up`: Serve sends a replica no request before it has succeeded.
        """
        await asyncio.shield(self._warm)
        self._settings.follow()  # a replica that missed a change, or started meanwhile, sees it here
        self._replica.check_health()

    async def __del__(self) -> None:
        """Serve calls this when the replica stops."""
        if not hasattr(self, "_door_open"):
            return  # the constructor failed
        await self._door.stop(DOOR_STOP_S)
        if self._telling is not None:
            self._telling.cancel()
        await self._replica.close()
        self._decoding.close()

    # -- handles

    async def predict(self, batch: dict[str, Any], traceparent: str = "") -> dict[str, Any]:
        """The handle form: ``handle.options(multiplexed_model_id="acme").predict.remote(batch)``.

        Parameters
        ----------
        batch
            ``{"image": array}``, shapes as over HTTP. With ``"values": "model-ready"`` whole numbers of 0 to
            255 are taken as they are, and not refused as raw pixels.
        traceparent
            W3C trace context of a caller that traces, if it sampled its trace.

        Returns
        -------
        dict
            The batch and ``predicted_label``, int64 ``(N,)``.
        """
        with joined(traceparent, "request"):
            return await self._predict(_named_model(), batch)

    async def predict_each(
        self, batches: list[dict[str, Any]], traceparent: str = ""
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The streaming form: an answer for each batch, as it is ready, in order; the first error ends it.

        ``handle.options(stream=True, multiplexed_model_id="acme").predict_each.remote(batches)``. Each batch
        is a request of its own.
        """
        model_ref = _named_model()
        for batch in batches:
            with joined(traceparent, "request"):
                answer = await self._predict(model_ref, batch)
            yield answer

    async def _predict(self, model_ref: ModelRef, batch: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(cast("object", batch), dict):  # a handle passes on whatever it was given
            raise BadInput("the batch must be a dict")

        service = self._replica.service
        max_rows = self._replica.settings.max_rows

        def decode(network: Architecture) -> Rows | Awaitable[Rows]:
            if network.input.name not in batch:
                raise BadInput(f'the batch must be a dict with the key "{network.input.name}"')
            values = batch[network.input.name]
            ready = batch.get("values") == READY
            size = values.nbytes if isinstance(values, np.ndarray) else INLINE_BYTES + 1
            return self._decoding.here_or_there(
                model_ref.tenant, size, lambda: decode_array(values, network.input, max_rows, ready=ready)
            )

        # A caller with a handle is inside the cluster, which is one trust domain: the operator's.
        with await service.enter(LOCAL_OPERATOR, model_ref) as ticket:
            prediction = await service.predict(ticket, decode)
        return {**batch, "predicted_label": prediction.labels}

    @functools.cached_property
    def _inside(self) -> HotRoutes:
        """The data plane as tasks see it: made with the first of them, since most pools have none."""
        settings = self._replica.settings
        return self._plane(
            InsideIdentities(), max_body_bytes=settings.tasks_max_body_bytes, max_rows=settings.tasks_max_rows
        )

    async def answer(self, asked: Asked) -> Reply:
        """What the data plane answers to a task's request; called by the consumer of tasks."""
        return await answered(self._inside, asked)

    @serve.multiplexed(max_num_models_per_replica=NEVER_EVICT)  # type: ignore[untyped-decorator]  # Ray's
    async def load_model(self, model_id: str) -> str:
        """Ray's way in: called (by the advertiser) with each ref whose version became resident."""
        return model_id

    # -- control plane, by broadcast: ``Replica`` says what each promises

    async def load(self) -> ReplicaLoad:
        """See :meth:`Holdings.load`."""
        return self._replica.holdings.load(_place())

    async def held(self) -> Held:
        """See :meth:`Holdings.held`."""
        return self._replica.holdings.held(_place())

    async def warm(self, wanted: dict[str, list[str]], within_s: float) -> tuple[str, list[str]]:
        """Load the models listed under this replica's name; returns its name, and those it holds now."""
        refs = wanted.get(self._replica.name, [])
        return self._replica.name, await self._replica.holdings.warm(refs, within_s)

    async def _warm_up(self) -> None:
        """Take over changed settings; load models of other replicas that this one is going to be home to.

        Raises nothing.
        """
        with contextlib.suppress(Exception):  # it is logged, and looked for again
            await self._settings.now()
        if self._peers is not None:
            self._peers.look()  # beside the rest: a load that comes before it has ended waits a moment for it
        if self._replica.settings.warm_up_s == 0:
            return
        try:
            held = await ask_held()
            me = self._replica.holdings.held(_place())
            names = {one.place: one.replica for one in held} | {me.place: me.replica}
            refs = to_load([*held, me], names).get(me.replica, [])
            done = await self._replica.holdings.warm(refs, self._replica.settings.warm_up_s)
        except Exception as error:  # it is only slower without
            logger.warning("replica %s starts cold: %s", self._replica.name, error)
        else:
            if done:
                logger.warning("replica %s starts with %d models", self._replica.name, len(done))

    async def snapshot(self) -> ReplicaSnapshot:
        """See :meth:`Replica.snapshot`."""
        return await self._replica.snapshot(self._advertiser.advertised(), _place())

    async def follow_settings(self) -> str:
        """Take over settings that were changed in place; this replica's name."""
        await self._settings.now()
        return self._replica.name

    async def refresh(self, tenant: str, told: str | None = None) -> str:
        """See :meth:`Replica.refresh`."""
        return await self._replica.refresh(tenant, told)

    async def preload(self, model_ref: str, pin: bool = False) -> str:
        """See :meth:`Replica.preload`."""
        return await self._replica.preload(model_ref, pin)

    async def unpin(self, model_ref: str) -> bool:
        """See :meth:`Replica.unpin`."""
        return await self._replica.unpin(model_ref)

    async def unload(self, model_ref: str) -> bool:
        """See :meth:`Replica.unload`."""
        return await self._replica.unload(model_ref)

    async def fence(self, tenant: str) -> str:
        """See :meth:`Replica.fence`."""
        return self._replica.fence(tenant)

    async def erase(self, tenant: str) -> EraseReceipt:
        """See :meth:`Replica.erase`."""
        return await self._replica.erase(tenant)

    async def erase_host(self, digests: list[str]) -> HostReceipt:
        """See :meth:`Replica.erase_host`."""
        return await self._replica.erase_host(digests)


def _named_model() -> ModelRef:
    """The model that a handle's call names."""
    model_ref = serve.get_multiplexed_model_id()
    if not model_ref:
        raise BadInput("name the model: handle.options(multiplexed_model_id='acme')")
    return ModelRef.parse(model_ref)


def _place() -> int:
    """This replica's place on the ring: Serve's rank. Serve may change it when the pool shrinks."""
    return int(serve.get_replica_context().rank.rank)


def pool_application(
    settings: Settings,
    operators: OperatorKeys | None,
    environment: dict[str, str],
    *,
    replicas: int | None = None,
    surge: bool = False,
) -> serve.Application:
    """The pool as a Serve application.

    Parameters
    ----------
    environment
        Variables that Ray reads in the replicas (``pool.environment``).
    replicas
        How many to begin with; None for the settings'.
    surge
        When replicas are replaced, start each new one first, one at a time. Needs room for one more.
    """
    count = settings.replicas if replicas is None else replicas
    variables = dict(environment)
    if settings.gpus_per_replica == 0 and settings.device != "cuda":
        # Without this a replica on a GPU host sees all GPUs, although it reserved none.
        variables["CUDA_VISIBLE_DEVICES"] = ""
    else:
        variables |= allocator_variables()
    # serve.deployment is typed for use as a decorator only.
    deployment = cast("Any", serve.deployment)(
        serve.ingress()(ClassifierPool),
        name=POOL_DEPLOYMENT,
        num_replicas=count,
        # Serve rounds the number of extra replicas up, and that of missing ones down: one each.
        max_surge_percent=max(100 // count, 1) if surge else 0,
        rolling_update_percentage=1 / count,
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
        # Three failures in a row replace a replica: one that was stopped is gone in half a minute.
        health_check_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=20,
    )
    application: serve.Application = deployment.bind(settings, operators)
    return application
