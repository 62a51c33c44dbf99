"""The consumer of tasks: a Serve deployment that runs what waits, by asking the pool."""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, cast

from ray import serve
from ray.serve.schema import TaskProcessorConfig
from ray.serve.task_consumer import task_consumer, task_handler

from flatshare.api.tasks import Tasks
from flatshare.callback_rules import CallbackRules
from flatshare.pool.embedded_queue import SqliteTaskAdapter
from flatshare.pool.handle import control_handle, pool_handle
from flatshare.pool.task_names import CONSUMER_DEPLOYMENT, RUN
from flatshare.pool.task_queues import queue_of, run_s
from flatshare.process_log import log_as
from flatshare.settings import Settings
from flatshare.tasks.callbacks import CallbackSender
from flatshare.tasks.records import TaskId
from flatshare.tasks.runner import Asked, Reply, TaskRunner
from flatshare.tasks.store import TaskStore
from flatshare.telemetry.exporting import export_spans
from flatshare_registry.catalog import Registry

__all__ = ["consumer_application", "tasks_of"]

logger = logging.getLogger("flatshare.tasks")


DRAIN_S: Final = 10.0
"""Seconds that a stopping consumer has for the tasks in hand; a task that takes longer is run again."""


class Adapter(Protocol):
    """What the consumer asks of its adapter beside Ray Serve's own methods."""

    failed: str | None
    """Why it does not work any more; None while it does."""

    def check(self) -> None:
        """Return if the queue answers; raises ``Unavailable``. Blocks."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Take no more, and let what is in hand end, within its time."""
        ...


def tasks_of(settings: Settings) -> Tasks | None:
    """Where a replica of the pool takes tasks; None: nowhere."""
    if settings.tasks == "off":
        return None
    store = TaskStore(settings.open_store(), settings.tasks_keep_s)
    callbacks = CallbackRules.parse(settings.tasks_callback_hosts)
    return Tasks(store, queue_of(settings, store), callbacks, settings.tasks_max_body_bytes)


def _config(settings: Settings) -> TaskProcessorConfig:
    if settings.tasks == "embedded":
        return TaskProcessorConfig(
            queue_name="flatshare", adapter=SqliteTaskAdapter, adapter_config={"path": settings.tasks_file}
        )
    from flatshare.pool.celery_queue import queue_config

    where = (settings.tasks_broker_url, settings.tasks_broker_password_file, run_s(settings))
    if settings.tasks == "rabbitmq":
        from flatshare.pool.rabbit_queue import RabbitTaskAdapter

        return queue_config(RabbitTaskAdapter, *where)
    from flatshare.pool.redis_queue import RedisTaskAdapter

    return queue_config(RedisTaskAdapter, *where)


class TaskConsumer:
    """Runs tasks, as Serve starts it.

    Parameters
    ----------
    settings
        All settings, already validated.
    """

    _adapter: Adapter

    def __init__(self, settings: Settings) -> None:
        log_as(settings.log_format, settings.log_level, "consumer of tasks")
        export_spans(settings.traces, "flatshare.consumer", str(os.getpid()))
        store = settings.open_store()
        tasks = TaskStore(store, settings.tasks_keep_s)
        # The embedded queue's leases show that a run has died; without leases its time limit does.
        self._run_s = run_s(settings)
        alone_s = 0.0 if settings.tasks == "embedded" else self._run_s
        callbacks = CallbackSender(CallbackRules.parse(settings.tasks_callback_hosts))
        self._runner = TaskRunner(tasks, Registry(store).head, self._ask, callbacks, alone_s=alone_s)
        self._wakes = settings.least_replicas == 0
        self._checking = ThreadPoolExecutor(1, thread_name_prefix="check the queue")

    @task_handler(name=RUN)
    async def run(self, task_id: str) -> float | None:
        """See :meth:`TaskRunner.run`."""
        return await self._runner.run(TaskId.parse(task_id))

    async def check_health(self) -> None:
        """Called by Serve, which looks at neither workers nor queue itself."""
        # In a thread of its own: a slow store has all of the loop's, and must not look like a dead queue.
        await asyncio.get_running_loop().run_in_executor(self._checking, self._adapter.check)
        failed = self._adapter.failed
        if failed is not None:
            raise RuntimeError(f"tasks are not run any more: {failed}")

    async def _ask(self, asked: Asked) -> Reply:
        handle = pool_handle().options(multiplexed_model_id=asked.ref)
        try:
            async with asyncio.timeout(self._run_s):
                reply: Reply = await handle.answer.remote(asked)
                return reply
        except TimeoutError:
            # An edge wakes a pool without a replica when it sees requests wait, but it does not see these.
            if self._wakes:
                await control_handle().wake.remote(1)
            raise


def consumer_application(settings: Settings, environment: dict[str, str]) -> serve.Application:
    """The consumer as a Serve application, without a route: nobody reaches it but by the queue."""
    base: Any = task_consumer(task_processor_config=_config(settings))(TaskConsumer)

    class Consumer(base):  # type: ignore[misc]  # Ray gives it no type
        """Ends when it has ended what it has in hand."""

        async def __del__(self) -> None:
            """Called, and awaited, by Serve. Serve's own method waits on the event loop, where tasks run."""
            await self._adapter.drain(DRAIN_S)

    # serve.deployment is typed for use as a decorator only.
    deployment = cast("Any", serve.deployment)(
        Consumer,
        name=CONSUMER_DEPLOYMENT,
        num_replicas=max(settings.tasks_min_consumers, 1),
        ray_actor_options={
            "num_cpus": 0,
            "runtime_env": {"env_vars": {**environment, "CUDA_VISIBLE_DEVICES": ""}},
        },
        # Tasks at a time: fewer than a replica's places, so that requests of the moment find room.
        max_ongoing_requests=settings.tasks_at_a_time,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        health_check_period_s=2,
        health_check_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=DRAIN_S + 5,
    )
    application: serve.Application = deployment.bind(settings)
    return application
