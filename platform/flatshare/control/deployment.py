"""The control plane as a Serve application: one replica, no device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

from ray import serve

from flatshare.api.identity import Identities, OperatorKeys
from flatshare.api.tokens import token_verifier
from flatshare.control.access import Gate
from flatshare.control.app import RegistryHeads, create_control_app
from flatshare.control.decided import Routes
from flatshare.control.fleet import Fleet
from flatshare.control.history import History
from flatshare.control.keeper import Keeper
from flatshare.control.nodes import NodeDrain
from flatshare.control.scaling import Scaling
from flatshare.control.settings import RunningSettings
from flatshare.live_settings import with_live
from flatshare.placement.scaling import Bounds
from flatshare.pool.controller import read_details
from flatshare.pool.details import ReplicaState, replica_states
from flatshare.pool.handle import (
    CONTROL_APP,
    CONTROL_DEPLOYMENT,
    POOL_APP,
    POOL_DEPLOYMENT,
    pool_handle,
)
from flatshare.pool.kept import (
    change_deployed,
    recall_bounds,
    recall_deployed,
    recall_moved,
    remember_bounds,
    remember_moved,
)
from flatshare.pool.nodes import RayNodes
from flatshare.pool.scaling import ServeScaler
from flatshare.pool.task_names import CONSUMER_DEPLOYMENT, TASKS_APP
from flatshare.pool.task_queues import queue_of, run_s
from flatshare.process_log import log_as
from flatshare.settings import Settings
from flatshare.tasks.keeper import TaskKeeper
from flatshare.tasks.store import TaskStore
from flatshare_registry.catalog import Registry

__all__ = ["CONTROL_APP", "CONTROL_DEPLOYMENT", "CONTROL_PREFIX", "control_application"]

CONTROL_PREFIX: Final = "/admin"


def _pool_states() -> list[ReplicaState]:
    return replica_states(read_details(), POOL_APP, POOL_DEPLOYMENT)


class ControlPlane:
    """Composition root of the control plane."""

    def __init__(self, settings: Settings, operators: OperatorKeys | None) -> None:
        log_as(settings.log_format, settings.log_level, "control plane")
        self._settings = settings
        self._operators = operators
        self._keeping: asyncio.Task[None] | None = None
        self._tending: asyncio.Task[None] | None = None
        self._task_keeper: TaskKeeper | None = None
        self._remembering: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Gate:
        """Called by Serve after the constructor."""
        registry = Registry(self._settings.open_store(), actor="control-plane")
        deployed = recall_deployed()  # what was changed in place before this process was there
        if deployed is not None:
            self._settings = with_live(self._settings, deployed.settings)
        fleet = Fleet(pool_handle(), _pool_states, registry.any_head)
        self._keeper = Keeper(
            fleet, ServeScaler(), _bounds(self._settings), self._settings.target_ongoing_requests,
            remember_moved=remember_moved,
        )  # fmt: skip
        self._keeper.begin_with(recall_moved())
        self._history = History(fleet)
        if self._settings.tasks != "off":
            self._task_keeper = _task_keeper(self._settings)
        identities = Identities(RegistryHeads(registry), self._operators, token_verifier(self._settings))
        running = RunningSettings(
            self._settings, deployed.revision if deployed else 0, _keep, self._keeper.take_settings
        )
        return create_control_app(
            registry, fleet, identities, running, Path(self._settings.erasure_key_file), scaling=Scaling(
                self._keeper, remember_bounds, can_wake=self._settings.edge == "haproxy"
            ), nodes=NodeDrain(
                RayNodes(self._settings.cpus_per_replica, self._settings.gpus_per_replica), fleet,
                lambda: self._keeper.placement.moved, f"{POOL_APP}/{POOL_DEPLOYMENT}/",
            ), task_keeper=self._task_keeper, history=self._history,
        )  # fmt: skip

    async def check_health(self) -> None:
        """Called by Serve, first before the control plane answers; starts the keepers."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keeper.run(), name="keep the fleet")
        if self._remembering is None:
            self._remembering = asyncio.create_task(self._history.run(), name="remember the last hour")
        if self._tending is None and self._task_keeper is not None:
            self._tending = asyncio.create_task(self._task_keeper.run(), name="tend tasks")
        if self._keeping.done() or (self._tending is not None and self._tending.done()):
            raise RuntimeError("the fleet's keeper, or that of tasks, has ended")

    async def routes(self) -> Routes:
        """Called by edges: what is not routed by the ring alone."""
        return self._keeper.routes

    async def wake(self, waiting: int) -> None:
        """Called by edges: ``waiting`` requests wait, and there is no replica."""
        self._keeper.wake(waiting)


def _keep(change: Callable[[Settings], Settings]) -> tuple[Settings, int]:
    deployed = change_deployed(change)
    return deployed.settings, deployed.revision


def _task_keeper(settings: Settings) -> TaskKeeper:
    bounds = Bounds(
        settings.tasks_min_consumers,
        settings.tasks_max_consumers,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        idle_s=settings.downscale_delay_s,
    )
    store = TaskStore(settings.open_store(), settings.tasks_keep_s)
    return TaskKeeper(
        store, queue_of(settings, store),
        ServeScaler(TASKS_APP, CONSUMER_DEPLOYMENT), bounds, settings.tasks_at_a_time, run_s(settings),
    )  # fmt: skip


def _bounds(settings: Settings) -> Bounds:
    """What the operator allows: the bounds that were set last on this cluster, else those of the settings."""
    minimum, maximum = recall_bounds() or (settings.least_replicas, settings.most_replicas)
    return Bounds(
        minimum,
        maximum,
        settings.target_ongoing_requests,
        target_loading_requests=2.0 * settings.load_concurrency,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        idle_s=settings.downscale_to_zero_delay_s,
    )


def control_application(
    settings: Settings, operators: OperatorKeys | None, environment: dict[str, str]
) -> serve.Application:
    """The control plane as a Serve application; the pool must be deployed first."""
    # serve.deployment is typed for use as a decorator only.
    deployment = cast("Any", serve.deployment)(
        serve.ingress()(ControlPlane),
        name=CONTROL_DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={
            "num_cpus": 0,
            "runtime_env": {"env_vars": {**environment, "CUDA_VISIBLE_DEVICES": ""}},
        },
        # Refusals wait a tenth of a second in a place; the edge bounds how many one address can have.
        max_ongoing_requests=128,
        # Serve's own period of ten seconds left a killed control plane away for thirteen.
        health_check_period_s=2,
        health_check_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=5,
    )
    application: serve.Application = deployment.bind(settings, operators)
    return application
