"""A pipeline's step as a Serve application of its own: it scales, and is replaced, apart from the pool."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar, cast

from numpy.typing import NDArray
from ray import serve

from flatshare.errors import ServeError, StepFailed
from flatshare.pipelines.steps import arrays_of, batch_of, step_class
from flatshare.pool.steps import STEP_DEPLOYMENT, StepRequest
from flatshare.process_log import LogFormat, LogLevel, log_as
from flatshare.settings import Settings, StepSettings
from flatshare.telemetry.exporting import export_spans
from flatshare.telemetry.tracing import joined
from flatshare_registry.errors import RegistryError

__all__ = ["step_application"]

logger = logging.getLogger("flatshare.pipelines")

T = TypeVar("T")

LOOK_BACK_S: Final = 2.0
"""Seconds over which Serve takes the mean of requests under way: its default of thirty misses a jump in
load.
"""


class StepReplica:
    """One replica of a step, as Serve starts it.

    Parameters
    ----------
    name
        The pipeline's.
    path
        Of the step's class; see :func:`flatshare.pipelines.steps.step_class`.
    limit_s
        Seconds that one run in the thread may take: nobody waits for it longer.
    log
        How it logs, and from which level on.
    traces
        Where its spans go; see :func:`flatshare.telemetry.exporting.export_spans`.
    """

    def __init__(
        self, name: str, path: str, limit_s: float, log: tuple[LogFormat, LogLevel], traces: str
    ) -> None:
        log_as(*log, f"step {name}")
        export_spans(traces, "flatshare.step", f"{name} {os.getpid()}")
        self._name = name
        self._step = step_class(name, path)()
        # One thread: only one expanded body is in memory; for more work at a time there are more replicas.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._limit_s = limit_s
        self._began: float | None = None

    async def run(self, request: StepRequest) -> dict[str, NDArray[Any]]:
        """Arrays by name, made of a request's body.

        Raises
        ------
        BadInput
            The caller's mistake.
        StepFailed
            The step's.
        """
        with joined(request.traceparent, "step", attributes={"flatshare.pipeline": self._name}):
            return await self._run(request)

    async def _run(self, request: StepRequest) -> dict[str, NDArray[Any]]:
        try:
            if inspect.iscoroutinefunction(self._step.run):
                batch = await self._in_thread(lambda: batch_of(request.body))
                return arrays_of(await self._step.run(batch))
            return await self._in_thread(lambda: arrays_of(self._step.run(batch_of(request.body))))
        except (ServeError, RegistryError):
            raise
        except Exception:
            # Its words may be of anything; they are the operator's to read, by the request's id.
            about = {"request_id": request.id}
            logger.exception(
                "pipeline %s, tenant %s, request %s", self._name, request.tenant, request.id, extra=about
            )
            raise StepFailed(f"the step of pipeline {self._name} failed") from None

    async def check_health(self) -> None:
        """Called by Serve: a thread that never comes back can't be ended, so the process is replaced."""
        began = self._began
        if began is not None and time.monotonic() - began > self._limit_s:
            raise RuntimeError(f"a run of pipeline {self._name} takes longer than {self._limit_s:g} s")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        def timed() -> T:
            self._began = time.monotonic()
            try:
                return work()
            finally:
                self._began = None

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)


def step_application(
    name: str, step: StepSettings, environment: dict[str, str], settings: Settings
) -> serve.Application:
    """A pipeline's step as a Serve application.

    Serve's own autoscaling counts the calls that handles have under way, which is right here: nobody reaches
    a step but by a handle, and a step takes milliseconds at least.

    Raises
    ------
    SettingsError
        There is no such step.
    """
    step_class(name, step.step)  # here, where the operator reads it, rather than in a replica
    autoscaling = {
        "min_replicas": step.min_replicas,
        "initial_replicas": step.min_replicas,
        "max_replicas": step.max_replicas,
        "target_ongoing_requests": step.target_ongoing_requests,
        "upscale_delay_s": step.upscale_delay_s,
        "downscale_delay_s": step.downscale_delay_s,
        "look_back_period_s": LOOK_BACK_S,
        "metrics_interval_s": 1.0,
    }
    variables = dict(environment)
    if step.gpus_per_replica == 0:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    # serve.deployment is typed for use as a decorator only.
    deployment = cast("Any", serve.deployment)(
        StepReplica,
        name=STEP_DEPLOYMENT,
        autoscaling_config=autoscaling,
        ray_actor_options={
            "num_cpus": step.cpus_per_replica,
            "num_gpus": step.gpus_per_replica,
            "runtime_env": {"env_vars": variables},
        },
        max_ongoing_requests=step.max_ongoing_requests,
        max_queued_requests=step.max_queued_requests,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        health_check_period_s=2,
        health_check_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=20,
    )
    application: serve.Application = deployment.bind(
        name, step.step, settings.request_timeout_s, (settings.log_format, settings.log_level),
        settings.traces,
    )  # fmt: skip
    return application
